"""The dimensions of a search, which are fields of a recipe."""

from __future__ import annotations

from workbench.ground.errors import InvalidRecipeError
from workbench.recipe.recipe import Recipe
from workbench.recipe.space import FieldSpace


class Space(FieldSpace):
    """The dimensions of a recipe's search.

    Raises:
        WorkbenchError: If the recipe has no search, a step or field does not exist, or a field does not accept an end of a range or a choice.
    """

    place = ("search", "space")

    def __init__(self, recipe: Recipe) -> None:
        fields = recipe.fields.search
        if fields is None:
            raise InvalidRecipeError(
                f"recipe {recipe.name} has no `search`", "Add a search: `search: {space: {STEP.FIELD: [0.2, 1.2]}}`."
            )
        self.fields = fields
        super().__init__(recipe, fields.space)
