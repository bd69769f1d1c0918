"""Whether a folder or repository is complete and sound, from its files and by loading it."""
