"""Roles: bricks that belong to kinds of tokens, such as those of a modality or of a span between markers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, PrivateAttr, model_validator

from workbench.ground.errors import InvalidRecipeError, WorkbenchError, nearest
from workbench.models.architecture import is_embedding
from workbench.models.layout import Model
from workbench.models.prompts import load_tokenizer
from workbench.route.mixing.roles import Role, RolesRouter, restore_roles
from workbench.steps import Problem, RouteContext, RouteMethod, register
from workbench.steps.fields import Real, Strict, Whole
from workbench.steps.route import Router

if TYPE_CHECKING:
    from torch import Tensor

_SHOWN = 3  # tokens that an error names


class RoleTokens(Strict):
    """The tokens of one role."""

    tokens: list[str] = Field(default_factory=list)
    """Tokens as the tokenizer spells them, such as the placeholder of an image: ["<image>"]."""
    ids: list[Whole | tuple[Whole, Whole]] = Field(default_factory=list)
    """Token ids, and ranges [FIRST, END] of ids, without END."""
    between: tuple[str, str] | None = None
    """Two tokens that mark the beginning and the end of a span, such as ["<tool>", "</tool>"]. All tokens of the span have the role, the
    markers included. A span without an end goes on to the end of the text."""

    @model_validator(mode="after")
    def _check_fields(self) -> Self:
        if not (self.tokens or self.ids or self.between):
            raise ValueError(
                'expected the tokens of the role: tokens: ["<image>"], ids: [[FIRST, END]] or between: ["<tool>", "</tool>"]'
            )
        for entry in self.ids:
            if isinstance(entry, tuple) and entry[0] >= entry[1]:
                raise ValueError(f"ids: expected a range [FIRST, END] with FIRST below END, found {list(entry)}")
        return self


@register
class Roles(RouteMethod):
    """Let each brick act on the tokens of its role, and a weighted sum of bricks on text (Chen et al. 2024, DAMC).

    Text is every token without a role. Nothing is fitted. A text without role tokens is answered as by the sum of `text`, and a text
    of one role as by its brick alone. The paper's NaiveMC, where every brick acts on all tokens, is `merge: task_arithmetic`,
    `average` or `ties`.
    """

    paper = "Chen et al. 2024, Model Composition for Multimodal Large Language Models, arXiv 2402.12750"
    formula = "Δ(xₜ) = BᵣAᵣ xₜ where token t has the role of brick r, else Σ λᵢ BᵢAᵢ xₜ"
    reads_texts: ClassVar[bool] = False
    least_bricks: ClassVar[int] = 1

    route: Literal["roles"]
    roles: dict[str, RoleTokens] = Field(min_length=1)
    """Brick -> the tokens that it acts on, with weight 1."""
    text: dict[str, Real] = Field(default_factory=dict)
    """Brick -> its weight on tokens without a role. Bricks with a role can be among them, as can a merge of bricks: a recipe whose output
    is an adapter. Omitted: the base alone answers there."""

    _bound: tuple[Role, ...] = PrivateAttr(default=())
    _rows: int = PrivateAttr(default=0)

    def names(self) -> list[str]:
        """Return the bricks with a role, then those that act on text only."""
        return list(dict.fromkeys([*self.roles, *self.text]))

    def completed(self, known: Sequence[str]) -> Self:
        """Return the step itself: it names all its bricks."""
        return self

    def check_names(self, names: Sequence[str], known: Sequence[str]) -> Iterator[Problem]:
        """Yield the errors in the brick names of `roles` and `text`."""
        for field in ("roles", "text"):
            for name in getattr(self, field):
                if name not in known:
                    yield Problem((field, name), f"no brick '{name}' under `bricks`. {nearest(name, known)}")

    def bind(self, base: Model, tokenizer: Path, project: Path, cache: Path) -> tuple[Self, Path]:
        """Return the step with the ids of all roles."""
        try:
            known: dict[str, int] = load_tokenizer(tokenizer).get_vocab()
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise WorkbenchError(
                f"route {self.name}: the model has no tokenizer that transformers can load from {tokenizer} ({str(error)[:120]})",
                "Roles are found by tokens: use a base with its tokenizer's files.",
            ) from None
        rows = next((spec.rows for name, spec in base.weights.specs.items() if is_embedding(name)), len(known))
        roles = tuple(_role(name, tokens, known, rows) for name, tokens in self.roles.items())
        _check_apart(roles, {number: token for token, number in known.items()})
        bound = self.model_copy()
        bound._bound, bound._rows = roles, rows
        return bound, tokenizer

    def fit(self, context: RouteContext) -> Router:
        """Return the router; nothing is measured."""
        return RolesRouter.of(context.bricks, self._bound, self.text, self._rows)

    @classmethod
    def restore(cls, settings: Mapping[str, object], tensors: Mapping[str, Tensor]) -> Router:
        """Return the router from its saved state."""
        return restore_roles(settings, tensors)


def _role(brick: str, tokens: RoleTokens, known: Mapping[str, int], rows: int) -> Role:
    """Return the ids of a role."""
    where = f"route roles: the role of brick '{brick}'"

    def number(token: str) -> int:
        if token not in known:
            raise InvalidRecipeError(
                f"{where} names the token {token!r}, which the vocabulary does not have. {nearest(token, known)}",
                "Write the token as tokenizer.json spells it, or add it to the model with `grow: vocabulary` before bricks are trained.",
            )
        return known[token]

    ids = {number(token) for token in tokens.tokens}
    for entry in tokens.ids:
        first, end = entry if isinstance(entry, tuple) else (entry, entry + 1)
        if first < 0 or end > rows:
            raise InvalidRecipeError(
                f"{where} names the ids {first} to {end - 1}, but the model has {rows:,} tokens",
                f"Ids start from 0 and end at {rows - 1}; a range [FIRST, END] does not include END.",
            )
        ids |= set(range(first, end))
    return Role(brick, tuple(sorted(ids)), (number(tokens.between[0]), number(tokens.between[1])) if tokens.between else None)


def _check_apart(roles: Sequence[Role], tokens: Mapping[int, str]) -> None:
    """Raise WorkbenchError if two roles have the same token, as a token of their own or as a marker of their spans."""
    for i, one in enumerate(roles):
        for other in roles[i + 1 :]:
            if both := sorted({*one.ids, *(one.span or ())} & {*other.ids, *(other.span or ())}):
                named = ", ".join(f"{tokens.get(number, '?')!r} ({number})" for number in both[:_SHOWN])
                raise InvalidRecipeError(
                    f"route roles: the roles of '{one.brick}' and '{other.brick}' overlap: both have {named}"
                    + (f" and {len(both) - _SHOWN} other tokens" if len(both) > _SHOWN else ""),
                    "A token belongs to one role. Remove it from one of the two.",
                )
