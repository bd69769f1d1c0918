"""Training data made by language models and page readers, and why a piece of it is dropped."""
