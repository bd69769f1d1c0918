"""A small Hub over HTTP on this machine, to try publishing on: what huggingface_hub asks to push, check and load."""
