"""Commands on bricks and facts, one a file."""
