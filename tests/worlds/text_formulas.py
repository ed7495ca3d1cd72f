"""The formula of each merge method that reads texts, given what it measured, in float64, without the package."""

from __future__ import annotations

from typing import Any

import torch

from worlds.formulas import Result, World, column, combined, linear, scaled_sum


def cocktail(world: World, name: str, _weights: list[float], _fields: dict[str, Any]) -> Result:
    """Σ wᵢθᵢ with the weights that follow from losses."""
    return combined(world, name, list(world.measured.values()))


def aim(world: World, name: str, weights: list[float], fields: dict[str, Any]) -> Result:
    """λ Σ wᵢτᵢ · diag(1 − (1 − ω) aⱼ / maxⱼ aⱼ)."""
    found = scaled_sum(world, name, weights, fields)
    if name not in world.measured:
        return found
    used = world.measured[name].double()
    share = 1 - (1 - fields["omega"]) * used / used.max() if used.max() > 0 else torch.ones_like(used)
    share = share[:, None] if world.flipped(name) else share
    return Result(found.delta * share, found.size)


def fisher(world: World, name: str, weights: list[float], fields: dict[str, Any]) -> Result:
    """Σ wᵢFᵢτᵢ / Σ wᵢFᵢ."""
    if any(name not in values for values in world.measured):
        return linear(world, name, weights, {})
    information = torch.stack([values[name].double().clamp_min(fields["floor"]) for values in world.measured])
    shares = information * column(weights, information)
    shares = shares / shares.sum(0)
    return Result((shares * world.stack(name)).sum(0), (shares * world.stack(name)).abs().sum(0))


def regmean(world: World, name: str, weights: list[float], fields: dict[str, Any]) -> Result:
    """(Σ wᵢτᵢGᵢ)(Σ wᵢGᵢ)⁻¹ with Gᵢ = shrink(mean of x xᵀ) + ε·I; the weighted mean of what is no linear layer."""
    if any(name not in grams for grams in world.measured):
        return linear(world, name, weights, {})
    shrunk = [g[name].double() for g in world.measured]
    shrunk = [fields["off_diagonal"] * g + (1 - fields["off_diagonal"]) * g.diagonal().diag() for g in shrunk]
    left = sum(w * g for w, g in zip(weights, shrunk, strict=True))
    epsilon = fields["ridge"] * left.diagonal().mean() / sum(weights)
    if float(epsilon) == 0:
        return linear(world, name, weights, {})
    shrunk = [g + epsilon * torch.eye(len(g)) for g in shrunk]
    stack = world.stack(name)
    right = sum(w * (tau.T if world.flipped(name) else tau) @ g for w, tau, g in zip(weights, stack, shrunk, strict=True))
    solved = right @ torch.linalg.inv(sum(w * g for w, g in zip(weights, shrunk, strict=True)))
    return Result(solved.T if world.flipped(name) else solved, torch.full(stack.shape[1:], float(stack.norm())).double())


def null_space(world: World, name: str, weights: list[float], fields: dict[str, Any]) -> Result:
    """λ (wₖτₖ + Σ wᵢτᵢ · ε(G + εI)⁻¹), by the eigenvectors of G; λ wₖτₖ alone where no inputs were measured."""
    stack, scale = world.stack(name), fields["lambda"]
    kept = torch.zeros_like(stack[0])
    if (keep := fields["kept"]) is not None:
        kept = scale * weights[keep] * stack[keep]
    if name not in world.measured:
        return Result(kept, kept.abs())
    others = scale * sum(
        (w * tau for i, (w, tau) in enumerate(zip(weights, stack, strict=True)) if i != keep), torch.zeros_like(kept)
    )
    gram = world.measured[name].double().T @ world.measured[name].double() / len(world.measured[name])
    values, vectors = torch.linalg.eigh(gram)
    epsilon = fields["ridge"] * gram.diagonal().mean()
    left = vectors * (epsilon / (values.clamp_min(0) + epsilon) if epsilon > 0 else 1.0) @ vectors.T
    others = left @ others if world.flipped(name) else others @ left
    return Result(
        kept + others, torch.full(kept.shape, float(abs(scale) * (column(weights, stack).abs() * stack).norm())).double()
    )
