"""PEFT's own computation with an adapter on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from workbench.adapters.read import CONFIG

TOKENS = torch.tensor([[3, 9, 4, 50, 7, 61, 12]])


def peft_logits(base: Path, adapter: Path, merge: bool = False) -> torch.Tensor:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
    if merge:
        model = model.merge_and_unload(safe_merge=True)
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(TOKENS).logits
    return logits


def config(adapter: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((adapter / CONFIG).read_text("utf-8"))
    return found
