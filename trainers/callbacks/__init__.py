"""Callbacks: what is watched, counted and shown while training."""
