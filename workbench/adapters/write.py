"""Low-rank updates saved as PEFT adapters."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from workbench.adapters.keys import PREFIX
from workbench.adapters.read import CONFIG, WEIGHTS
from workbench.weights.lowrank import Factors
from workbench.weights.saving import save_tensors, write_text


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
        tensors[f"{PREFIX}{module}.lora_A.weight"] = plain.right.contiguous()
        tensors[f"{PREFIX}{module}.lora_B.weight"] = plain.left.contiguous()
        ranks[module] = plain.rank
    rank = max(ranks.values(), default=1)
    other = {module: r for module, r in ranks.items() if r != rank}
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": rank, "lora_alpha": rank,
        "target_modules": sorted(ranks), "rank_pattern": other, "alpha_pattern": other, "lora_dropout": 0.0, "bias": "none",
        "fan_in_fan_out": fan_in_fan_out, "inference_mode": True,
    }  # fmt: skip
    path.mkdir(parents=True, exist_ok=True)
    save_tensors(tensors, path / WEIGHTS, metadata={"format": "pt"})
    write_text(path / CONFIG, json.dumps(config, indent=2) + "\n")
