"""Models, projects and documents that several tests use."""
