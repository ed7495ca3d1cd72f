"""`brick extract` on bases as published, with experts, encoders and layers that PEFT saves whole: PEFT's own load and merge is the fine-tune."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from worlds.family import error_of
from worlds.project import CPU
from worlds.published_bases import Base, as_published
from worlds.published_pairs import entries, live, noisy, saved

from workbench.adapters.approximate import Policy
from workbench.run.device import Work
from workbench.upkeep.extract import Extraction, extract

KNOWN = entries()
FAMILIES = {
    "qwen3_moe": "experts.gate_up_proj",
    "qwen2_moe": "shared_expert.gate_proj.weight",  # PEFT takes the module's name for that of an expert
    "mixtral": "experts.down_proj",
    "deepseek_v3": "shared_experts.up_proj.weight",
    "gpt_oss": "experts.gate_up_proj_bias",
    "llama4": "experts.gate_up_proj",
    "granitemoe": None,
    "qwen3_next": "experts.gate_up_proj",
    "jamba": "experts.down_proj",
    "qwen2_5_vl": None,
    "qwen3_vl_moe": "experts.down_proj",
    "gemma3": None,
    "llava": None,
    "qwen3_omni": "experts.gate_up_proj",
}
"""Family -> end of a parameter that its adapter must name, or None."""


def tuned_on(name: str, folder: Path) -> tuple[Base, Any]:
    """Return a base as published, and its fine-tune, saved in one/."""
    base = as_published(name, KNOWN[name], folder)
    model = noisy(live(base.kind, base.trained)[0], 1)
    saved(model, folder / "one")
    return base, model


def taken(folder: Path, rank: int | None, **policy: Any) -> Extraction:
    """Extract the adapter `made`."""
    options = Policy(rank, dense="approximate", **policy)
    return extract("one", "base", folder / "made", options, Work(CPU, 1), project=folder)


@pytest.mark.parametrize("name", FAMILIES)
def test_peft_loads_what_was_extracted(name: str, tmp_path: Path) -> None:
    from peft import PeftModel

    base, tuned = tuned_on(name, tmp_path / "project")
    record = taken(tmp_path / "project", 4096)
    assert record.error < 1e-5
    made = tmp_path / "project" / "made"
    merged = PeftModel.from_pretrained(live(base.kind, base.trained)[0], made).merge_and_unload().state_dict()
    for key, tensor in tuned.state_dict().items():
        if tensor.is_floating_point():
            assert error_of(merged[key], tensor) < 1e-5, key
    config = json.loads((made / "adapter_config.json").read_text("utf-8"))
    parameters = config["target_parameters"] or []
    wanted = FAMILIES[name]
    assert wanted is None or any(parameter.endswith(wanted) for parameter in parameters), parameters
