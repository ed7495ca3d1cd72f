"""From a resolved recipe to a plan, a live model or files."""
