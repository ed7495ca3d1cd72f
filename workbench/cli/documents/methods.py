"""Document of `methods`."""

from __future__ import annotations

from typing import Literal

from workbench.cli.documents.document import Document, MethodOrigin, optional


class MethodLaws(Document):
    """Properties that a merge method guarantees; a test checks them. Other methods have an empty object."""

    zero_is_base: bool = optional()
    """If all weights or all deltas are 0, the result is the base."""
    permutation_invariant: bool = optional()
    """The order of the bricks does not matter."""
    single_is_identity: bool = optional()
    """One brick with default fields gives that brick's model."""
    linear_in_weight: bool = optional()
    """Doubling all weights doubles the delta."""
    arity: tuple[int, int | None] = optional()
    """Smallest and largest number of bricks; null for any number."""
    passes: int = optional()
    """Number of times that every delta is read."""
    spaces: list[str] = optional()
    """Representations that it can work on: "full" for whole deltas, "core" for the small matrices of stacked LoRA factors."""
    rotation_invariant: bool = optional()
    """If orthogonal matrices rotate all deltas, the result is rotated by them too."""
    exact_rank: bool = optional()
    """Adapters merge to an adapter whose rank is at most the sum of the bricks' ranks."""
    memory: Literal["stream", "tensor", "model"] = optional()
    """Memory that it needs at a time: a few blocks, a few copies of one tensor, or a live model."""
    needs: Literal["tensor", "texts", "model"] = optional()
    """Inputs besides the weights: none, calibration texts, or a live model run on texts."""
    random: bool = optional()
    """The method draws random numbers from the recipe's seed."""


class MethodField(Document):
    """A field of a method."""

    name: str
    """Name of the field in a recipe."""
    default: str
    """Default as text; "required" if the field has none, "-" if it is unset or has no short form."""
    text: str
    """Description of the field."""


class MethodDocument(Document):
    """A method that steps can use."""

    verb: str
    """Verb of its steps: merge, edit or grow."""
    name: str
    """Name of the method."""
    text: str
    """Description of the method."""
    formula: str
    """Formula of the method."""
    paper: str
    """Paper that describes it."""
    laws: MethodLaws
    """Properties that the method guarantees."""
    fields: list[MethodField]
    """Fields of its steps."""
    plugin: MethodOrigin = optional()
    """Origin of the method, if it is not built in."""
