"""Does a grown model compute what it did, and can all that was added learn? Found on the live models, cached generation included."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from workbench.errors import WorkbenchError
from workbench.grow.added import new_elements
from workbench.grow.remap import GrownWeights
from workbench.registry import GrowMethod

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

TOKENS = 24
NEW_TOKENS = 12
TOLERANCES = {"exact": 1e-6, "approximate": 1e-5}
"""Largest difference of two logits in float32, as a share of the largest logit if that is above 1."""
_STEP = 0.05
"""Of the gradient step after which everything that was added has to have a gradient; the first one may stop at a factor of zeros."""


def check_growth_on(
    before: PreTrainedModel,
    after: PreTrainedModel,
    method: GrowMethod,
    weights: GrownWeights,
    step: str,
) -> dict[str, Any]:
    """Check what a growth method declares of itself.

    Args:
        before, after: Live models in float32; `after` is changed by it.
        weights: Of `after`, untrained.

    Returns:
        What `preserved` and `gradients` found.

    Errors: a promise that is not kept (exit code 3).
    """
    promise = method.promises()
    found = {} if promise == "no" else preserved(before, after, TOLERANCES[promise], step, weights.growth.tokens)
    return {**found, **gradients(after, method, weights, step)}


@torch.no_grad()
def preserved(
    before: PreTrainedModel, after: PreTrainedModel, tolerance: float, step: str, new_tokens: Sequence[int] = (), seed: int = 0
) -> dict[str, Any]:  # fmt: skip
    """Compare logits of the old vocabulary on random tokens, and greedy generation with a KV cache, which a wrong layer index would spoil.

    Args:
        new_tokens: Rows of the grown vocabulary that are not compared.

    Returns:
        `{"max_logit_difference": float, "same_generation": True}`; with new tokens also `new_token_probability`, the mean share of the
        probability that they take.

    Errors: logits differ by more than the tolerance, or a generated token does (exit code 3).
    """
    tokens = _tokens(before, seed, new_tokens)
    vocabulary = before.config.get_text_config().vocab_size
    added = list(new_tokens)
    kept = torch.ones(vocabulary, dtype=torch.bool)
    kept[[i for i in added if i < vocabulary]] = False
    logits = after(tokens).logits.float()
    old, new = (found[..., :vocabulary][..., kept.to(found.device)] for found in (before(tokens).logits.float(), logits))
    difference = float((old - new).abs().max())
    same = torch.equal(_generated(before, tokens, [i for i in added if i < vocabulary]), _generated(after, tokens, added))
    if not difference <= tolerance * max(1.0, float(old.abs().max())) or not same:
        raise WorkbenchError(
            f"step {step}: the grown model computes something else (logits differ by {difference:.2g}, "
            f"generation {'agrees' if same else 'differs'})",
            "Report this architecture; `check: off` in the step writes the model all the same.",
            3,
        )
    share = {"new_token_probability": float(logits.softmax(-1)[..., added].sum(-1).mean())} if added else {}
    return {"max_logit_difference": difference, "same_generation": same, **share}


def _tokens(model: PreTrainedModel, seed: int = 0, without: Sequence[int] = ()) -> Tensor:
    """Random tokens [2, TOKENS] of the vocabulary."""
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(0, vocabulary, (2, TOKENS), generator=generator)
    if without:
        old = torch.tensor(sorted(set(range(vocabulary)) - set(without)))
        drawn = old[drawn % len(old)]
    return drawn.to(model.device)


@torch.no_grad()
def answers(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Logits of random tokens, and tokens generated greedily with a KV cache."""
    tokens = _tokens(model)
    return model(tokens).logits, _generated(model, tokens, [])


def _generated(model: PreTrainedModel, tokens: Tensor, suppressed: list[int]) -> Tensor:
    found: Tensor = model.generate(
        tokens[:1], attention_mask=torch.ones_like(tokens[:1]), max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False,
        use_cache=True, pad_token_id=0, suppress_tokens=suppressed or None,
    )  # fmt: skip
    return found


def gradients(model: PreTrainedModel, method: GrowMethod, weights: GrownWeights, step: str) -> dict[str, Any]:
    """Whether everything that growth has added has a gradient, at once or after one step, as the method says.

    Returns:
        `{"gradient": {"now": N, "after_one_step": M}}`: tensors with additions that have one; `{}` where nothing was added.

    Errors: one that has none when the method says it has (exit code 3).
    """
    growth = weights.growth
    if method.learns == "when_selected" or not (added := new_elements(model, weights, growth.config)):
        return {}
    parameters = dict(model.named_parameters())
    tokens = _tokens(model, 1, growth.tokens)
    if shown := list(growth.tokens[: TOKENS // 2]):  # embeddings learn from texts that have the token
        tokens[:, : len(shown)] = torch.tensor(shown)
    counts: dict[str, int] = {}
    dead: list[str] = []
    for when in ("now", "after_one_step"):
        model.zero_grad()
        with torch.enable_grad():
            model(tokens, labels=tokens).loss.backward()
        dead = [name for name, mask in added.items() if not _alive(parameters[name].grad, mask)]
        counts[when] = len(added) - len(dead)
        if when == "now" and dead and method.learns == "after_one_step":
            _learn(parameters, added)
        elif not dead or method.learns == "now":
            break
    model.zero_grad()
    if dead:
        raise WorkbenchError(
            f"step {step}: {len(dead)} of {len(added)} tensors with additions have no gradient ({dead[0]}), and could not be trained",
            "Report this architecture; `check: off` in the step writes the model all the same.",
            3,
        )
    return {"gradient": counts}


def _alive(gradient: Tensor | None, mask: Tensor | None) -> bool:
    return gradient is not None and bool((gradient if mask is None else gradient[mask]).any())


@torch.no_grad()
def _learn(parameters: Mapping[str, Tensor], added: Mapping[str, Tensor | None]) -> None:
    """One gradient step of what was added, scaled so that it moves."""
    for name, mask in added.items():
        parameter, gradient = parameters[name], parameters[name].grad
        if gradient is not None:
            change = gradient if mask is None else gradient * mask
            size = change.abs().max()
            parameter.sub_(_STEP * change / size if size > 0 else change)
