"""The language part of a multimodal checkpoint: its text decoder, under the names that the text model of the architecture has.

A multimodal checkpoint names its decoder `model.layers.0...`, `language_model.model.layers.0...` or `model.language_model.layers.0...`,
and a text model of the same architecture `model.layers.0...`. The decoder is found by its embeddings: its tensors are those below the
module that holds `embed_tokens`, and the head. All other tensors are components: encoders, and projectors between an encoder and the
decoder.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from workbench.ground.errors import WorkbenchError
from workbench.models.architecture import is_head
from workbench.models.layout import is_tower
from workbench.models.skeleton import tidy
from workbench.weights.checkpoint import Checkpoint
from workbench.weights.header import TEXT_CONFIGS

HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"
"""Names of head and embeddings in a text model."""
_ROOT, _TABLE = "model.", "embed_tokens.weight"
_COMPONENTS = ("vision_config", "audio_config", "speech_config")


def language_names(names: Iterable[str], label: str) -> dict[str, str]:
    """Return the names of a model's text decoder.

    Returns:
        Stored name -> name in a text model, `model....` or `lm_head.weight`, in file order.

    Raises:
        WorkbenchError: If the model does not have exactly one module with `embed_tokens` outside its encoders.
    """
    names = list(names)
    roots = [n.removesuffix(_TABLE) for n in names if n.endswith(f".{_TABLE}") and not is_tower(n)]
    if len(roots) != 1:
        raise WorkbenchError(
            f"{label}: expected one text decoder with a tensor `...{_TABLE}`, found {len(roots)}",
            "The language part of this architecture is not supported: only decoders whose embeddings have this name are.",
        )
    (root,) = roots
    found = {n: _ROOT + n.removeprefix(root) for n in names if n.startswith(root) and not is_tower(n)}
    heads = [n for n in names if is_head(n) and not is_tower(n) and n not in found]
    return {**found, **({heads[0]: HEAD} if len(heads) == 1 else {})}


def component_of(name: str) -> str:
    """Return the module outside the text decoder that a tensor belongs to, such as "vision_tower", "visual" or "multi_modal_projector"."""
    return name.removeprefix(_ROOT).partition(".")[0]


def component_configs(config: Mapping[str, object]) -> dict[str, object]:
    """Return the parts of config.json that describe encoders."""
    return {key: config[key] for key in _COMPONENTS if config.get(key)}


def language_config(config: Mapping[str, object], tied: bool) -> dict[str, object]:
    """Return config.json of a multimodal model's text decoder, for comparison with that of a text model.

    `model_type` is left out, because multimodal models have names of their own for the same decoder.
    """
    part = next((part for field in TEXT_CONFIGS if isinstance(part := config.get(field), dict)), config)
    found = {key: value for key, value in part.items() if key not in (*_COMPONENTS, "model_type", "architectures")}
    return {**found, "tie_word_embeddings": tied}


class LanguagePart(Checkpoint):
    """The text decoder of a multimodal checkpoint, with the tensor names of a text model."""

    def __init__(self, path: Path, label: str) -> None:
        super().__init__(path, label)
        tidy(self)
        names = language_names(self.entries, label)
        if len(names) == len(self.entries):
            raise WorkbenchError(
                f"{label}: `part: language` is for a model with encoders, but all tensors of {path} belong to its text decoder",
                "Remove `part`.",
            )
        self.entries = {new: self.entries[old] for old, new in names.items()}
        self.config = language_config(self.config, HEAD not in self.entries)
