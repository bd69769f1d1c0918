"""Conversation samples: one format, checked."""

from .records import answers_per_segment, normalise_sample, text_of

__all__ = ["answers_per_segment", "normalise_sample", "text_of"]
