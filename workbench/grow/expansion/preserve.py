"""Checks on live models: a grown model computes the same function, cached generation included, and its additions can learn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from workbench.ground.errors import GateFailedError
from workbench.ground.lazy import no_grad, torch
from workbench.grow.expansion.remap import GrownWeights, new_elements
from workbench.steps import GrowMethod

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

TOKENS = 24
NEW_TOKENS = 12
TOLERANCES = {"exact": 1e-6, "approximate": 1e-5}
"""Largest allowed difference of two logits in float32, relative to the largest logit if that is above 1."""
_REPORT = "Report this architecture. `check: off` in the step writes the model without this check."
_STEP = 0.05
"""Size of the gradient step after which all additions must have a gradient; the first gradient may stop at a factor of zeros."""


def check_growth_on(
    before: PreTrainedModel, after: PreTrainedModel, method: GrowMethod, weights: GrownWeights, step: str
) -> dict[str, object]:
    """Check that a growth method keeps its promises.

    Args:
        before: Live model before growth, in float32.
        after: Live model after growth, in float32. The check changes it.
        method: The growth method.
        weights: Untrained weights of `after`.
        step: Id of the step, for errors.

    Returns:
        The results of `preserved` and `gradients`.

    Raises:
        WorkbenchError: If a promise is not kept (exit code 3).
    """
    promise = method.promises()
    preservation = {} if promise == "no" else preserved(before, after, TOLERANCES[promise], step, weights.growth.tokens)
    return {**preservation, **gradients(after, method, weights, step)}


@no_grad
def preserved(
    before: PreTrainedModel, after: PreTrainedModel, tolerance: float, step: str, new_tokens: Sequence[int] = (), seed: int = 0
) -> dict[str, object]:
    """Compare the logits of the old vocabulary on random tokens, and greedy generation with a KV cache.

    Generation also depends on the layer indices of the cache, which the logits do not show.

    Args:
        before: Live model before growth.
        after: Live model after growth.
        tolerance: Largest allowed difference of logits, see `TOLERANCES`.
        step: Id of the step, for errors.
        new_tokens: Rows of the grown vocabulary that are not compared.
        seed: Seed of the random tokens.

    Returns:
        `{"max_logit_difference": float, "same_generation": True}`; with new tokens also `new_token_probability`, their mean share
        of the probability.

    Raises:
        WorkbenchError: If logits differ by more than the tolerance, or generated tokens differ (exit code 3).
    """
    tokens = prompts(before, seed, new_tokens)
    vocabulary, added = before.config.get_text_config().vocab_size, list(new_tokens)
    old, new = before(tokens).logits.float(), after(tokens).logits.float()
    same_generation = torch.equal(
        _generate(before, tokens, [i for i in added if i < vocabulary]), _generate(after, tokens, added)
    )
    result = same_logits(
        old, new, tolerance, step, new_tokens, f", generation {'agrees' if same_generation else 'differs'}", same_generation
    )
    return {"max_logit_difference": result.pop("max_logit_difference"), "same_generation": same_generation, **result}


def same_logits(
    old: Tensor, new: Tensor, tolerance: float, step: str, new_tokens: Sequence[int] = (), details: str = "", agrees: bool = True
) -> dict[str, object]:
    """Compare the logits of the old vocabulary before and after growth.

    Args:
        old: Logits before growth [rows, tokens, vocabulary] in float32.
        new: Logits after growth [rows, tokens, vocabulary] in float32.
        tolerance: Largest allowed difference, relative to the largest old logit if that is above 1.
        step: Id of the step, for errors.
        new_tokens: Rows of the grown vocabulary that are not compared.
        details: Additional text of an error.
        agrees: Whether the caller's other comparisons agree.

    Returns:
        `{"max_logit_difference": float}`; with new tokens also `new_token_probability`.

    Raises:
        WorkbenchError: If the logits differ by more, or `agrees` is false (exit code 3).
    """
    vocabulary, added = old.shape[-1], list(new_tokens)
    compared = torch.ones(vocabulary, dtype=torch.bool, device=old.device)
    compared[[i for i in added if i < vocabulary]] = False
    if new.shape[-1] < vocabulary:
        raise GateFailedError(
            f"step {step}: the grown model has {new.shape[-1]} logits, the model before growth {vocabulary}", _REPORT
        )
    # Token by token: differences of all logits of a large vocabulary take as much memory as a small model.
    rows = list(zip(old.flatten(0, 1), new.flatten(0, 1), strict=True))
    difference = float(torch.stack([(one - other[:vocabulary])[compared].abs().max() for one, other in rows]).max())
    largest = max(float(one[compared].abs().max()) for one, _ in rows)
    if not difference <= tolerance * max(1.0, largest) or not agrees:
        raise GateFailedError(
            f"step {step}: the grown model computes something else (logits differ by {difference:.2g}{details})", _REPORT
        )
    if not added:
        return {"max_logit_difference": difference}
    shares = torch.stack([other.softmax(-1)[added].sum() for _, other in rows])
    return {"max_logit_difference": difference, "new_token_probability": float(shares.mean())}


def finite_logits(logits: Tensor, step: str) -> None:
    """Check that logits are finite, for a model that does not promise the logits of the model before growth.

    Raises:
        WorkbenchError: If a logit is NaN or infinite (exit code 3).
    """
    if not bool(torch.isfinite(logits).all()):
        raise GateFailedError(f"step {step}: the grown model gives NaN or infinite logits", _REPORT)


def prompts(model: PreTrainedModel, seed: int = 0, without: Sequence[int] = ()) -> Tensor:
    """Return random tokens [2, TOKENS] of the model's vocabulary, without the tokens in `without`."""
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, vocabulary, (2, TOKENS), generator=generator)
    if without:
        allowed = torch.tensor(sorted(set(range(vocabulary)) - set(without)))
        tokens = allowed[tokens % len(allowed)]
    return tokens if model.device.type == "meta" else tokens.to(model.device)


@no_grad
def answers(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Return the logits of random tokens, and tokens generated greedily with a KV cache."""
    tokens = prompts(model)
    return model(tokens).logits, _generate(model, tokens, [])


def _generate(model: PreTrainedModel, tokens: Tensor, suppressed: list[int]) -> Tensor:
    """Return the tokens of the first row with its greedy continuation, without the suppressed tokens."""
    generated: Tensor = model.generate(
        tokens[:1],
        attention_mask=torch.ones_like(tokens[:1]),
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        use_cache=True,
        pad_token_id=0,
        suppress_tokens=suppressed or None,
    )
    return generated


def gradients(model: PreTrainedModel, method: GrowMethod, weights: GrownWeights, step: str) -> dict[str, object]:
    """Check that all additions can learn: they have a gradient at once, or after one step, as the method declares.

    A tensor whose output is multiplied by zeros (`W_o = 0`) has no gradient at the start. The zeros get a gradient first, change,
    and pass a gradient on from then on. If both factors are zeros, nothing changes, and that is an error.

    Args:
        model: Live grown model.
        method: The growth method.
        weights: Weights of `model`.
        step: Id of the step, for errors.

    Returns:
        `{"gradient": {"now": N, "after_one_step": M}}`, the numbers of tensors with additions that have a gradient. If some have
        none at the start, `at_first_without` lists their names. `{}` if nothing was added.

    Raises:
        WorkbenchError: If a tensor has no gradient although the method declares one (exit code 3).
    """
    growth = weights.growth
    learns = method.learning()
    if learns == "when_selected" or not (added := new_elements(model, weights, growth.config)):
        return {}
    parameters = dict(model.named_parameters())
    tokens = prompts(model, 1, growth.tokens)
    if new_tokens := list(growth.tokens[: TOKENS // 2]):  # embeddings learn only from texts that contain the token
        tokens[:, : len(new_tokens)] = torch.tensor(new_tokens)
    counts: dict[str, int] = {}
    waiting: list[str] = []
    without_gradient: list[str] = []
    for phase in ("now", "after_one_step"):
        model.zero_grad()
        with torch.enable_grad():
            model(tokens, labels=tokens).loss.backward()
        without_gradient = [name for name, mask in added.items() if not _has_gradient(parameters[name].grad, mask)]
        counts[phase] = len(added) - len(without_gradient)
        if phase == "now" and without_gradient and learns == "after_one_step":
            waiting = without_gradient
            _gradient_step(parameters, added)
        elif not without_gradient or learns == "now":
            break
    model.zero_grad()
    if without_gradient:
        raise GateFailedError(
            f"step {step}: {len(without_gradient)} of {len(added)} tensors with additions have no gradient ({without_gradient[0]}), "
            f"{'even after one gradient step on the others, ' if waiting else ''}and cannot be trained",
            _REPORT,
        )
    return {"gradient": counts, **({"at_first_without": waiting} if waiting else {})}


def _has_gradient(gradient: Tensor | None, mask: Tensor | None) -> bool:
    """Return whether a parameter has a nonzero gradient at its added elements."""
    return gradient is not None and bool((gradient if mask is None else gradient[mask]).any())


@no_grad
def _gradient_step(parameters: Mapping[str, Tensor], added: Mapping[str, Tensor | None]) -> None:
    """Take one gradient step on the additions, scaled so that they change noticeably."""
    for name, mask in added.items():
        parameter, gradient = parameters[name], parameters[name].grad
        if gradient is not None:
            change = gradient if mask is None else gradient * mask
            size = change.abs().max()
            parameter.sub_(_STEP * change / size if size > 0 else change)
