"""Facts, which edits and memories teach a model, and the files that they are read from."""
