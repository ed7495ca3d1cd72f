"""Interface of training steps, which train a brick on the frozen current model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from workbench.steps.fields import Real
from workbench.steps.new_training import TRAINING_VERSION
from workbench.steps.step import BrickStep, KeyContext, Problem


class TrainMethod(BrickStep):
    """Trains a brick on the frozen current model and adds the trained update to the weights."""

    kind = "train"
    verb = "grow"
    verb_order = 2
    version = TRAINING_VERSION

    weight: Real = 1.0
    """Factor applied to the trained update when it is added."""

    @property
    def factor(self) -> float:
        """Factor applied to the trained update when it is added."""
        return self.weight

    @property
    def always_chat(self) -> bool:
        """True if the rows are conversations for sure; files are looked at."""
        return False

    def inputs(self) -> list[str]:
        """Return the files that the method reads, relative to the project. Their content is part of the step's key."""
        raise NotImplementedError

    def check_names(self, names: Sequence[str], known: Sequence[str]) -> Iterator[Problem]:
        """Yield an error for each brick under `orthogonal_to` that the recipe does not have."""
        for problem in super().check_names(names, known):
            yield problem._replace(path=("orthogonal_to",))

    def check_kinds(self, kinds: Mapping[str, str]) -> Iterator[Problem]:
        """Yield an error for each brick under `orthogonal_to` that is not an adapter."""
        for name, kind in kinds.items():
            if kind != "adapter":
                message = f"'{name}' is a {kind}, which has no LoRA A matrices to be orthogonal to"
                yield Problem(("orthogonal_to",), message, "List only LoRA bricks.")

    def key_parts(self, context: KeyContext) -> list[Any]:
        """Return the digests of bricks, files and the tokenizer, the seed, and the step's id, which initializes the adapter."""
        words = context.wording(None if self.always_chat else self.inputs(), context.number)
        settings = [context.seed, self.id, context.tokens(context.number), *words]
        return [context.bricks(self.names() or ()), context.files(self.inputs()), settings]

    def settings(self, seed: int) -> Any:
        """Return the `workbench.train.TrainSpec` of the step.

        Args:
            seed: Seed of the training.
        """
        raise NotImplementedError

    def cost(self, project: Path) -> dict[str, Any]:
        """Return the cost of the training as plain data for `plan`, with the number of trained tokens under `tokens`."""
        raise NotImplementedError
