"""PEFT LoRA adapters: read into exact factors under the base's tensor names, and written from them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from workbench.errors import WorkbenchError
from workbench.names import disk_weight
from workbench.weights.checkpoint import Entry, read_header
from workbench.weights.lowrank import Factors, LowRankSource
from workbench.weights.specs import TensorSpec

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_BAKE = (
    "Bake it into a checkpoint first: PeftModel.from_pretrained(base, DIR).merge_and_unload(safe_merge=True)"
    ".save_pretrained(OUT), then use `checkpoint: OUT`."
)
_UNSAVE = (
    "A copy of the base's own weight, which PEFT adds for embeddings and heads: save the adapter again with "
    "model.save_pretrained(DIR, save_embedding_layers=False)."
)
# What this reader does not express as a plain product of two factors. A value in the list means "not used".
_REFUSED: dict[str, tuple[Any, ...]] = {
    "use_dora": (None, False), "lora_bias": (None, False), "bias": (None, "none"), "modules_to_save": (None, []),
    "target_parameters": (None, []), "trainable_token_indices": (None, [], {}), "layer_replication": (None, []),
    "alora_invocation_tokens": (None, []), "use_qalora": (None, False), "arrow_config": (None, {}),
}  # fmt: skip


@dataclass(frozen=True)
class AdapterSource:
    """One tensor's delta from its factors; implements `merge.stream.DeltaSource`."""

    product: LowRankSource

    def read_delta(self, start: int, stop: int, base: Tensor, out: Tensor) -> None:
        """Rows start..stop of the product; the base is not needed."""
        self.product.read(start, stop, out)


class Adapter:
    """A LoRA adapter directory.

    Args:
        path: The directory.
        label: How errors call it: "brick 'math'".

    Raises:
        WorkbenchError: no safetensors, another tuner, a LoRA flavour that is not a plain product.
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

    def _read_config(self) -> dict[str, Any]:
        try:
            config = json.loads((self.path / CONFIG).read_text("utf-8"))
        except FileNotFoundError:
            raise WorkbenchError(f"{self.label}: no {CONFIG} in {self.path}") from None
        except ValueError as error:
            raise WorkbenchError(f"{self.label}: {self.path / CONFIG} is not valid JSON ({error})") from None
        if config.get("peft_type") != "LORA":
            raise WorkbenchError(f"{self.label}: peft_type {config.get('peft_type')}; expected LORA", _BAKE)
        if used := [k for k, unused in _REFUSED.items() if config.get(k) not in unused]:
            raise WorkbenchError(f"{self.label}: LoRA with {', '.join(used)}, which is not a product of two factors", _BAKE)
        return dict(config)

    def modules(self) -> dict[str, tuple[Entry, Entry]]:
        """Module -> (lora_A [rank, in], lora_B [out, rank]). Errors: any other key, half a pair."""
        pairs: dict[str, dict[str, Entry]] = {}
        for key, entry in self.entries.items():
            match = re.fullmatch(r"(.+)\.lora_([AB])\.weight", key.removeprefix(_PREFIX))
            if not match or len(entry.spec.shape) != 2:
                raise WorkbenchError(
                    f"{self.label}: adapter key {key} {list(entry.spec.shape)} is not a LoRA factor of a linear layer",
                    _UNSAVE if ".base_layer." in key else _BAKE,
                )
            pairs.setdefault(match[1], {})[match[2]] = entry
        for module, pair in pairs.items():
            if len(pair) != 2:
                raise WorkbenchError(f"{self.label}: {module} has lora_{next(iter(pair))} only", "Save the adapter again.")
        return {module: (pair["A"], pair["B"]) for module, pair in pairs.items()}

    def scale(self, module: str, rank: int) -> float:
        """alpha / rank, or alpha / √rank for rsLoRA; alpha from `alpha_pattern` where it matches."""
        alpha = self.config.get("lora_alpha")
        alpha = _pattern(self.config.get("alpha_pattern"), module, 8 if alpha is None else alpha)
        return float(alpha / rank**0.5 if self.config.get("use_rslora") else alpha / rank)

    def bind(self, specs: Mapping[str, TensorSpec]) -> BoundAdapter:
        """The adapter on a base. Errors: a module that the base lacks, shapes that do not fit."""
        places: dict[str, tuple[Entry, Entry, float]] = {}
        for module, (a, b) in self.modules().items():
            name = disk_weight(module, specs, self.label)
            rank = a.spec.shape[0]
            update = (b.spec.shape[0], a.spec.shape[1])
            shape = update[::-1] if self.fan_in_fan_out else update
            if b.spec.shape[1] != rank or shape != specs[name].shape:
                raise WorkbenchError(
                    f"{self.label}: {name} is {list(specs[name].shape)} in the base, the adapter's update is "
                    f"{list(b.spec.shape)} x {list(a.spec.shape)}",
                    f"The adapter was trained on {self.config.get('base_model_name_or_path')}: name that base in the recipe.",
                )
            if name in places:
                raise WorkbenchError(f"{self.label}: two modules of the adapter stand for {name}", "Save the adapter again.")
            places[name] = (a, b, self.scale(module, rank))
        return BoundAdapter(self, places)

    @property
    def fan_in_fan_out(self) -> bool:
        """Whether the base stores [in, out], as Conv1D does."""
        return bool(self.config.get("fan_in_fan_out"))


@dataclass(frozen=True)
class BoundAdapter:
    """An adapter's deltas under the base's names; implements `merge.stream.Deltas`."""

    adapter: Adapter
    places: dict[str, tuple[Entry, Entry, float]]

    def touches(self, name: str) -> bool:
        """Whether the adapter updates a tensor."""
        return name in self.places

    def _factors(self, name: str) -> Factors:
        a, b, scale = self.places[name]
        left, right = _tensor(b), _tensor(a)
        for factor, value in (("lora_B", left), ("lora_A", right)):
            if not value.isfinite().all():
                index = (~value.isfinite()).nonzero()[0].tolist()
                raise WorkbenchError(
                    f"{self.adapter.label}: {factor} of {name} holds {value[tuple(index)].item()} at {index}",
                    "Train or download this adapter again.",
                )
        factors = Factors(left, right * scale)
        return factors.transposed() if self.adapter.fan_in_fan_out else factors

    def open_model(self, name: str, device: torch.device) -> None:
        """None: an adapter holds updates."""

    def factors(self, name: str, device: torch.device) -> Factors:
        """One tensor's update, float32. Errors: NaN and infinities."""
        factors = self._factors(name)
        return Factors(factors.left.to(device), factors.right.to(device))

    def open_delta(self, name: str, device: torch.device) -> AdapterSource:
        """One tensor's update."""
        return AdapterSource(LowRankSource(self._factors(name), device))


def write_adapter(path: Path, factors: Mapping[str, Factors], base: str, *, fan_in_fan_out: bool = False) -> None:
    """Save low-rank updates as a PEFT adapter, alpha = rank, float32.

    Args:
        path: A directory, created.
        factors: Tensor name "….weight" -> update.
        base: What `base_model_name_or_path` says.
        fan_in_fan_out: Whether the base stores these weights as [in, out].
    """
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for name, update in sorted(factors.items()):
        module = name.removesuffix(".weight")
        plain = update.transposed() if fan_in_fan_out else update
        tensors[f"{_PREFIX}{module}.lora_A.weight"] = plain.right.contiguous()
        tensors[f"{_PREFIX}{module}.lora_B.weight"] = plain.left.contiguous()
        ranks[module] = plain.rank
    rank = max(ranks.values(), default=1)
    other = {module: r for module, r in ranks.items() if r != rank}
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": rank, "lora_alpha": rank,
        "target_modules": sorted(ranks), "rank_pattern": other, "alpha_pattern": other, "lora_dropout": 0.0, "bias": "none",
        "fan_in_fan_out": fan_in_fan_out, "inference_mode": True,
    }  # fmt: skip
    path.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})
    (path / CONFIG).write_text(json.dumps(config, indent=2) + "\n", "utf-8")


def _pattern(patterns: Mapping[str, Any] | None, module: str, default: float) -> float:
    """PEFT's rule: the first pattern that matches the end of the module's name, at a dot."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return float(value)
    return default


def _tensor(entry: Entry) -> Tensor:
    with entry.file.open("rb") as stream:
        stream.seek(entry.offset)
        raw = bytearray(stream.read(entry.spec.nbytes))
    return torch.frombuffer(raw, dtype=entry.spec.dtype).view(entry.spec.shape).float()
