"""Repositories on the Hub brought to a wanted content, without a broken moment."""
