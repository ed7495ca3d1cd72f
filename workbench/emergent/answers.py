"""Wordings of facts as tokens, and the probability of their answers on a live model, also behind a cache of the prompt's earlier tokens."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from workbench.emergent.losses import cross_entropies
from workbench.errors import WorkbenchError
from workbench.lazy import no_grad, torch
from workbench.models.hooks import cache_name, head_sees
from workbench.models.texts import Batch, side_by_side

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

EQUAL = 1e-4
"""Largest relative difference of the probability behind a cache from the one without, with which the cache is used."""


@dataclass(frozen=True)
class FactPrompt:
    """A wording of a fact as tokens.

    Attributes:
        fact: Id of the fact.
        tokens: Tokens of the prompt and of the answer without its last one.
        prompt: Number of the prompt's tokens.
        answer: Tokens of the answer.
    """

    fact: str
    tokens: tuple[int, ...]
    prompt: int
    answer: tuple[int, ...]


@dataclass(frozen=True)
class Earlier:
    """Keys and values of a prompt's first tokens.

    Attributes:
        name: Name of the model's argument for them.
        cache: The cache, for one row.
        count: Number of the tokens.
    """

    name: str
    cache: Any
    count: int

    def of(self, rows: int) -> dict[str, Any]:
        """Return the argument of a forward pass over some rows, which may append to the cache."""
        cache = copy.deepcopy(self.cache)
        cache.batch_repeat_interleave(rows)
        return {self.name: cache, "use_cache": True}


@no_grad
def earlier_tokens(model: PreTrainedModel, prompt: FactPrompt, clean: float) -> Earlier | None:
    """Run a prompt without its last token, so that changes of its last token need no other pass over the others.

    Args:
        model: The live model.
        prompt: The prompt.
        clean: Probability of the answer in one pass over all tokens.

    Returns:
        The cache; None if there is no earlier token, or the model has no cache behind which the answer has that probability.
    """
    count = prompt.prompt - 1
    if count < 1:
        return None
    name = cache_name(model)
    tokens = torch.tensor([prompt.tokens[:count]], device=next(model.parameters()).device)
    try:
        cache = getattr(model(input_ids=tokens, use_cache=True), name, None)
        if not hasattr(cache, "batch_repeat_interleave"):
            return None
        earlier = Earlier(name, cache, count)
        found = probabilities(model, [prompt], earlier=earlier)
    except (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError):
        return None  # the cache of this architecture cannot be continued in this way
    return earlier if abs(float(found) - clean) <= EQUAL * clean else None


def probabilities(
    model: PreTrainedModel, prompts: Sequence[FactPrompt], batch: Batch | None = None, *, earlier: Earlier | None = None
) -> Tensor:
    """Return the probability of each prompt's answer, float32 [prompts].

    Args:
        model: The live model.
        prompts: The prompts.
        batch: Their tokens, if they are batched already.
        earlier: Cache of their first tokens, if all are the same prompt; only the other tokens then pass the model.

    Raises:
        WorkbenchError: If the model has no output head.
    """
    head = model.get_output_embeddings()
    if head is None:
        raise WorkbenchError(f"{type(model).__name__} has no output head", "Attributions need a causal language model.")
    device = next(model.parameters()).device
    first = earlier.count if earlier else 0
    batch = batch or side_by_side([prompt.tokens[first:] for prompt in prompts], device)
    mask, cached = batch.mask, {"use_cache": False}
    if earlier:
        mask = torch.cat([mask.new_ones(len(prompts), first), mask], 1)
        cached = earlier.of(len(prompts))
    width = batch.tokens.shape[1]
    places = [b * width + p.prompt - 1 - first + j for b, p in enumerate(prompts) for j in range(len(p.answer))]
    wanted = torch.tensor([token for prompt in prompts for token in prompt.answer], device=device)
    owner = torch.tensor([b for b, prompt in enumerate(prompts) for _ in prompt.answer], device=device)
    with head_sees(head, torch.tensor(places, device=device)):
        logits = model(input_ids=batch.tokens, attention_mask=mask, **cached).logits[0]
    losses = cross_entropies(logits, wanted)
    return losses.new_zeros(len(prompts)).index_add(0, owner, -losses).exp()
