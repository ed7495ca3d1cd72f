"""Costs of steps for `plan`: bytes, tokens and memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from workbench.bricks.brick import Brick
from workbench.models.layout import Model
from workbench.resolve.resolved import Resolved
from workbench.run.peaks import adapter_bytes, largest

# More once transformers has built a model on the meta device, which names its modules: measured 0.16 GB.
TRANSFORMERS = 160_000_000


# Of a live float32 model that reads text, at 2 FLOP a parameter and token: one core, SmolLM2-135M, rows of 256 tokens, 5.0 ms a token.
# A token of an edit's values (three times that for forward and back, on the layers above the edited one and behind the lookup alone) takes
# about as long as one that is read: measured 5.2 ms looked up at the subject, 2.4 ms at the prompt's end.
FLOPS_PER_SECOND = 5e10


# Tokens that the check of a growth runs through a model: two rows of logits and one of generation; two steps of gradients, three passes each.
CHECKED, LEARNED = 84, 288


@dataclass
class Needs:
    """What the steps of a plan add up to.

    Attributes:
        read: Bytes read.
        threads: Tensors that are computed at a time.
        live: Most memory of live models, in bytes.
        whole: Bytes of the largest tensors that a step holds whole, one a thread.
        tensors: Tensor -> most bytes that a merge step takes for it.
        ranks: Tensor -> rank of what the merge steps add to it; None where that is no product of factors.
        width: Most bricks of a merge.
        seconds: Of work that is not reading and writing.
        cached: Steps whose result is kept.
    """

    read: int
    threads: int
    live: int = 0
    whole: int = 0
    tensors: dict[str, int] = field(default_factory=dict)
    ranks: dict[str, int | None] = field(default_factory=dict)
    width: int = 1
    seconds: float = 1.5
    cached: list[str] = field(default_factory=list)


def numel(model: Model) -> int:
    """Return the number of a model's parameters."""
    return sum(s.numel for s in model.weights.specs.values())


def with_seconds(cost: dict[str, Any], parameters: int, passes: int) -> dict[str, Any]:
    """Return a cost with the seconds that its tokens take, where they are known.

    Args:
        cost: What a method says of its work.
        parameters: Of the live model.
        passes: Forward passes that a token takes: 1, or 3 where it goes forward and back.
    """
    if "tokens" not in cost:
        return {"cost": cost} if cost else {}
    return {"cost": cost, "seconds": round(2 * passes * parameters * cost["tokens"] / FLOPS_PER_SECOND, 1)}


def kind_name(brick: Brick | Resolved) -> str:
    """Return adapter, checkpoint or recipe."""
    return brick.kind if isinstance(brick, Brick) else "recipe"


def brick_bytes(brick: Brick | Resolved) -> int:
    """Return the bytes that a brick's files have, or those that a recipe reads."""
    if isinstance(brick, Resolved):
        return sum(brick_bytes(b) for b in brick.bricks.values()) + sum(s.nbytes for s in brick.base.weights.specs.values())
    return sum(file.stat().st_size for file in brick.files())


def adapter_whole(resolved: Resolved, needs: Needs, dense: bool) -> int:
    """Bytes that an adapter's updates take: of the largest tensors while they are brought to their rank, and of all that are held."""
    base, rank = resolved.base, resolved.recipe.fields.output.rank
    linear = {n: s for n, s in base.weights.specs.items() if len(s.shape) == 2 and base.layout.layer(n) is not None}
    reached = {n: s for n, s in (linear if dense else base.weights.specs).items() if n in needs.ranks and len(s.shape) == 2}
    work, held = adapter_bytes(reached, needs.ranks, rank if isinstance(rank, int) else None, needs.tensors)
    return largest(work, needs.threads) + held


def factor_bytes(brick: Brick) -> int:
    """What an adapter's largest update takes while it is merged: two factors as read, in float32, and stacked with others."""
    return 24 * max((entry.spec.numel for entry in brick.adapter.entries.values()), default=0)
