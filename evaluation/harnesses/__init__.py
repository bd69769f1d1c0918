"""Evaluations by other tools: VLMEvalKit and lmms-eval give data, prompts and scores, our runner the answers."""
