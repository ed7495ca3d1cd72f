"""Growth of mixtures of experts."""
