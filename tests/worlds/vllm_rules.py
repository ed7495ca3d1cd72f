"""vLLM's rules for adapters, written again from its documentation and its PEFT helper: what it loads, and what it computes with it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

RANKS = {8, 16, 32, 64, 128, 256, 320, 512}
"""Values of --max-lora-rank."""
_READ = {"r", "lora_alpha", "target_modules", "bias", "modules_to_save", "use_rslora", "use_dora"}


class Refused(Exception):
    """vLLM would refuse the adapter."""


def linear_modules(model: torch.nn.Module) -> set[str]:
    """Last names of the linear layers of a model, all of which may have LoRA."""
    return {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"
    }


def load_as_vllm(place: Path, served: str, most: int, expected: Iterable[str]) -> dict[str, torch.Tensor]:
    """Load an adapter by vLLM's rules, and return live module -> the update [out, in] that it would add.

    Args:
        place: Directory of the adapter.
        served: Name of the base on the server.
        most: Value of --max-lora-rank.
        expected: Last names of modules that may have LoRA.

    Raises:
        Refused: If vLLM refuses the adapter.
    """
    config: dict[str, Any] = json.loads((place / "adapter_config.json").read_text("utf-8"))
    if most not in RANKS:
        raise Refused(f"max_lora_rank {most}")
    if missing := {"r", "lora_alpha", "target_modules"} - config.keys():
        raise Refused(f"missing {missing}")
    if config.get("peft_type") != "LORA" or config.get("base_model_name_or_path") != served:
        raise Refused("the resolver does not find it")
    read = {key: config[key] for key in _READ & config.keys()}  # everything else is ignored: rank_pattern and alpha_pattern, too
    if read.get("modules_to_save"):
        raise Refused("modules_to_save")
    if read.get("use_dora"):
        raise Refused("DoRA")
    if read.get("bias", "none") != "none":
        raise Refused("bias")
    if read["r"] > most:
        raise Refused(f"rank {read['r']} is greater than max_lora_rank {most}")
    scale = read["lora_alpha"] / (read["r"] ** 0.5 if read.get("use_rslora") else read["r"])
    halves: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in load_file(place / "adapter_model.safetensors").items():
        parts = name.split(".")
        if parts[:2] != ["base_model", "model"] or parts[-1] != "weight" or parts[-2] not in ("lora_A", "lora_B"):
            raise Refused(f"{name} is unsupported LoRA weight")
        halves.setdefault(".".join(parts[2:-2]), {})[parts[-2]] = tensor.float()
    if unexpected := {module.rpartition(".")[2] for module in halves} - set(expected):
        raise Refused(f"unexpected modules {unexpected}")
    if any(pair["lora_A"].shape[0] > read["r"] for pair in halves.values()):
        raise Refused("a module has a larger rank than r")
    return {module: scale * pair["lora_B"] @ pair["lora_A"] for module, pair in halves.items()}
