"""Reader of PEFT adapter directories: configuration, tensors and scales."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench import jsondoc
from workbench.adapters.flavours import BLOCKS, SIZES, TUNERS, check_config, check_kinds, meaning
from workbench.adapters.keys import Keys, sort_keys
from workbench.adapters.patterns import Patterns
from workbench.adapters.tied import unties
from workbench.errors import WorkbenchError
from workbench.weights.header import Entry, read_header

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

    def scale(self, module: str, rank: int | None) -> float:
        """Return the scale of a module's update: alpha / rank, or alpha / √rank for rsLoRA.

        Args:
            module: The live module, or the live parameter of `target_parameters`.
            rank: Rank of the stored factors; None if they are stored whole (LoKr).

        Raises:
            WorkbenchError: If the configuration states another rank.
        """
        kind, size = self.config["peft_type"], self.size(module, rank)
        alpha = self.config.get("alpha" if kind in ("LOHA", "LOKR") else "lora_alpha")
        alpha = 8 if alpha is None else alpha
        if kind == "ADALORA":  # as in PEFT: the rank before pruning, plus 1e-5
            return float((alpha if alpha > 0 else size) / (self.config.get("init_r", 12) + 1e-5))
        alpha = self._patterns("alpha_pattern").value(module, alpha)
        return float(alpha / size**0.5 if kind == "LORA" and self.config.get("use_rslora") else alpha / size)

    def size(self, module: str, stored: int | None) -> float:
        """Return the rank that the configuration states for a module; for FourierFT, the number of frequencies.

        Args:
            module: The live module, or the live parameter of `target_parameters`.
            stored: What the stored tensors have; None if they do not tell.

        Raises:
            WorkbenchError: If the two differ. PEFT refuses such an adapter too, and with another rank the scale alpha / rank would be
                another one without a sign of it.
        """
        kind = self.config["peft_type"]
        field, pattern, default = SIZES[kind]
        value = self.config.get(field)
        size: float = default if value is None else value
        if pattern:
            size = self._patterns(pattern).value(module, size)
        elif kind == "ADALORA":
            masks = self.config.get("rank_pattern") or {}
            if (mask := masks.get(f"{module}.lora_E", masks.get(f"{module}.lora_E.default"))) is not None:
                field, size = "rank_pattern", sum(mask)
        if size < (kind != "ADALORA") or (stored is not None and stored != size):
            fields = f"{field} and {pattern}" if pattern and self.config.get(pattern) else field
            found, expected = (f"{n:g} frequencies" if kind == "FOURIERFT" else f"rank {n:g}" for n in (stored or 0, size))
            raise self.size_error(module, found, expected, fields)
        return size

    def check_blocks(self, module: str, inputs: int, stored: int) -> None:
        """Check the size of the blocks of a module of OFT or BOFT against the configuration.

        Args:
            module: The live module.
            inputs: Number of its inputs.
            stored: Size of the stored blocks.

        Raises:
            WorkbenchError: If the configuration states another size. PEFT itself changes a size that does not divide the inputs.
        """
        number, width, default = BLOCKS[self.config["peft_type"]]
        count, size = self.config.get(number) or 0, self.config.get(width)
        size = default if size is None else size
        if bool(count) != bool(size) and inputs % (size or count) == 0 and (size or inputs // count) != stored:
            stated = f"blocks of {size}" if size else f"{count} blocks of {inputs // count}"
            raise self.size_error(module, f"blocks of {stored}", stated, width if size else number)

    def size_error(self, module: str, stored: str, stated: str, fields: str) -> WorkbenchError:
        """Return the error of a module whose tensors have another size than the configuration states."""
        return WorkbenchError(
            f"{self.label}: {module} has {stored} in {self.path / WEIGHTS}; expected {stated}, by {fields} in {CONFIG}",
            f"PEFT refuses this adapter too. Save it again with PEFT, or correct {fields} in {self.path / CONFIG} to what it was trained with.",
        )

    def _patterns(self, field: str) -> Patterns:
        if field not in self._matchers:
            self._matchers[field] = Patterns(self.config.get(field), f"{self.label}: {self.path / CONFIG}: {field}")
        return self._matchers[field]

    def unties(self, base: Model) -> str | None:
        """Describe how the adapter unties a tied base's head from its embeddings; return None if they stay one tensor."""
        return unties(self.keys, base)
