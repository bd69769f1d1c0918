"""Connectors and reducers side by side: same images, towers, language model, training FLOPs and data order."""
