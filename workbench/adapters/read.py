"""Reader of PEFT adapter directories: configuration, tensors and scales."""

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
from workbench.weights.header import Entry, read_header
from workbench.weights.specs import BLOCK_ELEMENTS

if TYPE_CHECKING:
    from workbench.models.layout import Model

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


class Adapter:
    """A PEFT adapter directory.

    It holds LoRA or a variant, AdaLoRA, DoRA, LoHa, LoKr, OFT, (IA)³, VeRA, BOFT, HRA, FourierFT, RandLoRA, VB-LoRA or trainable tokens.

    Args:
        path: The directory.
        label: Name of the adapter in error messages, such as "brick 'math'".

    Raises:
        WorkbenchError: If there is no safetensors file, the tuner is not supported, or the stored tensors and the base do not
            determine the update.
    """

    def __init__(self, path: Path, label: str) -> None:
        self.path = path
        self.label = label
        self.config = self._read_config()
        if not (path / WEIGHTS).is_file():
            present = "adapter_model.bin (pickles are never opened)" if (path / "adapter_model.bin").is_file() else "no weights"
            raise WorkbenchError(
                f"{label}: expected {WEIGHTS} in {path}, found {present}",
                "Save it again with PEFT: model.save_pretrained(DIR, safe_serialization=True).",
            )
        self.entries = read_header(path / WEIGHTS)
        self._matchers: dict[str, Patterns] = {}

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
        """The tensors by module and role.

        Raises:
            WorkbenchError: If `sort_keys` rejects a key.
        """
        return sort_keys(self.entries, TUNERS[self.config["peft_type"]], self.label)

    def modules(self) -> dict[str, tuple[Entry, Entry]]:
        """Return the factors of each module: (lora_A, lora_B) or (lora_embedding_A, lora_embedding_B).

        Raises:
            WorkbenchError: If `sort_keys` rejects a key.
        """
        factors: dict[str, tuple[Entry, Entry]] = {}
        for part in self.keys.parts:
            a, b = (next((part.fields[n] for n in (f"lora_{x}", f"lora_embedding_{x}") if n in part.fields), None) for x in "AB")
            if a and b:
                factors[part.module + ".base_layer" * part.depth] = (a.entry, b.entry)
        return factors

    @property
    def meaning(self) -> dict[str, Any]:
        """Configuration fields that change what the tensors mean."""
        return meaning(self.config)

    def check_finite(self) -> None:
        """Read every tensor once to check its numbers.

        Raises:
            WorkbenchError: If a tensor holds NaN or infinity.
        """
        for key, entry in self.entries.items():
            stored = Stored(entry, key, self.label)
            for start, stop in entry.spec.blocks(BLOCK_ELEMENTS):
                stored.rows(start, stop)

    def scale(self, module: str, rank: int) -> float:
        """Return the scale of a module's update: alpha / rank, or alpha / √rank for rsLoRA, with alpha from `alpha_pattern`."""
        alpha = self.config.get("lora_alpha")
        alpha = self._patterns("alpha_pattern").value(module, 8 if alpha is None else alpha)
        if self.config["peft_type"] == "ADALORA":  # as in PEFT: the rank before pruning, plus 1e-5
            return float((alpha if alpha > 0 else rank) / (self.config.get("init_r", 12) + 1e-5))
        return float(alpha / rank**0.5 if self.config.get("use_rslora") else alpha / rank)

    def lycoris_scale(self, module: str) -> float:
        """Return alpha / r of a LoHa or LoKr module, with both numbers from their patterns if these match."""
        alpha, rank = (self.config.get(name) or 8 for name in ("alpha", "r"))
        rank = self._patterns("rank_pattern").value(module, rank)
        return float(self._patterns("alpha_pattern").value(module, alpha) / rank)

    def _patterns(self, field: str) -> Patterns:
        if field not in self._matchers:
            self._matchers[field] = Patterns(self.config.get(field), f"{self.label}: {self.path / CONFIG}: {field}")
        return self._matchers[field]

    def unties(self, base: Model) -> str | None:
        """Describe how the adapter unties a tied base's head from its embeddings; return None if they stay one tensor."""
        return unties(self.keys, base)
