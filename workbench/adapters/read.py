"""PEFT adapters read as deltas under the base's tensor names: exact factors where there are any, else dense deltas."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench import jsondoc
from workbench.adapters.entries import Stored
from workbench.adapters.flavours import TUNERS, check_config, check_kinds, meaning
from workbench.adapters.keys import Keys, sort_keys
from workbench.adapters.patterns import Patterns
from workbench.adapters.tied import unties
from workbench.errors import WorkbenchError
from workbench.weights.checkpoint import Entry, read_header
from workbench.weights.specs import BLOCK_ELEMENTS

if TYPE_CHECKING:
    from workbench.models.layout import Model

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


class Adapter:
    """A PEFT adapter directory: LoRA in all flavours that stored tensors and the base determine, AdaLoRA, DoRA, LoHa, LoKr, OFT, (IA)³.

    Args:
        path: The directory.
        label: How errors call it: "brick 'math'".

    Raises:
        WorkbenchError: no safetensors, another tuner, a variant that is not determined by its tensors and the base.
    """

    def __init__(self, path: Path, label: str) -> None:
        self.path = path
        self.label = label
        self.config = self._read_config()
        if not (path / WEIGHTS).is_file():
            found = "adapter_model.bin (a pickle, never opened)" if (path / "adapter_model.bin").is_file() else "nothing"
            raise WorkbenchError(
                f"{label}: expected {WEIGHTS} in {path}, found {found}",
                "Save it again with PEFT: model.save_pretrained(DIR, safe_serialization=True).",
            )
        self.entries = read_header(path / WEIGHTS)
        self._matchers: dict[str, Patterns] = {}
        self.bound: tuple[Model, Any] | None = None  # what `bind` keeps: the last base, and this adapter on it

    def _read_config(self) -> dict[str, Any]:
        try:
            config = jsondoc.read_object(self.path / CONFIG, f"{self.label}: {self.path / CONFIG}", unique=True)
        except FileNotFoundError:
            raise WorkbenchError(f"{self.label}: no {CONFIG} in {self.path}") from None
        check_kinds(config, f"{self.label}: {self.path / CONFIG}")
        check_config(config, self.label)
        return config

    @cached_property
    def keys(self) -> Keys:
        """Its tensors, sorted. Errors: as `sort_keys`."""
        return sort_keys(self.entries, TUNERS[self.config["peft_type"]], self.label)

    def modules(self) -> dict[str, tuple[Entry, Entry]]:
        """Module -> its factors (lora_A, lora_B), or (lora_embedding_A, lora_embedding_B). Errors: as `keys`."""
        found: dict[str, tuple[Entry, Entry]] = {}
        for part in self.keys.parts:
            a, b = (next((part.fields[n] for n in (f"lora_{x}", f"lora_embedding_{x}") if n in part.fields), None) for x in "AB")
            if a and b:
                found[part.module + ".base_layer" * part.depth] = (a.entry, b.entry)
        return found

    @property
    def meaning(self) -> dict[str, Any]:
        """Fields of the configuration that change what its tensors mean."""
        return meaning(self.config)

    def check_finite(self) -> None:
        """Read every tensor once. Errors: NaN and infinities."""
        for key, entry in self.entries.items():
            stored = Stored(entry, key, self.label)
            for start, stop in entry.spec.blocks(BLOCK_ELEMENTS):
                stored.rows(start, stop)

    def scale(self, module: str, rank: int) -> float:
        """alpha / rank, or alpha / √rank for rsLoRA; alpha from `alpha_pattern` where it matches."""
        alpha = self.config.get("lora_alpha")
        alpha = self._patterns("alpha_pattern").value(module, 8 if alpha is None else alpha)
        if self.config["peft_type"] == "ADALORA":  # as PEFT: the rank before pruning, and its guard against zero
            return float((alpha if alpha > 0 else rank) / (self.config.get("init_r", 12) + 1e-5))
        return float(alpha / rank**0.5 if self.config.get("use_rslora") else alpha / rank)

    def lycoris_scale(self, module: str) -> float:
        """alpha / r of LoHa and LoKr, both from their patterns where these match."""
        alpha, rank = (self.config.get(name) or 8 for name in ("alpha", "r"))
        rank = self._patterns("rank_pattern").value(module, rank)
        return float(self._patterns("alpha_pattern").value(module, alpha) / rank)

    def _patterns(self, field: str) -> Patterns:
        if field not in self._matchers:
            self._matchers[field] = Patterns(self.config.get(field), f"{self.label}: {self.path / CONFIG}: {field}")
        return self._matchers[field]

    def unties(self, base: Model) -> str | None:
        """How it unties a tied base's head from its embeddings; None where both stay one tensor."""
        return unties(self.keys, base)
