"""Edit: facts into a low-rank delta. One method a file; shared kernels beside them."""
