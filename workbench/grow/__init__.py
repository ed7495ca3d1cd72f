"""Growth methods, which add parameters to a model or take experts away. Each file is one method; folders hold shared code."""
