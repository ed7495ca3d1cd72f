"""Closed-form editors: values, second moments, and the solve."""
