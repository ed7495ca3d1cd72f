"""Calibration prompts of the bricks and requests that no brick is for, with their copies, folds and features."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from typing import TYPE_CHECKING

from workbench.errors import WorkbenchError
from workbench.lazy import torch
from workbench.route.deciding.copies import COPIES, copies, negative_copies
from workbench.route.deciding.templates import FOLDS, folds
from workbench.steps.route import Prompts

if TYPE_CHECKING:
    from torch import Tensor

NEGATIVES = 700
"""Texts of the built-in requests that no brick is for, with their copies."""
FEWEST_PROMPTS, FEWEST_TEMPLATES = 16, 6
"""With fewer of a brick, the threshold is erratic."""
OUTSIDE, OWN = -1, -2
"""Labels of the built-in requests that no brick is for, and of the step's own."""


@dataclass(frozen=True)
class Samples:
    """Calibration prompts of all bricks and requests that no brick is for, each as it is and in copies.

    Attributes:
        bricks: The bricks.
        texts: [sample], all copies of all prompts.
        labels: [sample], the number of the brick, `OUTSIDE` or `OWN`.
        kinds: [sample], the number of the kind of copy in `COPIES`; 0 is the prompt as it is.
        by_template: [sample], the fold of the prompt's template; of a built-in request, that of its task.
        at_random: [sample], a fold that does not depend on the template.
        templates: Brick -> number of its templates.
        hidden: [sample, window, hidden size], see `Prompts`.
        measured: [sample, brick], see `Prompts`.
    """

    bricks: tuple[str, ...]
    texts: list[str]
    labels: Tensor
    kinds: Tensor
    by_template: Tensor
    at_random: Tensor
    templates: dict[str, int] = field(default_factory=dict)
    hidden: Tensor | None = None
    measured: Tensor | None = None

    @classmethod
    def of(cls, calibration: Mapping[str, Sequence[str]], negatives: Sequence[str] = ()) -> Samples:
        """Return the prompts with their copies and folds, without features.

        Args:
            calibration: Brick -> its prompts.
            negatives: The step's own requests that no brick is for; the built-in ones are added.

        Raises:
            WorkbenchError: If there is one brick only, a brick has no prompts, or a negative is a brick's prompt.
        """
        bricks = tuple(calibration)
        if len(bricks) < 2:
            raise WorkbenchError(f"route: expected two or more bricks, found {len(bricks)}", "Add bricks to the step.")
        for name, prompts in calibration.items():
            if not prompts:
                raise WorkbenchError(
                    f"route: brick '{name}' has no calibration prompts", f"Write {name}: {{calibration: FILE}} under `bricks`."
                )
            if both := sorted(set(prompts) & set(negatives)):
                raise WorkbenchError(
                    f"route: the prompt {both[0]!r} is one of brick '{name}' and one of `negatives`", "Remove it from one file."
                )
        texts: list[str] = []
        columns: list[tuple[int, int, int, int]] = []
        counts: dict[str, int] = {}

        def add(label: int, prompts: Sequence[str], fold_of: Sequence[int]) -> None:
            for number, prompt in enumerate(prompts):
                for kind, text in (copies if label >= 0 else negative_copies)(prompt, number).items():
                    texts.append(text)
                    columns.append((label, COPIES.index(kind), fold_of[number], number % FOLDS))

        for label, (name, prompts) in enumerate(calibration.items()):
            group_of, fold_of = folds(prompts)
            counts[name] = int(group_of.max()) + 1
            add(label, prompts, fold_of.tolist())
        rows = built_in()
        tasks = list(dict.fromkeys(task for task, _ in rows))
        add(OUTSIDE, [prompt for _, prompt in rows], [tasks.index(task) % FOLDS for task, _ in rows])
        if negatives:
            add(OWN, negatives, folds(negatives)[1].tolist())
        labels, kinds, by_template, at_random = torch.tensor(columns).T.contiguous()
        return cls(bricks, texts, labels, kinds, by_template, at_random, counts)

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
        """Return a mask of the bricks' samples of one kind of copy."""
        return self.inside & (self.kinds == COPIES.index(name))

    @property
    def inside(self) -> Tensor:
        """A mask of the samples that a brick is for."""
        return self.labels >= 0

    def warnings(self) -> list[str]:
        """Return a sentence for each brick whose prompts are too few, or too much alike, for a steady threshold."""
        found = []
        for label, name in enumerate(self.bricks):
            prompts = int((self.kind("plain") & (self.labels == label)).sum())
            if prompts < FEWEST_PROMPTS or self.templates[name] < FEWEST_TEMPLATES:
                found.append(
                    f"brick '{name}' has {prompts} calibration prompts in {self.templates[name]} templates; with fewer than "
                    f"{FEWEST_PROMPTS} prompts or {FEWEST_TEMPLATES} templates the threshold is erratic"
                )
        return found


def built_in() -> list[tuple[str, str]]:
    """Return (task, prompt) of the built-in requests that no brick is for."""
    lines = files("workbench.route.deciding").joinpath("negatives.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [(row["task"], row["prompt"]) for row in rows]
