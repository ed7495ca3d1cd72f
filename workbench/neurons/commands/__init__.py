"""Commands `analyze` and `edit trace`."""
