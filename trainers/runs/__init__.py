"""A run from a recipe: model, data, stages, variants, and the record of it."""
