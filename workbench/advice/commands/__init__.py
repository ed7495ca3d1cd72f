"""Commands `brick advise`, `brick barrier` and `facts check`."""
