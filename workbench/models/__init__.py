"""Models of transformers: architecture facts, layouts, tensor names, live models, tokenizers and texts as tokens."""
