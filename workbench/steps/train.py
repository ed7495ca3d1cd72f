"""What steps that train take: a brick on the frozen current model, or what growth has added."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from workbench.steps.fields import Real
from workbench.steps.new_training import TRAINING_VERSION
from workbench.steps.step import BrickStep, KeyContext, Problem


class TrainMethod(BrickStep):
    """Trains a brick on the current model, which stays as it is, and adds what was learned."""

    kind = "train"
    verb = "grow"
    verb_order = 2
    version = TRAINING_VERSION

    weight: Real = 1.0
    """Of what was learned."""

    def inputs(self) -> list[str]:
        """Files that the method reads, relative to the project; their content is part of the step's key."""
        raise NotImplementedError

    def check_names(self, names: Sequence[str], known: Sequence[str]) -> Iterator[Problem]:
        """Yield bricks under `orthogonal_to` that the recipe does not have."""
        for problem in super().check_names(names, known):
            yield problem._replace(path=("orthogonal_to",))

    def check_kinds(self, kinds: Mapping[str, str]) -> Iterator[Problem]:
        """Yield bricks that have no A matrices to be orthogonal to."""
        for name, kind in kinds.items():
            if kind != "adapter":
                yield Problem(("orthogonal_to",), f"'{name}' is a {kind}, and has no A matrices", "Name LoRA bricks.")

    def key_parts(self, context: KeyContext) -> list[Any]:
        """Return the bricks that it is orthogonal to, its files' content, the seed, its id and the vocabulary."""
        asked = [context.seed, self.id, context.vocabulary(context.number)]
        return [context.bricks(self.names() or ()), context.files(self.inputs()), asked]

    def settings(self, seed: int) -> Any:
        """How it trains: a `workbench.train.TrainSpec`.

        Args:
            seed: The recipe's.
        """
        raise NotImplementedError

    def cost(self, project: Path) -> dict[str, Any]:
        """What `plan` says of it: plain data, `tokens` that go forward and back among it."""
        raise NotImplementedError
