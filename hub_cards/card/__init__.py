"""A model card: facts to text, the text back to facts, what readers and the Hub would stumble over."""
