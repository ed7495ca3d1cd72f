"""Check of the integer tensors of checkpoint bricks: constants must equal the base's, and counters keep the base's value."""

from __future__ import annotations

from workbench.bricks.brick import Brick
from workbench.errors import WorkbenchError
from workbench.models.conversion import Aligned
from workbench.weights.checkpoint import Checkpoint
from workbench.weights.digests import entry_digest
from workbench.weights.specs import Weights

# Integer buffers that count training steps. BatchNorm reads its counter only in training, and only with momentum=None.
_COUNTERS = ("num_batches_tracked",)


def check_integers(brick: Brick, base: Checkpoint, weights: Weights) -> list[str]:
    """Compare the integer and boolean tensors of a checkpoint brick with the base's.

    Args:
        brick: The checkpoint.
        base: The recipe's base.
        weights: The brick's tensors under the base's names, from `fitted`.

    Returns:
        A note if counters differ. The result uses the base's values.

    Raises:
        WorkbenchError: If another integer tensor differs. Such tensors are lookup tables or masks, which cannot be averaged.
    """
    counters = []
    for name, entry in base.entries.items():
        if entry.spec.is_float or name not in weights.specs:
            continue
        sources = weights.sources(name) if isinstance(weights, Aligned) else [name]
        if len(sources) == 1 and entry_digest(entry) == entry_digest(brick.checkpoint.entries[sources[0]]):
            continue
        if name.rpartition(".")[2] in _COUNTERS:
            counters.append(name)
            continue
        raise WorkbenchError(
            f"{brick.label}: the {entry.spec.kind} tensor {name} differs from the base's, but only floating-point tensors can be merged",
            "Use a fine-tune that leaves this tensor unchanged.",
        )
    if not counters:
        return []
    shown = f"{counters[0]}{', …' if len(counters) > 1 else ''}"
    return [f"{brick.label}: {len(counters)} training counters differ ({shown}); the result uses the base's values"]
