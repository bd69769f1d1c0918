"""What is asked and how it is scored: one small class for each kind of question."""
