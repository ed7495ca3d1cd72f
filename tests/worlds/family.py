"""A tiny model of a family of transformers in a project, as the walk over all families builds it, and how an operation on it ends."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from worlds.causal import causal_types, tiny_json
from worlds.project import Project
from worlds.tiny import save_tokenizer

from workbench.ground.errors import WorkbenchError
from workbench.models.skeleton import parse_config, part_for

LARGEST = 10_000_000
"""Parameters of a model that counts as tiny."""
CLOSE = 1e-5
"""Largest difference from the direct computation, relative to the largest number (at least 1), in float32."""


@dataclass(frozen=True)
class Outcome:
    """The end of an operation.

    Attributes:
        status: "works": its number is right; "refused": a WorkbenchError; "untested": transformers itself cannot run the model;
            "wrong": anything else.
        said: The number that was checked, the message of the refusal, or what went wrong.
    """

    status: str
    said: str


@dataclass(frozen=True)
class Family:
    """A tiny base of one class in a project folder.

    Attributes:
        kind: The class of transformers.
        causal: The class of its causal language model, which is another one for some multimodal models.
        project: The folder, with base/.
        base: The live base.
    """

    kind: Any
    causal: Any
    project: Project
    base: Any


class NotTinyError(Exception):
    """The class cannot be built tiny from its configuration; the message says why."""


class WrongError(Exception):
    """A number is not that of the direct computation."""


def class_of(kind: str, name: str = "") -> Any:
    """Return the class that transformers takes for a type of model, or a class by its name."""
    import transformers
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    return getattr(transformers, name) if name else MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[kind]]


def build(kind: str, name: str, folder: Path, fields: Mapping[str, Any] | None = None) -> Family:
    """Build a tiny base in a folder: random weights, norms and biases random too.

    Args:
        kind: The type of model.
        name: The class; empty takes its causal language model.
        folder: The project folder.
        fields: Fields of config.json that replace those of `tiny_json`, in its parts too.

    Raises:
        NotTinyError: If transformers cannot build it, or only with more parameters.
    """
    try:
        data = {**with_fields(tiny_json(kind), fields or {}), "architectures": [name or class_of(kind).__name__]}
        made = class_of(kind, name)
        parsed = part_for(made, parse_config(data))
        with torch.device("meta"):
            count = sum(p.numel() for p in made._from_config(parsed).parameters())
        if count > LARGEST:
            raise NotTinyError(f"its smallest configuration here has {count / 1e6:,.0f} M parameters")
        torch.manual_seed(0)
        model = made._from_config(parsed, dtype=torch.float32).eval()
    except NotTinyError:
        raise
    except Exception as error:  # noqa: BLE001  every error of transformers' constructors means the same: this class cannot be built
        raise NotTinyError(f"{type(error).__name__}: {' '.join(str(error).split())[:160]}") from None
    with torch.no_grad():
        for label, parameter in model.named_parameters():
            if parameter.dim() == 1:  # as in `save_dense`: a norm behind a projection lets a change in front of it through
                wide = 3.0 if re.search("post_(feedforward|mlp)_layernorm", label) else 0.0
                parameter.add_(torch.randn_like(parameter) * 0.1 + wide)
        for tensor in model.state_dict().values():  # limits of clamps are infinite until they are trained
            if tensor.is_floating_point() and not tensor.isfinite().all():
                tensor.copy_(tensor.nan_to_num(nan=0.1, posinf=50.0, neginf=-50.0))
    (folder / "recipes").mkdir(parents=True)
    try:
        save(model, folder / "base")
    except Exception as error:  # noqa: BLE001  as above
        raise NotTinyError(f"transformers cannot save it: {type(error).__name__}: {' '.join(str(error).split())[:160]}") from None
    return Family(made, class_of(kind) if kind in causal_types() else made, Project(folder), model)


def with_fields(config: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config.json with other fields; a part that names its own type is replaced as a whole."""
    made = {**config}
    for key, value in fields.items():
        merged = isinstance(value, dict) and isinstance(made.get(key), dict) and "model_type" not in value
        made[key] = with_fields(made[key], value) if merged else value
    return made


def outcome(operation: Callable[[], str]) -> Outcome:
    """Run an operation that returns the number that it checked."""
    try:
        return Outcome("works", operation())
    except WorkbenchError as error:
        return Outcome("refused", error.message)
    except WrongError as error:
        return Outcome("wrong", str(error))
    except Exception as error:  # noqa: BLE001  a crash is what the walk is there to find
        return Outcome("wrong", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")


def loaded(kind: Any, path: Path) -> Any:
    """The float32 model in a directory; nothing is missing, unexpected or of another shape."""
    model, info = kind.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    if left := {key: value for key, value in info.items() if value}:
        raise WrongError(f"transformers loads it with {left}")
    return model.eval()


def save(model: Any, place: Path) -> None:
    model.save_pretrained(place)
    save_tokenizer(place)


def error_of(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference relative to the largest expected number, at least 1."""
    if not found.numel():
        return 0.0
    return float((found.double() - expected.double()).abs().max()) / max(1.0, float(expected.double().abs().max()))
