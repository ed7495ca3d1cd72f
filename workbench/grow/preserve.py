"""Does a grown model compute what it did? Compared on the live models, cached generation included."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from workbench.errors import WorkbenchError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKENS = 24
NEW_TOKENS = 12


@torch.no_grad()
def check_preserved(before: PreTrainedModel, after: PreTrainedModel, step: str, seed: int = 0) -> dict[str, Any]:
    """Compare logits on random tokens and greedy generation with a KV cache, which a wrong layer index would spoil.

    Returns:
        `{"max_logit_difference": float, "same_generation": True}`.

    Raises:
        WorkbenchError: logits differ by more than 1e-4, or a generated token does (exit code 3).
    """
    vocabulary = before.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, vocabulary, (2, TOKENS), generator=generator).to(before.device)
    difference = float((before(tokens).logits.float() - after(tokens).logits.float()).abs().max())
    generated = [
        model.generate(tokens[:1], attention_mask=torch.ones_like(tokens[:1]), max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS,
                       do_sample=False, use_cache=True, pad_token_id=0)
        for model in (before, after)
    ]  # fmt: skip
    same = torch.equal(generated[0], generated[1])
    if not difference <= 1e-4 or not same:
        raise WorkbenchError(
            f"step {step}: the grown model computes something else (logits differ by {difference:.2g}, "
            f"generation {'agrees' if same else 'differs'})",
            "Report this architecture; `check: false` in the step writes the model all the same.",
            3,
        )
    return {"max_logit_difference": difference, "same_generation": same}
