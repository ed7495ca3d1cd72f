"""Adapters as plain low-rank updates of linear layers, by live module, for bricks that act beside the weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from workbench.adapters.lora import FactorPair, LowRank
from workbench.errors import shell

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from workbench.adapters.bind import BoundAdapter
    from workbench.adapters.keys import Part
    from workbench.adapters.read import Adapter

_FACTORS = {"lora_A", "lora_B", "lora_E"}
_NAMES = {
    "lora_magnitude_vector": "DoRA",
    "lora_B.bias": "lora_bias",
    "lora_embedding_A": "LoRA on an embedding",
    "ia3_l": "(IA)³",
    "oft_R": "OFT",
    "vera_lambda_b": "VeRA",
    "boft_R": "BOFT",
    "hra_u": "HRA",
    "fourierft_spectrum": "FourierFT",
    "randlora_A": "RandLoRA",
    "randlora_gamma": "RandLoRA",
    "vblora_logits_A": "VB-LoRA",
    "vblora_logits_A_topk_indices": "VB-LoRA",
    "trainable_tokens_delta": "trainable tokens",
}


def not_linear(adapter: Adapter, bound: BoundAdapter) -> str | None:
    """Return the part of an adapter that is no low-rank update of a linear layer; None if every part is one.

    Args:
        adapter: The adapter.
        bound: The adapter on its base, where unchanged copies of the base's weights are left out.
    """
    for part in adapter.keys.parts:
        extra = sorted(set(part.fields) - _FACTORS)
        if extra or not {"lora_A", "lora_B"} <= set(part.fields):
            return f"{_NAMES.get(extra[0], extra[0].split('_')[0])} on {part.module}"
        if part.depth or _rows(part) is None or _is_parameter(adapter, part):
            return f"LoRA on a parameter of {part.module} (target_parameters)"
    for disk, update in bound.places.items():
        if not isinstance(update, LowRank):
            return f"a whole tensor for {disk} (modules_to_save or bias)"
        if len(update.spec.shape) != 2 or any(patch.pair.expert for patch in update.patches):
            return f"LoRA on stacked experts in {disk} (target_parameters)"
    return None


def as_lora(brick: str, directory: str) -> str:
    """Return the commands that turn any adapter into plain LoRA, for hints.

    Args:
        brick: Name of the brick.
        directory: Directory of the adapter.
    """
    whole, factored = f"bricks/{brick}-full", f"bricks/{brick}-lora"
    return (
        f"`{shell('workbench', 'brick', 'bake', directory, '-o', whole)}`, then "
        f"`{shell('workbench', 'brick', 'extract', whole, '--base')} BASE {shell('-o', factored)}`."
    )


def linear_factors(adapter: Adapter) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the update B A of each linear layer, in float32.

    Args:
        adapter: An adapter for which `not_linear` returns None.

    Returns:
        Live module -> (A [rank, in], B [out, rank]); the scaling, also that of rsLoRA and AdaLoRA, is part of B.

    Raises:
        WorkbenchError: If a factor holds NaN or infinity.
    """
    factors = {}
    for part in adapter.keys.parts:
        a, b = part.fields["lora_A"], part.fields["lora_B"]
        pair = FactorPair(a, b, 1.0, singular_values=part.fields.get("lora_E")).factors()
        factors[part.module] = (pair.right, pair.left * adapter.scale(part.module, a.shape[0]))
    return factors


def ranks_of(adapter: Adapter) -> Mapping[str, int]:
    """Return live module -> rank of its update, from the file's header."""
    return {part.module: part.fields["lora_A"].shape[0] for part in adapter.keys.parts}


def linear_bytes(adapter: Adapter) -> int:
    """Return the memory of `linear_factors`, in bytes."""
    return 4 * sum(part.fields[x].entry.spec.numel for part in adapter.keys.parts for x in ("lora_A", "lora_B"))


def _is_parameter(adapter: Adapter, part: Part) -> bool:
    """Return whether the configuration lists a parameter of the module, which may be no linear layer."""
    modules = {str(name).rpartition(".")[0] for name in adapter.config.get("target_parameters") or ()}
    return any(module and f".{part.module}".endswith(f".{module}") for module in modules)


def _rows(part: Part) -> int | None:
    """Return the rank of a matrix pair; None if the factors are no matrices of one rank."""
    a, b = part.fields["lora_A"].shape, part.fields["lora_B"].shape
    return a[0] if len(a) == len(b) == 2 and a[0] == b[1] else None
