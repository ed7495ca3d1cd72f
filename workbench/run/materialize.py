"""Configurations in memory: digests, live models, swapping of weights, and several configurations in one live model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from workbench.ground.errors import WorkbenchError
from workbench.ground.events import Events, no_events
from workbench.ground.files import json_digest, read_memo, write_memo
from workbench.ground.lazy import torch
from workbench.models.identity import computed_on
from workbench.models.layout import Model
from workbench.resolve.resolved import Resolved
from workbench.run.compose import Composition, compose
from workbench.weights.device import default_threads, each, exact
from workbench.weights.digests import tensor_digest, weights_digest
from workbench.weights.specs import load
from workbench.weights.writer import output_specs

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


def whole_digest(digest: str, composition: Composition) -> str:
    """Combine the digest of a configuration's weights with those of its memory and its router, if it has one."""
    beside = [part.digest for part in (composition.memory, composition.router) if part]
    return json_digest([digest, *beside]) if beside else digest


def configuration_digest(
    resolved: Resolved, device: torch.device, events: Events = no_events
) -> tuple[str, dict[str, torch.Tensor] | None]:
    """Return the digest of the configuration that a recipe produces, and its tensors if they were computed for it.

    The digest is cached by recipe key and type of device. It is computed in memory, from the bytes that a run on the device would
    write.
    """
    if known := known_digest(resolved.cache, resolved.key, device):
        return known, None
    with exact(device):
        composition = compose(resolved, device, events)
        model = composition.model
        tensors = _computed(model, resolved, device)
    resolved.check_inputs()
    digests = {name: tensor_digest(t) for name, t in tensors.items()}
    digest = whole_digest(weights_digest(output_specs(model.weights.specs, resolved.dtype), digests, model.config), composition)
    remember_digest(resolved, digest, device)
    return digest, tensors


def _computed(model: Model, resolved: Resolved, device: torch.device) -> dict[str, torch.Tensor]:
    """Compute a configuration's tensors; raise WorkbenchError if it is an adapter whose error `run` refuses too."""
    from workbench.adapters.approximate import AdaptedWeights
    from workbench.models.live import compute

    tensors = compute(model, resolved.dtype, device)
    if isinstance(model.weights, AdaptedWeights):
        model.weights.check_error()
    return tensors


def remember_digest(resolved: Resolved, digest: str, device: torch.device) -> None:
    """Cache the digest of a recipe's configuration for a device and these libraries, because their results differ in the last bits."""
    place = _digest_memo(resolved.cache, resolved.key)
    kind, libraries = computed_on(device)
    write_memo(place, {**(read_memo(place) or {}), kind: {"digest": digest, "libraries": libraries}})


def known_digest(cache: Path, key: str, device: torch.device | None = None) -> str | None:
    """Return the digest of a recipe's configuration if a run or an evaluation has computed it.

    Args:
        cache: The project's cache.
        key: The recipe's key.
        device: Return only what this type of device computed with the libraries that are installed. None is for readers of stored
            scores: it takes the device of this machine or, failing that, the only one that is known, such as that of a GPU machine
            which scored the project.
    """
    known = {kind: row for kind, row in (read_memo(_digest_memo(cache, key)) or {}).items() if isinstance(row, dict)}
    kind, libraries = computed_on(device)
    row = known.get(kind)
    if device is not None:
        row = row if row and row.get("libraries") == libraries else None
    elif row is None and len(known) == 1:
        row = next(iter(known.values()))
    return str(row["digest"]) if row and isinstance(row.get("digest"), str) else None


def _digest_memo(cache: Path, key: str) -> Path:
    return cache / "configurations" / f"{key}.json"


def materialize(
    resolved: Resolved, device: torch.device, tensors: dict[str, torch.Tensor] | None = None, events: Events = no_events
) -> PreTrainedModel:
    """Return a configuration as a live transformers model in the output dtype, with its memory or router attached.

    Args:
        resolved: The recipe.
        device: Device of the model.
        tensors: Tensors of the configuration, if they are already computed.
        events: Receives progress.
    """
    from workbench.models.live import live_model
    from workbench.run.memories import attach_memory
    from workbench.run.routers import attach_router

    with exact(device):
        composition = compose(resolved, device, events)
        model, memory, router = composition.model, composition.memory, composition.router
        live = live_model(model.config, tensors or _computed(model, resolved, device), resolved.tokenizer_path, device)
    live = attach_memory(live, memory.path, resolved.tokenizer_path, memory.version) if memory else live
    return attach_router(live, router, resolved.tokenizer_path) if router else live


@contextmanager
def swap(model: PreTrainedModel, resolved: Resolved, tensors: dict[str, torch.Tensor] | None = None) -> Iterator[PreTrainedModel]:
    """Give a live model the weights of another configuration for a `with` block, and restore its own weights bit for bit on exit.

    Args:
        model: A model from `materialize` whose parameters have the same names and shapes as the other configuration's.
        resolved: The other configuration. Its weights are computed in its output dtype, then converted to the model's dtype and
            device.
        tensors: Tensors of the other configuration, if they are already computed.

    Raises:
        WorkbenchError: If the other configuration has a memory or a router, or parameters differ in name or shape.
    """
    if beside := resolved.beside:
        raise WorkbenchError(
            f"recipe {resolved.recipe.name}: swap() exchanges only weights, but this configuration has a {beside}",
            "Use `materialize`.",
        )
    other = materialize(resolved, next(model.parameters()).device, tensors).to(model.dtype)
    mine, theirs = (dict(m.named_parameters()) for m in (model, other))
    if differing := sorted(
        {n for n in mine.keys() | theirs.keys() if n not in mine or n not in theirs or mine[n].shape != theirs[n].shape}
    ):
        raise WorkbenchError(
            f"recipe {resolved.recipe.name}: its parameters differ from the live model's ({differing[0]} and {len(differing) - 1} more)",
            "A configuration that grows or unties the base has other parameters: use `materialize`.",
        )
    both = SharedModel(model, [({name: parameter.data for name, parameter in theirs.items()}, model.generation_config)])
    try:
        yield both.holding(1)
    finally:
        both.holding(0)


class SharedModel:
    """A live model that holds one of several configurations at a time.

    Args:
        model: The live model with the weights of the first configuration.
        others: For each further configuration, its tensors by parameter where they differ from the first one's, and its generation settings.

    Attributes:
        bytes: Size of the tensors that are held beside the live model's.
    """

    def __init__(self, model: PreTrainedModel, others: Sequence[tuple[dict[str, Tensor], Any]]) -> None:
        self.model = model
        self._others, self._held = list(others), 0
        self.bytes = sum(tensor.nbytes for tensors, _ in others for tensor in tensors.values())

    def holding(self, number: int) -> PreTrainedModel:
        """Return the live model with the weights and generation settings of a configuration, by its number from 0."""
        if number != self._held:
            for other in (self._held, number):  # the first one's weights come back in between
                if other:
                    self._exchange(other - 1)
            self._held = number
        return self.model

    def _exchange(self, other: int) -> None:
        parameters, (tensors, settings) = dict(self.model.named_parameters()), self._others[other]
        for name, tensor in tensors.items():
            parameter = parameters[name]
            tensors[name], parameter.data = parameter.data, tensor
        self._others[other] = tensors, self.model.generation_config
        self.model.generation_config = settings


def shared(configurations: Sequence[Resolved], device: torch.device, events: Events = no_events) -> SharedModel | None:
    """Load configurations as one live model, or return None if their parameters do not allow it.

    All need the same base and config.json, parameters of the same names, shapes and dtypes, and neither a memory nor a router. The
    tensors of all but the first are computed one by one, so that at no time two models are in memory.

    Args:
        configurations: The configurations.
        device: Device of the model.
        events: Receives progress.
    """
    first, *rest = configurations
    if any(one.beside or one.base_digest != first.base_digest for one in configurations):
        return None
    with exact(device):
        compositions = [compose(resolved, device, events) for resolved in configurations]
        if any(c.model.config != compositions[0].model.config for c in compositions) or not _alike(compositions, configurations):
            return None
        live = materialize(first, device, events=events)
        parameters = dict(live.named_parameters())
        others = []
        for composition, resolved in zip(compositions[1:], rest, strict=True):
            places = _places(composition, parameters, resolved)
            if places is None:
                return None
            others.append((_differing(composition, places, parameters, resolved, device), _settings(resolved, live)))
    return SharedModel(live, others)


def _settings(resolved: Resolved, live: PreTrainedModel) -> Any:
    """Return the generation settings of a configuration; those of the live model if its folder has none."""
    from transformers import GenerationConfig

    file = resolved.tokenizer_path / "generation_config.json"
    return GenerationConfig.from_pretrained(resolved.tokenizer_path) if file.is_file() else live.generation_config


def _alike(compositions: Sequence[Composition], configurations: Sequence[Resolved]) -> bool:
    """Return True if all have tensors of the same names, shapes and dtypes on disk."""
    first, *rest = (output_specs(c.model.weights.specs, r.dtype) for c, r in zip(compositions, configurations, strict=True))
    return all(specs == first for specs in rest)


def _places(composition: Composition, parameters: dict[str, torch.nn.Parameter], resolved: Resolved) -> dict[str, str] | None:
    """Return tensor -> parameter; None if a parameter is made from several tensors, or a tensor is no whole parameter."""
    from workbench.models.live import live_names

    model = composition.model
    specs = output_specs(model.weights.specs, resolved.dtype)
    targets = {name: live for name, live in live_names(model.config, specs).items() if live}
    places = {name: live[0] for name, live in targets.items() if len(live) == 1}
    whole = len(places) == len(targets) and len(set(places.values())) == len(places) and set(places.values()) == set(parameters)
    shaped = whole and all(tuple(parameters[live].shape) == tuple(specs[name].shape) for name, live in places.items())
    return places if shaped else None


def _differing(
    composition: Composition,
    places: dict[str, str],
    parameters: dict[str, torch.nn.Parameter],
    resolved: Resolved,
    device: torch.device,
) -> dict[str, Tensor]:
    """Compute the tensors one by one, and return those that differ from the live parameters."""
    weights, lock = composition.model.weights, Lock()
    found: dict[str, Tensor] = {}

    def work(name: str) -> None:
        parameter = parameters[places[name]]
        tensor = load(weights, name, resolved.dtype or weights.specs[name].dtype, device).to(parameter.dtype)
        if not torch.equal(tensor, parameter.data):
            with lock:
                found[places[name]] = tensor

    each(work, places, default_threads(), device)
    return found
