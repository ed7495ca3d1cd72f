"""Routers on disk and on live models.

routing.json               the router's settings, the bricks with their digests, digests of the calibration prompts, and the record
router.safetensors         the router's tensors
calibration.safetensors    the states of the calibration prompts, from which `route add` and `route rm` fit the router again; no texts
adapters/NAME/             the bricks, as PEFT adapters (in a configuration directory; the cache refers to the bricks' own directories)
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from workbench.adapters.linear import linear_factors, ranks_of
from workbench.adapters.read import CONFIG, WEIGHTS, Adapter
from workbench.bricks.brick import Brick
from workbench.ground.errors import WorkbenchError
from workbench.ground.files import json_digest, read_json, write_json
from workbench.ground.foreign_names import CARD
from workbench.ground.project import find_project
from workbench.ground.results import JsonObject, Number, Result, absent
from workbench.models.prompts import load_tokenizer
from workbench.recipe.methods import method
from workbench.resolve.output import RouterAt
from workbench.steps import RouteMethod
from workbench.steps.fields import NAME
from workbench.steps.route import Router
from workbench.weights.digests import tensor_digest
from workbench.weights.header import save_tensors

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor
    from transformers import PreTrainedModel


RECORD, TENSORS, CALIBRATION, ADAPTERS = "routing.json", "router.safetensors", "calibration.safetensors", "adapters"
FORMAT = 1
AGAIN = "Run the recipe again: `workbench run` writes all files of a routed configuration."
_COPIED = (CONFIG, WEIGHTS, CARD, "README.md")


def prompt_digest(text: str) -> str:
    """Return the digest of a prompt; upper case and white space do not count."""
    return json_digest(" ".join(text.split()).casefold())


class RouterBrick(JsonObject):
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


class RouterPrompts(JsonObject):
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


class RouterChange(JsonObject):
    """A brick that was added to a router, or removed from it, after `run`."""

    action: Literal["add", "rm"]
    """What was done."""
    brick: str
    """Name of the brick."""
    digest: str | None
    """Digest of its content."""
    time: str
    """When."""
    threshold: Number | None
    """Smallest confidence with which a prompt goes to a brick since then."""


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
    file: str = TENSORS
    """File of the router's tensors."""
    tensors: dict[str, str]
    """Its tensors -> their digests."""
    states_file: str = CALIBRATION
    """File of the states that the router was fitted on."""
    states: dict[str, str] = {}
    """Its tensors -> their digests; empty for methods that read no states."""
    changes: list[RouterChange] = []
    """Bricks that were added and removed since the fit of the recipe."""
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

    @property
    def ties(self) -> list[list[str]]:
        """Groups of bricks that prompts do not tell apart."""
        found = self.record.settings.get("ties")
        return found if isinstance(found, list) else []

    @cached_property
    def router(self) -> Router:
        """The router, which decides exactly as the fitted one.

        Raises:
            WorkbenchError: If its files are damaged or do not belong together, or its method no longer exists.
        """
        record, kind = self.record, self.kind
        router = kind.restore(record.settings, self._tensors(record.file, record.tensors))
        if list(router.bricks) != self.bricks:
            raise WorkbenchError(
                f"{self.path / RECORD}: the router chooses among {', '.join(router.bricks)}, but the bricks are {', '.join(self.bricks)}",
                AGAIN,
            )
        return router

    @cached_property
    def kind(self) -> type[RouteMethod]:
        """The method. Raises WorkbenchError if it no longer exists, or its version is another."""
        record = self.record
        kind = method(RouteMethod, record.method, find_project(self.path.resolve() / RECORD), self.path / RECORD)
        if record.method_version != kind.version:
            raise WorkbenchError(
                f"{self.path / RECORD}: the router was fitted by version {record.method_version} of '{kind.name}', and this is "
                f"version {kind.version}, whose confidences and threshold differ",
                AGAIN,
            )
        return kind

    def states(self) -> dict[str, Tensor]:
        """Return the tensors that the router was fitted on; empty for methods that read no states."""
        return self._tensors(self.record.states_file, self.record.states) if self.record.states else {}

    def _tensors(self, name: str, expected: Mapping[str, str]) -> dict[str, Tensor]:
        """Return the tensors of a file, which have the digests of the record."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            tensors = load_file(self.path / name)
        except FileNotFoundError:
            raise WorkbenchError(f"{self.path}: has no {name}", AGAIN) from None
        except SafetensorError as error:
            raise WorkbenchError(f"{self.path / name}: not a safetensors file: {str(error)[:200]}", AGAIN) from None
        stored = {tensor: tensor_digest(values) for tensor, values in tensors.items()}
        if stored != expected:
            differing = sorted(n for n in stored.keys() | expected if stored.get(n) != expected.get(n))
            raise WorkbenchError(
                f"{self.path / name}: tensor '{differing[0]}' is not the one that {RECORD} was written with: the file belongs to "
                "another router, or has changed",
                AGAIN,
            )
        return tensors

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


def put_router(folder: Path, router: Router, record: RouterRecord, mark: str = "") -> RouterRecord:
    """Write a fitted router into a directory, and return its record.

    Args:
        folder: The directory.
        router: The router.
        record: Entries that do not come from the router.
        mark: Part of the names of the files of tensors. With a new one, who reads the directory meanwhile, or after a kill, finds the
            earlier router whole, because routing.json is written last.
    """
    from workbench.route.deciding.pooling import PooledRouter

    samples = router.samples if isinstance(router, PooledRouter) else None
    parts = {
        f"router{mark}.safetensors": router.tensors(),
        f"calibration{mark}.safetensors": samples.tensors() if samples else {},
    }
    digests = []
    for name, tensors in parts.items():
        state = {key: tensor.detach().cpu().contiguous() for key, tensor in sorted(tensors.items())}
        digests.append({key: tensor_digest(tensor) for key, tensor in state.items()})
        if state or name == TENSORS:
            save_tensors(state, folder / name)
    file, states_file = parts
    own = {"layer": router.layer, "window": router.window, "threshold": router.threshold, "settings": router.settings()}
    files = {"file": file, "tensors": digests[0], "states_file": states_file, "states": digests[1]}
    found = RouterRecord.model_validate({**record.to_dict(), **own, **files, "record": router.record})
    write_json(folder / RECORD, found.to_dict(), indent=2)
    return found


def write_router(at: RouterAt, out: Path) -> int:
    """Copy a router and its bricks into a configuration directory, and return the size of the bricks in bytes."""
    record = SavedRouter(at.path).record
    for name in (RECORD, record.file, *([record.states_file] if record.states else [])):
        shutil.copyfile(at.path / name, out / name)
    shutil.rmtree(out / ADAPTERS, ignore_errors=True)
    for brick, place in at.adapters.items():
        copy_adapter(place, out / ADAPTERS / brick)
    return sum((out / ADAPTERS / brick / WEIGHTS).stat().st_size for brick in at.adapters)


def copy_adapter(place: Path, out: Path) -> None:
    """Copy the files of an adapter into a directory, in the place of what an earlier call left there."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    for name in _COPIED:
        if (place / name).is_file():
            shutil.copyfile(place / name, out / name)


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
