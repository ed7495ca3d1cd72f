"""Search: `workbench search` tries values of a recipe's fields, and tests the best on items that no candidate has seen. At most 320 names."""

from workbench.ground.parts import Part

PART = Part(
    commands={"search": "search.commands.search"},
    searches="search.reported",
    documents={"search": "search.result.SearchResult"},
    needs=("trackers",),
    extras={"search": {"optuna": "optuna", "cmaes": "cmaes"}},
)
