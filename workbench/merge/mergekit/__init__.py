"""mergekit's methods as `merge: mergekit/NAME`."""
