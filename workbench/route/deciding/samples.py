"""Calibration prompts with their copies, folds and features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from workbench.errors import WorkbenchError
from workbench.lazy import torch
from workbench.route.deciding.copies import COPIES, copies
from workbench.route.deciding.templates import FOLDS, folds
from workbench.steps.route import Prompts

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Samples:
    """Calibration prompts of all bricks, each as it is and in copies.

    Attributes:
        bricks: The bricks.
        texts: [sample], all copies of all prompts.
        labels: [sample], the number of the brick.
        kinds: [sample], the number of the kind of copy in `COPIES`; 0 is the prompt as it is.
        unit: [sample], the number of what is held out together: a template, or a prompt if the brick has one template only.
        by_template: [sample], the fold of the prompt's template.
        at_random: [sample], a fold that does not depend on the template.
        templates: Brick -> number of its templates.
        hidden: [sample, hidden size], see `Prompts`.
        measured: [sample, brick], see `Prompts`.
    """

    bricks: tuple[str, ...]
    texts: list[str]
    labels: Tensor
    kinds: Tensor
    unit: Tensor
    by_template: Tensor
    at_random: Tensor
    templates: dict[str, int] = field(default_factory=dict)
    hidden: Tensor | None = None
    measured: Tensor | None = None

    @classmethod
    def of(cls, calibration: Mapping[str, Sequence[str]]) -> Samples:
        """Return the prompts with their copies and folds, without features.

        Args:
            calibration: Brick -> its prompts.

        Raises:
            WorkbenchError: If there is one brick only, or a brick without prompts.
        """
        bricks = tuple(calibration)
        if len(bricks) < 2:
            raise WorkbenchError(f"route: expected two or more bricks, found {len(bricks)}", "Add bricks to the step.")
        for name, prompts in calibration.items():
            if not prompts:
                raise WorkbenchError(
                    f"route: brick '{name}' has no calibration prompts", f"Write {name}: {{calibration: FILE}} under `bricks`."
                )
        texts: list[str] = []
        columns: list[tuple[int, int, int, int, int]] = []
        counts: dict[str, int] = {}
        for label, (name, prompts) in enumerate(calibration.items()):
            group_of, fold_of = folds(prompts)
            counts[name] = int(group_of.max()) + 1
            unit_of = group_of if counts[name] > 1 else torch.arange(len(prompts))
            first = max((column[2] for column in columns), default=-1) + 1
            for number, prompt in enumerate(prompts):
                for kind, text in enumerate(copies(prompt, number).values()):
                    texts.append(text)
                    columns.append((label, kind, first + int(unit_of[number]), int(fold_of[number]), number % FOLDS))
        labels, kinds, unit, by_template, at_random = torch.tensor(columns).T.contiguous()
        return cls(bricks, texts, labels, kinds, unit, by_template, at_random, counts)

    def with_features(self, hidden: Tensor | None, measured: Tensor | None = None) -> Samples:
        """Return the samples with their features."""
        return replace(self, hidden=hidden, measured=measured)

    def prompts(self, rows: Tensor) -> Prompts:
        """Return what a router sees of some samples.

        Args:
            rows: Numbers of samples.
        """
        hidden = None if self.hidden is None else self.hidden[rows]
        measured = None if self.measured is None else self.measured[rows]
        return Prompts([self.texts[i] for i in rows.tolist()], hidden, measured)

    def kind(self, name: str) -> Tensor:
        """Return a mask of the samples of one kind of copy."""
        return self.kinds == COPIES.index(name)
