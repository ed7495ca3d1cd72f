"""Modules of a live model that an adapter can update."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from workbench.errors import WorkbenchError
from workbench.lazy import torch
from workbench.models.architecture import is_conv1d, is_head_module
from workbench.models.layout import Model
from workbench.models.names import live_module

Kind = Literal["linear", "conv1d", "embedding", "other"]


@dataclass(frozen=True)
class Place:
    """Location of a base tensor in the live model: the module, its kind, and the parameter's name in it."""

    module: str
    kind: Kind
    parameter: str


@dataclass(frozen=True)
class Live:
    """The modules of a live model that adapters use.

    Attributes:
        places: Tensor of the base -> its place. Tensors that transformers fuses, splits or reshapes are not in it.
        modules: All module names.
        ends: Modules of the input embeddings and the head.
        head: The head's module if it shares the weight of the input embeddings, else None.
    """

    places: Mapping[str, Place]
    modules: frozenset[str]
    ends: frozenset[str]
    head: str | None

    @property
    def conv1d(self) -> bool:
        """True if the base stores its linear weights as [in, out]."""
        return any(place.kind == "conv1d" for place in self.places.values())


def live_places(model: Model) -> Live:
    """Build the model on the meta device and find the module of every tensor.

    Raises:
        WorkbenchError: If the model is not a causal language model of transformers.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(model.config), "utf-8")
        try:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            with torch.device("meta"):
                live = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        except ValueError:
            raise WorkbenchError(
                f"config.json: model_type {model.config.get('model_type')} is not a decoder-only language model of transformers",
                "Adapters can only be written for such models: use `output: {form: checkpoint}`.",
            ) from None
    modules = dict(live.named_modules())
    names = {id(module): name for name, module in modules.items()}
    first, last = live.get_input_embeddings(), live.get_output_embeddings()
    places = {}
    for name, spec in model.weights.specs.items():
        owner, _, parameter = name.rpartition(".")
        try:
            module = live_module(f"{owner}.weight", modules)
        except WorkbenchError:
            if not is_head_module(owner) or id(last) not in names:
                continue
            module = names[id(last)]  # GPT-NeoX's "embed_out" is "lm_head" in transformers 5
        tensor = dict(modules[module].named_parameters(recurse=False)).get(parameter)
        if tensor is not None and tuple(tensor.shape) == spec.shape:
            places[name] = Place(module, _kind(modules[module]) if parameter == "weight" else "other", parameter)
    ends = frozenset(names[id(module)] for module in (first, last) if id(module) in names)
    stored = {place.module for place in places.values()}
    tied = bool(getattr(live.config, "tie_word_embeddings", False)) and id(last) in names and names[id(last)] not in stored
    return Live(places, frozenset(modules), ends, names[id(last)] if tied else None)


def _kind(module: torch.nn.Module) -> Kind:
    if is_conv1d(module):
        return "conv1d"
    if isinstance(module, torch.nn.Linear):
        return "linear"
    return "embedding" if isinstance(module, torch.nn.Embedding) else "other"
