"""Shared code of the closed-form editors: values, second moments and the solver."""
