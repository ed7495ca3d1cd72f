"""Two configurations in one live model: only the weights in which they differ are held twice."""

from __future__ import annotations

from threading import Lock
from typing import TYPE_CHECKING, Any

from workbench.events import Events, no_events
from workbench.lazy import torch
from workbench.models.live import live_names
from workbench.resolve.resolved import Resolved
from workbench.run.compose import Composition, compose
from workbench.run.materialize import materialize
from workbench.weights.device import default_threads, each, exact
from workbench.weights.specs import load
from workbench.weights.writer import output_specs

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


class SharedModel:
    """A live model that holds one of two configurations at a time.

    Args:
        model: The live model with the weights of the first configuration.
        other: Tensors of the second configuration by parameter, where they differ.
        settings: Generation settings of the second configuration.

    Attributes:
        bytes: Size of the tensors that are held twice.
    """

    def __init__(self, model: PreTrainedModel, other: dict[str, Tensor], settings: Any) -> None:
        self.model = model
        self._other, self._settings, self._held = other, settings, 0
        self.bytes = sum(tensor.nbytes for tensor in other.values())

    def holding(self, number: int) -> PreTrainedModel:
        """Return the live model with the weights and generation settings of configuration 0 or 1."""
        if number != self._held:
            parameters = dict(self.model.named_parameters())
            for name, tensor in self._other.items():
                parameter = parameters[name]
                self._other[name], parameter.data = parameter.data, tensor
            self.model.generation_config, self._settings = self._settings, self.model.generation_config
            self._held = number
        return self.model


def shared(first: Resolved, second: Resolved, device: torch.device, events: Events = no_events) -> SharedModel | None:
    """Load two configurations as one live model, or return None if their parameters do not allow it.

    Both need the same base and config.json, parameters of the same names, shapes and dtypes, and neither a memory nor a router. The
    second one's tensors are computed one by one, so that at no time two models are in memory.

    Args:
        first: The first configuration.
        second: The second configuration.
        device: Device of the model.
        events: Receives progress.
    """
    if first.beside or second.beside or first.base_digest != second.base_digest:
        return None
    with exact(device):
        compositions = [compose(resolved, device, events) for resolved in (first, second)]
        if compositions[0].model.config != compositions[1].model.config or not _alike(compositions, (first, second)):
            return None
        live = materialize(first, device, events=events)
        parameters = dict(live.named_parameters())
        places = _places(compositions[1], parameters, second)
        if places is None:
            return None
        other = _differing(compositions[1], places, parameters, second, device)
    from transformers import GenerationConfig

    file = second.tokenizer_path / "generation_config.json"
    settings = GenerationConfig.from_pretrained(second.tokenizer_path) if file.is_file() else live.generation_config
    return SharedModel(live, other, settings)


def _alike(compositions: list[Composition], both: tuple[Resolved, Resolved]) -> bool:
    """Return True if both have tensors of the same names, shapes and dtypes on disk."""
    first, second = (output_specs(c.model.weights.specs, r.dtype) for c, r in zip(compositions, both, strict=True))
    return first == second


def _places(composition: Composition, parameters: dict[str, torch.nn.Parameter], resolved: Resolved) -> dict[str, str] | None:
    """Return tensor -> parameter; None if a parameter is made from several tensors, or a tensor is no whole parameter."""
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
