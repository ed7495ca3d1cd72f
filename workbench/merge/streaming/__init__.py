"""A merge tensor by tensor, in blocks of rows."""
