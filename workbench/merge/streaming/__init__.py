"""Execution of a merge: one tensor at a time, in blocks of rows."""
