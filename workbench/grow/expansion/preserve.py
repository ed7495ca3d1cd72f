"""Does a grown model compute what it did, and can all that was added learn? Found on the live models, cached generation included."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from workbench.errors import WorkbenchError
from workbench.grow.expansion.added import new_elements
from workbench.grow.expansion.remap import GrownWeights
from workbench.steps import GrowMethod

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

TOKENS = 24
NEW_TOKENS = 12
TOLERANCES = {"exact": 1e-6, "approximate": 1e-5}
"""Largest difference of two logits in float32, as a share of the largest logit if that is above 1."""
_REPORT = "Report this architecture; `check: off` in the step writes the model all the same."
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
) -> dict[str, Any]:
    """Compare logits of the old vocabulary on random tokens, and greedy generation with a KV cache, which a wrong layer index would spoil.

    Args:
        new_tokens: Rows of the grown vocabulary that are not compared.

    Returns:
        `{"max_logit_difference": float, "same_generation": True}`; with new tokens also `new_token_probability`, the mean share of the
        probability that they take.

    Errors: logits differ by more than the tolerance, or a generated token does (exit code 3).
    """
    tokens = prompts(before, seed, new_tokens)
    vocabulary, added = before.config.get_text_config().vocab_size, list(new_tokens)
    old, new = before(tokens).logits.float(), after(tokens).logits.float()
    same = torch.equal(_generated(before, tokens, [i for i in added if i < vocabulary]), _generated(after, tokens, added))
    found = same_logits(old, new, tolerance, step, new_tokens, f", generation {'agrees' if same else 'differs'}", same)
    return {"max_logit_difference": found.pop("max_logit_difference"), "same_generation": same, **found}


def same_logits(
    old: Tensor, new: Tensor, tolerance: float, step: str, new_tokens: Sequence[int] = (), told: str = "", agrees: bool = True
) -> dict[str, Any]:
    """Compare logits of the old vocabulary before growth with those after it.

    Args:
        old, new: [rows, tokens, vocabulary] in float32.
        tolerance: Largest difference, as a share of the largest old logit if that is above 1.
        step: Id of the step, for errors.
        new_tokens: Rows of the grown vocabulary that are not compared.
        told: What else an error says.
        agrees: Whether everything else that was compared agrees.

    Returns:
        `{"max_logit_difference": float}`; with new tokens also `new_token_probability`.

    Raises:
        WorkbenchError: the logits differ by more, or something else does (exit code 3).
    """
    vocabulary, added = old.shape[-1], list(new_tokens)
    kept = torch.ones(vocabulary, dtype=torch.bool, device=old.device)
    kept[[i for i in added if i < vocabulary]] = False
    if new.shape[-1] < vocabulary:
        raise WorkbenchError(
            f"step {step}: the grown model has {new.shape[-1]} logits, the one before growth {vocabulary}", _REPORT, 3
        )
    one, other = old[..., kept], new[..., :vocabulary][..., kept]
    difference = float((one - other).abs().max())
    if not difference <= tolerance * max(1.0, float(one.abs().max())) or not agrees:
        raise WorkbenchError(
            f"step {step}: the grown model computes something else (logits differ by {difference:.2g}{told})", _REPORT, 3
        )
    share = {"new_token_probability": float(new.softmax(-1)[..., added].sum(-1).mean())} if added else {}
    return {"max_logit_difference": difference, **share}


def finite_logits(found: Tensor, step: str) -> None:
    """Check the logits of a model that does not promise those of the one before it. Raises WorkbenchError: NaN or Inf (exit code 3)."""
    if not bool(torch.isfinite(found).all()):
        raise WorkbenchError(f"step {step}: the grown model gives NaN or infinite logits", _REPORT, 3)


def prompts(model: PreTrainedModel, seed: int = 0, without: Sequence[int] = ()) -> Tensor:
    """Random tokens [2, TOKENS] of the vocabulary."""
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(0, vocabulary, (2, TOKENS), generator=generator)
    if without:
        old = torch.tensor(sorted(set(range(vocabulary)) - set(without)))
        drawn = old[drawn % len(old)]
    return drawn if model.device.type == "meta" else drawn.to(model.device)


@torch.no_grad()
def answers(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Logits of random tokens, and tokens generated greedily with a KV cache."""
    tokens = prompts(model)
    return model(tokens).logits, _generated(model, tokens, [])


def _generated(model: PreTrainedModel, tokens: Tensor, suppressed: list[int]) -> Tensor:
    found: Tensor = model.generate(
        tokens[:1],
        attention_mask=torch.ones_like(tokens[:1]),
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        use_cache=True,
        pad_token_id=0,
        suppress_tokens=suppressed or None,
    )
    return found


def gradients(model: PreTrainedModel, method: GrowMethod, weights: GrownWeights, step: str) -> dict[str, Any]:
    """Check that everything that growth has added can learn: it has a gradient at once, or after one step, as the method says.

    A tensor behind a factor of zeros (`W_o = 0`) has no gradient at the start. The zeros get one first, are moved by it, and pass a
    gradient on from then on. Where both factors are zeros, nothing moves, and that is an error.

    Returns:
        `{"gradient": {"now": N, "after_one_step": M}}`: tensors with additions that have one; where some have none at the start, their
        names as `at_first_without`. `{}` where nothing was added.

    Raises:
        WorkbenchError: a tensor has no gradient when the method says that it has one (exit code 3).
    """
    growth = weights.growth
    learns = method.learning()
    if learns == "when_selected" or not (added := new_elements(model, weights, growth.config)):
        return {}
    parameters = dict(model.named_parameters())
    tokens = prompts(model, 1, growth.tokens)
    if shown := list(growth.tokens[: TOKENS // 2]):  # embeddings learn from texts that have the token
        tokens[:, : len(shown)] = torch.tensor(shown)
    counts: dict[str, int] = {}
    waiting: list[str] = []
    dead: list[str] = []
    for when in ("now", "after_one_step"):
        model.zero_grad()
        with torch.enable_grad():
            model(tokens, labels=tokens).loss.backward()
        dead = [name for name, mask in added.items() if not _alive(parameters[name].grad, mask)]
        counts[when] = len(added) - len(dead)
        if when == "now" and dead and learns == "after_one_step":
            waiting = dead
            _learn(parameters, added)
        elif not dead or learns == "now":
            break
    model.zero_grad()
    if dead:
        raise WorkbenchError(
            f"step {step}: {len(dead)} of {len(added)} tensors with additions have no gradient ({dead[0]}), "
            f"{'also after one step of the others, ' if waiting else ''}and could not be trained",
            _REPORT,
            3,
        )
    return {"gradient": counts, **({"at_first_without": waiting} if waiting else {})}


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
