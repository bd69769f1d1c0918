"""Card templates (package data)."""
