"""Commands `doctor`, `recipe diff`, `edit rebase`, and those of `brick` that measure, fetch, train, extract, bake and verify."""
