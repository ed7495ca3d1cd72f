"""Edit: facts into a low-rank delta. One method a file; `facts.py` is shared."""
