"""The place of a connector that is not part of the package: a variant that has one is saved with its file here."""
