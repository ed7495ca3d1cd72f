"""Closed-form edits as steps of a recipe on the project's base, and by their method alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from worlds.project import CPU

from workbench.edit.places.parts import Parts, padded, row_of
from workbench.edit.places.passes import keys_and_values, score
from workbench.facts.facts import Fact
from workbench.recipe.methods import methods
from workbench.steps import MethodContext

FIELDS = {
    "facts": "facts.jsonl", "layers": [1], "position": "subject_last", "contexts": 1, "statistics": "text.txt", "clamp": 20.0,
    "confidence": 0.3,
}  # fmt: skip
PROJECTION = "model.layers.1.mlp.down_proj.weight"


def step(name: str = "memit", **fields: Any) -> str:
    """A recipe of one edit, as text: JSON is YAML."""
    return f"steps: [{json.dumps({'edit': name, **FIELDS, **fields})}]\noutput: {{dtype: float32}}\n"


def solve(context: MethodContext, name: str = "memit", **fields: Any) -> Any:
    return methods()[f"edit:{name}"].model_validate({"edit": name, **FIELDS, **fields}).solve(context)  # type: ignore[attr-defined]


def projected(context: MethodContext, facts: list[Fact], update: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Return the inputs and outputs of layer 1's projection at the facts' lookups, and whether the model says their targets."""
    parts = Parts.find(context)
    batch = padded([row_of(f, context.tokenizer, "subject_last") for f in facts], CPU)
    with parts.changed({} if update is None else {1: update}):
        return *keys_and_values(parts, 1, batch), score(parts, batch)[1]


def counting(monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> list[Any]:
    """Calls of a function, which does its work all the same."""
    calls: list[Any] = []
    original = getattr(module, name)

    def counted(*args: Any) -> Any:
        calls.append(args)
        return original(*args)

    monkeypatch.setattr(module, name, counted)
    return calls


class Interrupt(Exception):
    """Stands for a key press that interrupts the process."""


def stopping(what: str, at: int) -> Callable[[int, int, str], None]:
    def progress(done: int, _total: int, text: str) -> None:
        if text.startswith(what) and done >= at:
            raise Interrupt

    return progress
