"""Laws of score against the number of visual tokens, their fits and comparisons."""
