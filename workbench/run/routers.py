"""Routers on disk and on live models.

routing.json          the router's settings, the bricks with their digests, digests of the calibration prompts, and the record
router.safetensors    the router's tensors
adapters/NAME/        the bricks, as PEFT adapters (in a configuration directory; the cache refers to the bricks' own directories)
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from workbench.adapters.linear import linear_factors, ranks_of
from workbench.adapters.read import CONFIG, WEIGHTS, Adapter
from workbench.bricks.brick import Brick
from workbench.bricks.hub import CARD
from workbench.errors import WorkbenchError
from workbench.files import json_digest, read_json
from workbench.models.prompts import load_tokenizer
from workbench.project import find_project
from workbench.recipe.methods import method
from workbench.resolve.output import RouterAt
from workbench.results import Number, Part, Result, absent
from workbench.steps import RouteMethod
from workbench.steps.fields import NAME
from workbench.steps.route import Router
from workbench.weights.digests import tensor_digest

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor
    from transformers import PreTrainedModel


RECORD, TENSORS, ADAPTERS = "routing.json", "router.safetensors", "adapters"
FORMAT = 1
AGAIN = "Run the recipe again: `workbench run` writes all files of a routed configuration."
_COPIED = (CONFIG, WEIGHTS, CARD, "README.md")


def prompt_digest(text: str) -> str:
    """Return the digest of a prompt; upper case and white space do not count."""
    return json_digest(" ".join(text.split()).casefold())


class RouterBrick(Part):
    """A brick of a router, in routing.json."""

    name: str = Field(pattern=NAME)
    """Name of the brick."""
    adapter: str = ""
    """Its directory within a configuration."""
    digest: str | None = None
    """Digest of its content."""
    modules: int = 0
    """Number of modules that it updates."""
    ranks: list[int] = []
    """Ranks of its updates, each once."""
    description: str | None = absent()
    """A line that says what it does."""


class RouterPrompts(Part):
    """Calibration prompts of a brick, in routing.json."""

    name: str = Field(pattern=NAME)
    """Name of the brick."""
    file: str = ""
    """Their files, for messages."""
    files: list[str] = []
    """Their files, relative to the project."""
    prompts: list[str]
    """Digest of each prompt, for the check that no prompt is scored."""

    @property
    def where(self) -> str:
        """Files and brick, for messages."""
        return f"{self.file} (brick '{self.name}')"


class RouterRecord(Result):
    """Content of routing.json."""

    format: int = FORMAT
    """Version of the format."""
    method: str
    """Method of the router."""
    method_version: int | None = None
    """Version of the method."""
    layer: int | None = None
    """Number of decoder blocks whose output is pooled; null for routers that read no hidden states."""
    window: int = 0
    """Number of last tokens that are pooled."""
    threshold: Number | None = None
    """Smallest confidence with which a prompt goes to a brick; null if no prompt goes to the base."""
    settings: dict[str, object]
    """What the method restores the router from, beside the tensors."""
    tensors: dict[str, str]
    """Tensor of router.safetensors -> its digest."""
    bricks: list[RouterBrick]
    """The bricks, in the router's order."""
    calibration: list[RouterPrompts]
    """Prompts of the bricks; empty for methods that read none."""
    step: dict[str, object] = {}
    """The route step."""
    seed: int = 0
    """The recipe's seed."""
    base: str = ""
    """Digest of the recipe's base."""
    solved_on: str = ""
    """Digest of the weights of the model that the router was fitted on."""
    record: dict[str, object]
    """Measurements of the fit, which depend on the method."""


@dataclass(frozen=True)
class SavedRouter:
    """A directory with a router. Properties are cached, so create a new object after a change."""

    path: Path

    @cached_property
    def record(self) -> RouterRecord:
        """Content of routing.json. Raises WorkbenchError if the file is missing, damaged or of another format."""
        content = read_json(self.path / RECORD)
        if content is None:
            raise WorkbenchError(
                f"{self.path} has no router: {RECORD} is missing or not a JSON object",
                "`workbench run` writes a router if the recipe ends in a route step.",
            )
        if content.get("format") != FORMAT:
            raise WorkbenchError(
                f"{self.path / RECORD}: has format {str(content.get('format'))[:20]}, this version reads format {FORMAT}", AGAIN
            )
        return RouterRecord.of(content, str(self.path / RECORD), AGAIN)

    @property
    def bricks(self) -> list[str]:
        """The bricks, in the router's order."""
        return [row.name for row in self.record.bricks]

    @cached_property
    def router(self) -> Router:
        """The router, which decides exactly as the fitted one.

        Raises:
            WorkbenchError: If its files are damaged or do not belong together, or its method no longer exists.
        """
        tensors, record = self._tensors(), self.record
        stored = {name: tensor_digest(tensor) for name, tensor in tensors.items()}
        if stored != record.tensors:
            differing = sorted(n for n in stored.keys() | record.tensors if stored.get(n) != record.tensors.get(n))
            raise WorkbenchError(
                f"{self.path / TENSORS}: tensor '{differing[0]}' is not the one that {RECORD} was written with: the file belongs to "
                "another router, or has changed",
                AGAIN,
            )
        kind = method(RouteMethod, record.method, find_project(self.path.resolve() / RECORD), self.path / RECORD)
        if record.method_version != kind.version:
            raise WorkbenchError(
                f"{self.path / RECORD}: the router was fitted by version {record.method_version} of '{kind.name}', and this is "
                f"version {kind.version}, whose confidences and threshold differ",
                AGAIN,
            )
        router = kind.restore(record.settings, tensors)
        if list(router.bricks) != self.bricks:
            raise WorkbenchError(
                f"{self.path / RECORD}: the router chooses among {', '.join(router.bricks)}, but the bricks are {', '.join(self.bricks)}",
                AGAIN,
            )
        return router

    def _tensors(self) -> dict[str, Tensor]:
        """Return the tensors of router.safetensors."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(self.path / TENSORS)
        except FileNotFoundError:
            raise WorkbenchError(f"{self.path}: has no {TENSORS}", AGAIN) from None
        except SafetensorError as error:
            raise WorkbenchError(f"{self.path / TENSORS}: not a safetensors file: {str(error)[:200]}", AGAIN) from None

    @property
    def digest(self) -> str:
        """Digest of everything that decides which bricks act, and of the bricks."""
        record = self.record
        bricks = [[row.name, row.digest] for row in record.bricks]
        return json_digest([record.method, record.method_version, record.settings, record.tensors, bricks])

    def calibration(self) -> dict[str, str]:
        """Return digest of each calibration prompt -> the file that has it and its brick, for messages."""
        return {digest: row.where for row in self.record.calibration for digest in row.prompts}

    def at(self, adapters: Mapping[str, Path] | None = None) -> RouterAt:
        """Return the router with its bricks, whose content is compared with the record.

        Args:
            adapters: Brick -> directory of its adapter; None stands for the directory's own `adapters`.

        Raises:
            WorkbenchError: If a brick is missing or has changed.
        """
        places = {name: (adapters or {}).get(name, self.path / ADAPTERS / name) for name in self.bricks}
        for row in self.record.bricks:
            place = places[row.name]
            digest = Brick(row.name, "adapter", place).digest(None)
            if digest != row.digest:
                raise WorkbenchError(
                    f"{place}: brick '{row.name}' is not the one that the router was fitted on (digest {digest[:10]}, "
                    f"recorded {str(row.digest)[:10]})",
                    f"Restore the adapter. {AGAIN}",
                )
        return RouterAt(self.path, places, self.digest)


def brick_rows(adapters: Mapping[str, Adapter], descriptions: Mapping[str, str]) -> list[RouterBrick]:
    """Return `bricks` of routing.json.

    Args:
        adapters: Brick -> adapter, in the router's order.
        descriptions: Brick -> description, for bricks that have one.
    """
    rows = []
    for name, adapter in adapters.items():
        ranks = ranks_of(adapter)
        rows.append(
            RouterBrick(
                name=name,
                adapter=f"{ADAPTERS}/{name}",
                digest=Brick(name, "adapter", adapter.path).digest(None),
                modules=len(ranks),
                ranks=sorted(set(ranks.values())),
                description=descriptions.get(name),
            )
        )
    return rows


def calibration_rows(prompts: Mapping[str, Sequence[str]], files: Callable[[str], Sequence[str]]) -> list[RouterPrompts]:
    """Return `calibration` of routing.json.

    Args:
        prompts: Brick -> its prompts.
        files: Returns the files of a brick's prompts.
    """
    return [
        RouterPrompts(
            name=name, file=", ".join(files(name)), files=list(files(name)), prompts=[prompt_digest(text) for text in texts]
        )
        for name, texts in prompts.items()
        if texts
    ]


def write_router(at: RouterAt, out: Path) -> int:
    """Copy a router and its bricks into a configuration directory, and return the size of the bricks in bytes."""
    for name in (RECORD, TENSORS):
        shutil.copyfile(at.path / name, out / name)
    shutil.rmtree(out / ADAPTERS, ignore_errors=True)
    for brick, place in at.adapters.items():
        (out / ADAPTERS / brick).mkdir(parents=True)
        for name in _COPIED:
            if (place / name).is_file():
                shutil.copyfile(place / name, out / ADAPTERS / brick / name)
    return sum((out / ADAPTERS / brick / WEIGHTS).stat().st_size for brick in at.adapters)


def factors_of(adapters: Mapping[str, Path]) -> dict[str, dict[str, tuple[Tensor, Tensor]]]:
    """Return brick -> live module -> (A [rank, in], B [out, rank]) of adapters on disk."""
    return {name: linear_factors(Adapter(place, f"brick '{name}'")) for name, place in adapters.items()}


def attach_router(model: PreTrainedModel, at: RouterAt, tokenizer_path: Path) -> PreTrainedModel:
    """Make a live model choose among bricks for each prompt.

    Returns:
        The model, with the routing as `model.routing`.
    """
    from workbench.route.mixing.live import attach

    saved = SavedRouter(at.path)
    routing = attach(model, load_tokenizer(tokenizer_path), saved.router, factors_of(at.adapters))
    routing.calibration = saved.calibration()
    return model
