"""Weighted, seeded mixtures of sources that resume exactly."""
