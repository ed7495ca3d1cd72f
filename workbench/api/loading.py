"""Load, plan and run recipes, and load their results."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from workbench.recipe import recipe as recipes
from workbench.resolve.resolve import resolve
from workbench.resolve.resolved import Resolved

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from workbench.run.plan import RunPlan
    from workbench.run.record import RunResult


@dataclass(frozen=True)
class LoadedRecipe:
    """A valid recipe. Its inputs are located and checked when they are first needed."""

    recipe: recipes.Recipe

    @cached_property
    def resolved(self) -> Resolved:
        """The recipe with its inputs and keys.

        Raises:
            WorkbenchError: If an input is missing or does not fit the base.
        """
        return resolve(self.recipe)

    def plan(self) -> RunPlan:
        """Predict what `run` would do: steps, bytes, memory, time and problems. Reads only file headers.

        Raises:
            WorkbenchError: If an input is missing or does not fit the base.
        """
        from workbench.bricks.hub import HEADERS
        from workbench.run.plan import plan

        return plan(resolve(self.recipe, HEADERS), self._runs)

    def run(self, device: str = "auto", out: str | Path | None = None) -> RunResult:
        """Run the recipe and write the result to its run directory. A finished run is reused, an interrupted run is resumed.

        Args:
            device: auto, cpu, cuda or cuda:N.
            out: A new or empty directory that gets a copy of the result.

        Returns:
            The result, whose fields `workbench run --json` prints.

        Raises:
            WorkbenchError: If an input is missing or does not fit, or a check of the result fails.
        """
        from workbench.run.device import Work, device_of_run
        from workbench.run.execute import execute

        return execute(self.resolved, self._runs, Work(device_of_run(device, self.resolved)), out=Path(out) if out else None)

    def model(self, device: str = "auto") -> PreTrainedModel:
        """Compose the configuration in memory and return it as a transformers model in the output dtype.

        Args:
            device: auto, cpu, cuda or cuda:N.

        Raises:
            WorkbenchError: If an input is missing or does not fit the base.
        """
        from workbench.models.identity import pick_device
        from workbench.run.materialize import materialize

        return materialize(self.resolved, pick_device(device))

    def swap(self, model: PreTrainedModel) -> AbstractContextManager[PreTrainedModel]:
        """Return a context manager that puts this configuration's weights into a live model and restores its own on exit.

        Args:
            model: A transformers model with the same parameter names and shapes, such as one from `model()`.

        Raises:
            WorkbenchError: If the recipe ends in a memory or router, or parameter names or shapes differ.
        """
        from workbench.run.materialize import swap

        return swap(model, self.resolved)

    @property
    def _runs(self) -> Path:
        from workbench.ground.project import runs_of

        return runs_of(self.recipe.project)


def load_recipe(path: str | Path, settings: Iterable[str] = ()) -> LoadedRecipe:
    """Read and validate a recipe.

    Args:
        path: The recipe file, or any name that `workbench run` takes, such as "mine[lambda=0.5]".
        settings: Overrides of fields as in `--set`, such as "mix.density=0.3".

    Raises:
        WorkbenchError: If the name means nothing or two things, the file cannot be read, a field is invalid, or an override names an
            unknown step or field.
    """
    from workbench.api.naming import load_named
    from workbench.api.scoring import warn

    return LoadedRecipe(load_named(str(path), tuple(settings), warn))


def load(path: str | Path, version: int | None = None, device: str = "auto") -> PreTrainedModel:
    """Load a configuration from disk as a transformers model with its memory or router attached.

    `forward` and `generate` of the model use the facts of the memory, or the bricks that the router chooses (`model.routing`).

    Args:
        path: A configuration directory, a run directory, or a model directory.
        version: Version of the memory; the newest if omitted.
        device: auto, cpu, cuda or cuda:N.

    Raises:
        WorkbenchError: If the directory is none of these, its base is missing or has changed, or the version does not exist.
    """
    from workbench.models.identity import pick_device
    from workbench.run.materialize import materialize

    return materialize(_resolve_model(path, version), pick_device(device))


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a configuration, run or model directory.

    Args:
        path: A configuration directory, a run directory, or a model directory.

    Raises:
        WorkbenchError: If the directory is none of these, or its base is missing or has changed.
    """
    from workbench.models import prompts

    return prompts.load_tokenizer(_resolve_model(path, None).tokenizer_path)


def _resolve_model(path: str | Path, version: int | None) -> Resolved:
    from workbench.ground.project import find_project
    from workbench.run.opened import resolve_model

    directory = Path(path)
    return resolve_model(str(directory), find_project(directory.resolve() / "here"), version=version).resolved
