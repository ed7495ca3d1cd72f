"""What mergekit 0.1 offers: a table for `workbench methods`, and access through its public API.

Only this module imports mergekit, inside functions and only when a recipe uses it: that takes seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from workbench.ground.errors import WorkbenchError
from workbench.ground.files import json_digest
from workbench.ground.identity import installed
from workbench.steps import Laws

if TYPE_CHECKING:
    from torch import Tensor


INSTALL = "pip install 'mergekit>=0.1.5,<0.2'"


class Parameter(NamedTuple):
    """A parameter of a method, as mergekit's specification states it."""

    name: str
    kind: str
    """"float", "int" or "bool"."""
    per_brick: bool
    required: bool
    """True if a mergekit file must set it."""
    default: Any
    """Value where a recipe sets none; None if it must."""
    validate: Callable[[Any], Any]


@cache
def method(name: str) -> Any:
    """Return mergekit's method object.

    Raises:
        WorkbenchError: If mergekit is missing, has an unsupported version or cannot be imported, or has no such method.
    """
    found = installed("mergekit")["mergekit"]
    if found == "not installed":
        raise WorkbenchError(f"mergekit/{name} needs mergekit, which is not installed", INSTALL)
    if not found.startswith("0.1.") or _numbers(found) < (0, 1, 5):
        raise WorkbenchError(f"mergekit/{name} needs mergekit >=0.1.5,<0.2; found {found}", INSTALL)
    try:
        from mergekit import merge_methods
    except ImportError as error:
        raise WorkbenchError(f"mergekit/{name}: mergekit {found} cannot be imported ({error})", INSTALL) from error
    try:
        return merge_methods.get(name)
    except RuntimeError:
        raise WorkbenchError(f"mergekit {found} has no method {name}", INSTALL) from None


@cache
def parameters(name: str) -> dict[str, Parameter]:
    """Return a method's parameters by name, from mergekit's specification."""
    by_name = {}
    for spec in method(name).spec.parameters:
        text = str(spec.value_type)
        kind = next(k for k in ("bool", "int", "float") if k in text)
        # mergekit wants each model's weight in the file; in a recipe a brick without a weight has weight 1, whatever the method.
        default = 1.0 if spec.name == "weight" else None if spec.required else spec.default
        by_name[spec.name] = Parameter(spec.name, kind, spec.scope.value != "shared", spec.required, default, spec.validate)
    return by_name


def base_policy(name: str) -> str:
    """Return whether the base is "required", "optional" or "ignored" as an input of a method."""
    return str(method(name).spec.contract.base.value)


@cache
def merge_tensors() -> Callable[..., Tensor]:
    """Return mergekit's function that merges the tensors of several models."""
    from mergekit.merge_methods.api import merge_tensors

    return merge_tensors  # type: ignore[no-any-return]


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:3] if part.isdigit())


def version_number() -> int:
    """Return the version number for cache keys: the bridge's version and mergekit's, so that a new mergekit computes again."""
    numbers = (*_numbers(installed("mergekit")["mergekit"]), 0, 0, 0)[:3]
    return 1_000_000 + numbers[0] * 10_000 + numbers[1] * 100 + numbers[2]


def seed_of(seed: int, tensor: str, keys: Sequence[str]) -> int:
    """Return a 60-bit seed for a tensor's random numbers, from the recipe's seed, the tensor's name and the bricks' keys."""
    return int(json_digest([seed, tensor, list(keys)])[:15], 16)


_TIES_VOTE = "elect γ = sign(Σ wᵢτ̂ᵢ), keep what agrees"
_BOUNDED = (0.0, 1.0)
_POSITIVE = (0.0, float("inf"))


@dataclass(frozen=True)
class Known:
    """A method of mergekit.

    Attributes:
        text: First sentence of its description in `workbench methods`.
        formula: Formula of the result.
        paper: Reference.
        parameters: mergekit's parameters with their defaults; `*` marks those that may differ from brick to brick.
        laws: Properties that a test checks.
        ranges: Parameter -> smallest and largest valid value; mergekit itself accepts any number.
    """

    text: str
    formula: str
    paper: str
    parameters: str
    laws: Laws
    ranges: dict[str, tuple[float, float]] = field(default_factory=dict)


def _laws(
    *,
    random: bool = False,
    zero: bool = True,
    single: bool = True,
    linear: bool = False,
    arity: tuple[int, int | None] = (1, None),
) -> Laws:
    return Laws(
        zero_is_base=zero,
        permutation_invariant=True,
        single_is_identity=single,
        linear_in_weight=linear,
        passes=2,
        memory="tensor",
        random=random,
        arity=arity,
    )


def _task_vectors(
    text: str,
    formula: str,
    paper: str,
    extra: str = "",
    *,
    normalize: bool = False,
    random: bool = False,
    **ranges: tuple[float, float],
) -> Known:
    """Describe a method of mergekit's task-vector family (sparsify, vote, sum), whose methods share these parameters.

    Methods that drop elements at random rescale the rest by default.
    """
    parameters = (
        f"weight* (1), density* (1){extra}, lambda (1), normalize ({str(normalize).lower()}), "
        f"rescale ({str(random).lower()}: match the L1 norm of the delta before the drop), int8_mask (no effect on the result)"
    )
    laws = _laws(random=random, linear=not normalize)
    return Known(text, formula, paper, parameters, laws, {"density": _BOUNDED, **ranges})


KNOWN: dict[str, Known] = {
    "linear": Known(
        "Weighted mean of the bricks' weights, without the base", "θ = Σ wᵢθᵢ / Σ wᵢ", "Wortsman et al. 2022, Model soups, arXiv 2203.05482",
        "weight* (1), normalize (true)", _laws(zero=False)),
    "slerp": Known(
        "Spherical interpolation from the base to one brick", "θ = sin((1−t)φ)/sin φ · θ₀ + sin(tφ)/sin φ · θ₁,  φ the angle between them",
        "Shoemake 1985, Animating rotation with quaternion curves", "t (required; 0 = base, 1 = brick)", _laws(single=False, arity=(1, 1))),
    "nuslerp": Known(
        "Spherical interpolation between two bricks, of their deltas or of their weights", "θ = θ₀ + slerp(τ₁, τ₂; t),  t = w₂ / (w₁ + w₂)", "",
        "weight* (1), nuslerp_flatten (true), nuslerp_row_wise (false)", _laws(zero=False, single=False, arity=(2, 2))),
    "multislerp": Known(
        "Barycenter of the bricks on the sphere, of their deltas or of their weights", "θ = θ₀ + ‖τ‖ · exp_m(Σ wᵢ log_m(τᵢ/‖τᵢ‖)),  m the weighted mean direction",
        "Goddard, Multi-SLERP, goddard.blog/posts/multislerp-wow-what-a-cool-idea",
        "weight* (1), normalize_weights (true), eps (1e-8)", _laws(zero=False), {"eps": _POSITIVE}),
    "karcher": Known(
        "Karcher mean of the bricks' directions, times the mean of their norms, without the base", "θ = mean‖θᵢ‖ · argmin_u Σ angle(u, θᵢ)²",
        "arXiv 2603.04972", "max_iter (10), tol (1e-5)", _laws(), {"max_iter": _POSITIVE, "tol": _POSITIVE}),
    "task_arithmetic": _task_vectors(
        "Base plus the weighted sum of deltas", "θ = θ₀ + λ Σ wᵢτᵢ", "Ilharco et al. 2023, Editing models with task arithmetic, arXiv 2212.04089"),
    "ties": _task_vectors(
        "Trim by magnitude, elect signs by weighted mass, average the deltas that agree", f"θ = θ₀ + λ Σ wᵢτ̂ᵢ / Σ wᵢ over the deltas that agree;  {_TIES_VOTE}",
        "Yadav et al. 2023, TIES-Merging, arXiv 2306.01708", normalize=True),
    "dare_linear": _task_vectors(
        "Random drop of each delta, then the weighted sum", "θ = θ₀ + λ Σ wᵢ drop(τᵢ)", "Yu et al. 2023, DARE, arXiv 2311.03099",
        random=True),
    "dare_ties": _task_vectors(
        "Random drop of each delta, then signs by weighted mass and the sum of the deltas that agree", f"θ = θ₀ + λ Σ wᵢ drop(τᵢ);  {_TIES_VOTE}",
        "Yu et al. 2023, DARE, arXiv 2311.03099", random=True),
    "della": _task_vectors(
        "Drop by magnitude rank in each row, then signs by weighted mass and the mean of the deltas that agree", f"θ = θ₀ + λ Σ wᵢ drop(τᵢ) / Σ wᵢ;  {_TIES_VOTE}",
        "Deep et al. 2024, DELLA-Merging, arXiv 2406.11617", ", epsilon* (0.15: density ± epsilon over the ranks)",
        normalize=True, random=True, epsilon=_BOUNDED),
    "della_linear": _task_vectors(
        "Drop by magnitude rank in each row, then the weighted sum", "θ = θ₀ + λ Σ wᵢ drop(τᵢ)",
        "Deep et al. 2024, DELLA-Merging, arXiv 2406.11617", ", epsilon* (0.15: density ± epsilon over the ranks)",
        random=True, epsilon=_BOUNDED),
    "breadcrumbs": _task_vectors(
        "Drop the largest and the smallest elements of each delta, then the weighted sum", "θ = θ₀ + λ Σ wᵢ mask(τᵢ)",
        "Davari and Belilovsky 2023, Model Breadcrumbs, arXiv 2312.06795", ", gamma* (0.01: share of the largest dropped)", gamma=_BOUNDED),
    "breadcrumbs_ties": _task_vectors(
        "Drop the largest and the smallest elements of each delta, then signs by weighted mass and the sum of the deltas that agree", f"θ = θ₀ + λ Σ wᵢ mask(τᵢ);  {_TIES_VOTE}",
        "Davari and Belilovsky 2023, Model Breadcrumbs, arXiv 2312.06795", ", gamma* (0.01: share of the largest dropped)", gamma=_BOUNDED),
    "sce": Known(
        "Select elements by variance over the bricks, weigh deltas by their energy, elect signs", "θ = θ₀ + Σ eᵢτ̂ᵢ / Σ eᵢ,  eᵢ = mean(τ̂ᵢ²)",
        "Wan et al. 2024, FuseChat, arXiv 2408.07990", "select_topk (1), int8_mask (no effect on the result)", _laws(), {"select_topk": _BOUNDED}),
    "model_stock": Known(
        "Interpolation between the base and the mean of two or more bricks, by the angle of their deltas", "θ = t · mean θᵢ + (1−t) θ₀,  t = N cos φ / (1 + (N−1) cos φ)",
        "Jang et al. 2024, Model Stock, arXiv 2403.19522", "filter_wise (false)", _laws(single=False, arity=(2, None))),
    "ram": Known(
        "Sum of the elements that only one brick changes, mean of those that several bricks change", "θ = θ₀ + Σ τᵢ / n,  n = #{i : |τᵢ| > ε}",
        "Reinforced Agent Merging, arXiv 2601.13572", "epsilon (1e-5: smallest change that counts)", _laws(single=False), {"epsilon": _POSITIVE}),
    "ramplus_tl": Known(
        "The same as ram, but elements that only one brick changes are scaled up by how much that brick shares", "θ = θ₀ + Σ λᵢτᵢ (alone), Σ τᵢ/n (shared),  λᵢ = 1 + r · min(shared/alone, α)",
        "Reinforced Agent Merging, arXiv 2601.13572", "epsilon (1e-5), r (0.1), alpha (0.2)", _laws(single=False), {"epsilon": _POSITIVE, "alpha": _POSITIVE}),
    "nearswap": Known(
        "Step from the base toward one brick, larger where the two are closer", "θ = θ₀ + min(1, t/|θ₁−θ₀|) · (θ₁−θ₀)",
        "alchemonaut, huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001", "t (required)", _laws(single=False, arity=(1, 1)), {"t": _POSITIVE}),
    "arcee_fusion": Known(
        "The elements of one brick whose importance |Δ|·KL is an outlier by the quartile rule", "θ = θ₀ + [s ≥ median + 1.5 IQR] · τ,  s = |τ| · KL(softmax θ₁ ‖ softmax θ₀)",
        "Arcee, arcee.ai", "none", _laws(random=True, single=False, arity=(1, 1))),
    "passthrough": Known(
        "One brick's weights, optionally scaled", "θ = scale · θ₁", "", "scale* (none)", _laws(arity=(1, 1))),
}  # fmt: skip
