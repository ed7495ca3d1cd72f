"""Adapters in the form that LoRA servers read: plain LoRA of one rank, whose scaling is part of the factors.

Such servers read `r`, `lora_alpha` and the factors. They ignore `rank_pattern` and `alpha_pattern`, and refuse DoRA and
`modules_to_save`; so a module with a rank of its own would be scaled wrongly without an error.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.adapters.export import write_adapter
from workbench.adapters.linear import linear_factors
from workbench.adapters.read import WEIGHTS
from workbench.errors import WorkbenchError
from workbench.weights import svd
from workbench.weights.lowrank import Factors

if TYPE_CHECKING:
    from workbench.adapters.read import Adapter

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM accepts for --max-lora-rank."""


def served_rank(ranks: Iterable[int]) -> int:
    """Return the smallest rank that a server accepts and that holds all given ranks.

    Raises:
        WorkbenchError: If a rank is larger than every accepted one.
    """
    largest = max(ranks)
    for rank in RANKS:
        if rank >= largest:
            return rank
    raise WorkbenchError(
        f"rank {largest}: servers accept ranks up to {RANKS[-1]}",
        f"Write the adapter with a smaller rank: `output: {{form: adapter, rank: {RANKS[-1]}}}` in a recipe.",
    )


def write_served(adapter: Adapter, out: Path, base: str, rank: int) -> dict[str, Any]:
    """Write an adapter as plain LoRA: every module padded with zeros to one rank, alpha equal to it, factors in float32.

    Args:
        adapter: An adapter for which `linear.not_linear` returns None.
        out: Directory to create.
        base: Value of `base_model_name_or_path`: the name that the server has for its base.
        rank: Rank of all modules.

    Returns:
        The number of modules, and the size of the file in bytes.
    """
    fan_in_fan_out = bool(adapter.config.get("fan_in_fan_out"))
    factors = {}
    for module, (a, b) in linear_factors(adapter).items():
        padded = svd.padded(Factors(b, a), rank)
        # `write_adapter` takes updates as the base stores its weights.
        factors[f"{module}.weight"] = padded.transposed() if fan_in_fan_out else padded
    write_adapter(out, factors, base, fan_in_fan_out=fan_in_fan_out)
    return {"modules": len(factors), "bytes": (out / WEIGHTS).stat().st_size}
