"""What linear layers of a live model read and write at chosen positions of texts."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from workbench.lazy import no_grad, torch
from workbench.models.hooks import head_sees, hooked, shaped
from workbench.models.texts import batch_limit, by_length, side_by_side

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


@dataclass
class Recorded:
    """Inputs and outputs of linear layers.

    Attributes:
        inputs: Module -> what it read [positions, inputs], float32. Modules that read the same tensor are one entry.
        outputs: Module -> what it wrote [positions, outputs], float32.
        alike: Module -> the module under whose name its input is kept.
    """

    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    alike: dict[str, str] = field(default_factory=dict)


@no_grad
def record(
    model: PreTrainedModel, modules: Sequence[str], rows: Sequence[Sequence[int]], chosen: Sequence[Sequence[int]]
) -> Recorded:
    """Run texts through a model and record what modules read and write.

    Args:
        model: The live model.
        modules: Names of linear layers.
        rows: Tokens of each text.
        chosen: Positions of each text to record, in the order of the result.
    """
    device = next(model.parameters()).device
    counts = [len(positions) for positions in chosen]
    starts = [sum(counts[:i]) for i in range(len(counts))]
    kept, total = Recorded(), sum(counts)
    now: dict[str, Any] = {}

    def take(store: dict[str, Tensor], name: str, values: Tensor) -> None:
        picked = shaped(values, *now["size"])[now["rows"], now["positions"]].float().cpu()
        if name not in store:
            store[name] = torch.empty(total, picked.shape[1])
        store[name][now["places"]] = picked

    def hook(name: str) -> Any:
        def see(_module: Any, args: tuple[Any, ...], output: Tensor) -> None:
            last, owner = now.get("last", (None, ""))
            if args[0] is not last:
                owner = name
                take(kept.inputs, name, args[0])
                now["last"] = args[0], name
            kept.alike[name] = owner
            take(kept.outputs, name, output)

        return see

    head = model.get_output_embeddings()
    with ExitStack() as stack:
        for name in modules:
            stack.enter_context(hooked(model.get_submodule(name), after=hook(name)))
        if head is not None:  # logits are not needed
            stack.enter_context(head_sees(head, torch.zeros(1, dtype=torch.long, device=device)))
        for index in by_length([len(row) for row in rows], batch_limit(device)):
            batch = side_by_side([rows[i] for i in index], device)
            now.update(
                size=tuple(batch.tokens.shape),
                rows=torch.tensor([b for b, i in enumerate(index) for _ in chosen[i]], dtype=torch.long, device=device),
                positions=torch.tensor([p for i in index for p in chosen[i]], dtype=torch.long, device=device),
                places=torch.tensor([starts[i] + k for i in index for k in range(counts[i])], dtype=torch.long),
                last=(None, ""),
            )
            model(input_ids=batch.tokens, attention_mask=batch.mask, use_cache=False)
    return kept
