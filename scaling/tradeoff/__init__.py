"""Visual tokens against LLM parameters, and the choice for a budget."""
