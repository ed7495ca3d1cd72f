"""Edit methods, which write facts into a low-rank update: one method per file, shared code in the folders."""
