"""Planning and running of resolved recipes: plans, live models and files."""
