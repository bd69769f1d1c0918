"""Figures, tables and the page of everything a folder holds."""
