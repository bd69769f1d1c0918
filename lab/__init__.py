"""The trade-off from scratch: several language models, every m, with the question and without, and what fits them."""
