"""Adapters of every flavour as PEFT saves them, and what PEFT computes with them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from worlds.made import once
from worlds.tiny import LAYERS, VOCABULARY, config, randomize_vectors, save_tokenizer

from workbench.recipe.recipe import from_data
from workbench.resolve.resolve import resolve
from workbench.resolve.resolved import Resolved

BOUND = 2e-6  # weights that are rounded once to float32 differ in their logits by up to 0.9e-6 here
IDS = torch.arange(24).view(2, 12) * 5 % VOCABULARY


@dataclass(frozen=True)
class Flavour:
    """One configuration of PEFT.

    Attributes:
        family: The base's.
        settings: Fields of the PEFT configuration; `peft` names its class.
        dense: Whether no update of the adapter is a product of factors.
        unties: Whether the output has a head of its own though the base has none.
        merges: Whether PEFT's own merge is its forward. It is not where a tied weight is updated: the merge in place
            changes both ends, once for each update.
        says: Part of a warning of `plan`.
    """

    family: str
    settings: dict[str, Any]
    dense: bool = False
    unties: bool = False
    merges: bool = True
    says: str = ""
    peft: str = field(default="LoraConfig")


@once
def save_base(out: Path, family: str, dtype: torch.dtype = torch.float32) -> Path:
    """A random model of a family, norms and biases random too."""
    import transformers as t

    common = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.2,
        "eos_token_id": 1,
        "bos_token_id": None,
        "max_position_embeddings": 64,
    }
    made: dict[str, Callable[[], Any]] = {
        "mixtral": lambda: t.MixtralConfig(intermediate_size=24, num_local_experts=3, **common),
        "qwen3_moe": lambda: t.Qwen3MoeConfig(
            moe_intermediate_size=16, intermediate_size=24, num_experts=4, num_experts_per_tok=2, head_dim=8, **common
        ),
    }
    torch.manual_seed(0)
    model = t.AutoModelForCausalLM.from_config(made[family]() if family in made else config(family, LAYERS))
    randomize_vectors(model)
    model.to(dtype).save_pretrained(out)
    save_tokenizer(out)
    return out


@once
def save_flavour(flavour: Flavour, base: Path, out: Path) -> Path:
    """An adapter as PEFT itself saves it, with random numbers in everything that was trained."""
    import peft
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    ranked = {
        "LoraConfig": {"r": 4, "lora_alpha": 6},
        "LoHaConfig": {"r": 4},
        "LoKrConfig": {"r": 4},
        "VeraConfig": {"r": 6},
        "HRAConfig": {"r": 3},
        "RandLoraConfig": {"r": 5, "randlora_alpha": 9},
        "VBLoRAConfig": {"r": 3},
    }
    settings = {**ranked.get(flavour.peft, {}), **flavour.settings}
    made = getattr(peft, flavour.peft)(task_type="CAUSAL_LM", **settings)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), made)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape) * 0.2
                parameter.copy_(noise if "lora_A" in name or "lora_B" in name or "lora_embedding" in name else parameter + noise)
    model.save_pretrained(out)
    return out


def reference(base: Path, adapter: Path) -> Any:
    """The adapter loaded by PEFT on the float32 base."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter).eval()


def resolved(base: Path, adapter: Path, project: Path) -> Resolved:
    """The recipe that adds one adapter with weight 1."""
    data = {
        "version": 1,
        "base": str(base),
        "bricks": {"one": {"adapter": str(adapter)}},
        "steps": [{"merge": "task_arithmetic"}],
        "output": {"dtype": "float32"},
    }
    return resolve(from_data(data, project))


def logits(model: Any) -> Tensor:
    """In float64: the weights are float32, and a float32 forward adds 1e-6 of its own."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    base.set_experts_implementation("eager")
    model.double()
    with torch.no_grad():
        found: Tensor = model(IDS).logits
    return found


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())
