"""Training of a LoRA adapter, or of all weights, on prompts and completions."""
