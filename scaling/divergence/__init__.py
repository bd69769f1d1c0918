"""Divergence of two branches: theory, estimators, and the measurement over a model."""
