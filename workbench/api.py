"""The Python API: a recipe that can be planned, run and loaded.

import workbench
recipe = workbench.load_recipe("recipes/starter-ties.yaml")
print(recipe.plan())
recipe.run(device="auto")
model = recipe.model()
model = workbench.load("runs/NAME-KEY/configuration")
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.recipe import recipe as recipes
from workbench.resolve.resolve import resolve
from workbench.resolve.resolved import Resolved

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from workbench.run.plan import RunPlan


@dataclass(frozen=True)
class LoadedRecipe:
    """A valid recipe. Its inputs are looked up when they are first needed."""

    recipe: recipes.Recipe

    @cached_property
    def resolved(self) -> Resolved:
        """Inputs and keys. Errors: missing or unfit inputs."""
        return resolve(self.recipe)

    def plan(self) -> RunPlan:
        """What `run` would do, from headers alone."""
        from workbench.bricks.hub import HEADERS
        from workbench.run.plan import plan

        return plan(resolve(self.recipe, HEADERS), self._runs)

    def run(self, device: str = "auto", out: str | Path | None = None) -> dict[str, Any]:
        """Write the configuration into its run directory, and into `out`; returns the `run --json` document."""
        from workbench.models.device import pick_device
        from workbench.run.execute import execute

        return execute(self.resolved, self._runs, device=pick_device(device), out=Path(out) if out else None)

    def model(self, device: str = "auto") -> PreTrainedModel:
        """The configuration as a live transformers model in its output dtype, without the disk."""
        from workbench.models.device import pick_device
        from workbench.run.materialize import materialize

        return materialize(self.resolved, pick_device(device))

    def swap(self, model: PreTrainedModel) -> AbstractContextManager[PreTrainedModel]:
        """Turn a live model of the same shapes into this configuration for a `with` block; exactly undone afterwards."""
        from workbench.run.materialize import swap

        return swap(model, self.resolved)

    @property
    def _runs(self) -> Path:
        return self.recipe.project / "runs"


def load_recipe(path: str | Path, settings: Iterable[str] = ()) -> LoadedRecipe:
    """Read and validate a recipe; `settings` override fields, as `--set` does: "mix.density=0.3"."""
    return LoadedRecipe(recipes.load_recipe(path, settings))


def load(path: str | Path, version: int | None = None, device: str = "auto") -> PreTrainedModel:
    """A configuration on disk as a live transformers model, its memory attached: `forward` and `generate` answer with the memory's facts.

    Args:
        path: A configuration directory, a run directory, or a model directory.
        version: Of the memory; the newest if omitted.
        device: auto, cpu, cuda or cuda:N.

    Errors: nothing of that kind there, a base that is gone or has changed, a version that does not exist.
    """
    from workbench.models.device import pick_device
    from workbench.run.materialize import materialize

    return materialize(_opened(path, version), pick_device(device))


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a configuration, run or model directory."""
    from workbench.models import tokenizer

    return tokenizer.load_tokenizer(_opened(path, None).tokenizer_path)


def _opened(path: str | Path, version: int | None) -> Resolved:
    from workbench.project import find_project
    from workbench.run.opened import resolve_model

    place = Path(path)
    return resolve_model(str(place), find_project(place.resolve() / "here"), version=version)[1]
