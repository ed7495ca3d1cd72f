"""Commands `push` and `export`."""
