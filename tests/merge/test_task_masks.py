"""Localize-and-Stitch, TALL masks and consensus, against their formulas in plain torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from worlds.merging import BASE, ONE, TWO, merge, models, reference_trim
from worlds.project import Project

import workbench.weights.specs as specs_module
from workbench.errors import WorkbenchError

WEIGHTS = {"brick0": 0.5, "brick1": 1.0, "brick2": 1.5}


def deltas(seed: int = 3) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """A base of zeros, on which result and delta are the same floats, and three deltas."""
    base, bricks = models(3, seed=seed)
    return {n: torch.zeros_like(t) for n, t in base.items()}, {
        k: {n: t - base[n] for n, t in brick.items()} for k, brick in bricks.items()
    }


def test_localize_and_stitch_over_the_model() -> None:
    """The mask is that of a brick's whole delta; where masks overlap, the mean of the claims."""
    base, bricks = deltas()
    ours = merge("localize_and_stitch", base, bricks, density=0.3, bricks=WEIGHTS, **{"lambda": 0.7})
    claims = [reference_trim(torch.cat([t.reshape(-1) for t in brick.values()]), 0.3) for brick in bricks.values()]
    total = sum(w * c for w, c in zip(WEIGHTS.values(), claims, strict=True))
    count = torch.stack([c != 0 for c in claims]).sum(0)
    assert (count > 1).any()
    assert (count == 0).any()
    assert isinstance(total, Tensor)
    expected = 0.7 * total / count.clamp_min(1)
    torch.testing.assert_close(torch.cat([ours[n].reshape(-1) for n in base]), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("elements", [13, 1 << 18])
def test_localize_and_stitch_by_tensor(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of equal magnitudes are claimed, in blocks of any size."""
    monkeypatch.setattr(specs_module, "BLOCK_ELEMENTS", elements)
    base, bricks = deltas()
    bricks = {k: {n: (t * 16).round() / 16 for n, t in brick.items()} for k, brick in bricks.items()}
    ours = merge("localize_and_stitch", base, bricks, density=0.4, threshold="tensor")
    for name in base:
        claims = torch.stack([reference_trim(brick[name], 0.4) for brick in bricks.values()])
        expected = claims.sum(0) / (claims != 0).sum(0).clamp_min(1)
        torch.testing.assert_close(ours[name], expected, atol=1e-6, rtol=0)


def reference_masks(bricks: dict[str, dict[str, Tensor]], name: str, threshold: float) -> tuple[Tensor, Tensor]:
    """m_t = 1[|τ_t| ≥ λ |τ_mt − τ_t|] of every brick, and τ_mt."""
    weighted = torch.stack([w * bricks[k][name] for k, w in WEIGHTS.items()])
    merged = weighted.sum(0)
    return torch.stack([t.abs() >= threshold * (merged - t).abs() for t in weighted]), merged


@pytest.mark.parametrize("threshold", [0.0, 0.2, 0.6, 2.0])
@pytest.mark.parametrize("chosen", [0, 2])
def test_tall_mask(chosen: int, threshold: float) -> None:
    base, bricks = deltas()
    fields: dict[str, Any] = {"lambda": 0.5, "threshold": threshold, "bricks": WEIGHTS}
    ours = merge("tall_mask", base, bricks, brick=f"brick{chosen}", **fields)
    for name in base:
        masks, merged = reference_masks(bricks, name, threshold)
        torch.testing.assert_close(ours[name], 0.5 * masks[chosen] * merged, atol=1e-6, rtol=0)
    if chosen == 0:
        assert all(torch.equal(ours[n], merge("tall_mask", base, bricks, **fields)[n]) for n in base), "the first by default"


@pytest.mark.parametrize("least", [1, 2, 3])
def test_consensus(least: int) -> None:
    base, bricks = deltas()
    ours = merge("consensus", base, bricks, least=least, threshold=0.6, bricks=WEIGHTS, **{"lambda": 0.5})
    for name in base:
        masks, merged = reference_masks(bricks, name, 0.6)
        torch.testing.assert_close(ours[name], 0.5 * (masks.sum(0) >= least) * merged, atol=1e-6, rtol=0)


def test_by_hand() -> None:
    """Two bricks, threshold 1: an element of the sum belongs to the larger one, or to both where they are equal."""
    tuned = {"one": {"w": BASE + ONE}, "two": {"w": BASE + TWO}}
    one = merge("tall_mask", {"w": BASE}, tuned, brick="one", threshold=1)["w"] - BASE
    expected = torch.tensor([[0.4, 0.0, 0.0], [0.0, -0.4, 0.0]])
    torch.testing.assert_close(one, expected, atol=1e-6, rtol=0)
    both = merge("consensus", {"w": BASE}, tuned, threshold=0.5)["w"] - BASE
    # |τ₁| and |τ₂| within a factor of two: the third column, and the first of the second row.
    torch.testing.assert_close(both, torch.tensor([[0.0, 0.0, 0.8], [0.5, 0.0, -0.2]]), atol=1e-6, rtol=0)
    stitched = merge("localize_and_stitch", {"w": BASE}, tuned, density=0.5)["w"] - BASE
    # One claims .6 -.5 .4, two claims -.4 .5 -.6; they meet in the last element.
    torch.testing.assert_close(stitched, torch.tensor([[0.6, -0.4, 0.5], [0.0, -0.5, -0.1]]), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ("{merge: tall_mask, brick: three}", "expected one of the step's bricks .one, two., found 'three'"),
        ("{merge: tall_mask, threshold: -1}", "expected a threshold of 0 or more"),
        ("{merge: consensus, least: 3}", "3 bricks must use an element, but the step merges 2"),
        ("{merge: localize_and_stitch, density: {first: 0.1, last: 0.2}}", "one threshold per brick"),
    ],
)
def test_refused(project: Project, step: str, message: str) -> None:
    with pytest.raises(WorkbenchError, match=message):
        project.resolve(f"bricks: {{one: bricks/one, two: bricks/two}}\nsteps: [{step}]\n")
