"""Drawn bases with bricks, and the formula of each merge method in float64, without the package."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import xxhash
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((), (1,), (7,), (0,), (1, 1), (5, 3), (13, 4), (1, 9), (9, 1), (0, 4), (3, 0), (17, 6), (8, 8), (2, 5, 3), (6, 11),
          (12, 1, 4), (2, 30))  # fmt: skip
NAMES = ("layers.0.up.weight", "layers.1.mlp.c_fc.weight", "layers.1.norm")
TABLES = ("model.embed_tokens.weight", "wte.weight", "lm_head.weight")
WEIGHTS = st.sampled_from((1.0, 0.5, -1.0, 0.0, 2.0, 0.25, 0.75))
DENSITIES = st.sampled_from((0.5, 0.0, 1.0, 0.2, 0.01, 0.77))
LAMBDAS = st.sampled_from((1.0, 0.5, 1.0, -0.25, 2.0, 0.0))
Tensors = dict[str, Tensor]
Pairs = dict[str, tuple[Tensor, Tensor]]


@dataclass
class World:
    """A base with bricks, as stored, and what a formula reads of them.

    Attributes:
        base: Name -> tensor.
        bricks: For each brick its checkpoint, or the factors of its adapter.
        adapters: The numbers of the bricks that are adapters.
        deltas: For each brick name -> delta in float64: the float32 difference of a checkpoint, the product of an adapter.
        exact: Whether all numbers are multiples of 1/16 below 2⁷, so that float32 compares and adds them without rounding.
        conv1d: Whether `c_fc` is stored as [in, out].
        block: Elements of a block of rows.
        out: Dtype of the result.
    """

    base: Tensors
    bricks: list[Tensors | Pairs]
    adapters: set[int]
    deltas: list[Tensors]
    exact: bool
    conv1d: bool
    block: int
    out: torch.dtype
    measured: Any = field(default=None)

    def flipped(self, name: str) -> bool:
        return self.conv1d and "c_fc" in name

    def stack(self, name: str) -> Tensor:
        return torch.stack([delta[name] for delta in self.deltas])


@st.composite
def worlds(draw: st.DrawFn, least: int = 1, most: int = 5, adapters: bool = True) -> World:
    exact, seed = draw(st.booleans()), draw(st.integers(0, 2**32))
    generator = torch.Generator().manual_seed(seed)

    def values(shape: tuple[int, ...], size: float) -> Tensor:
        if exact:
            return torch.randint(-int(8 * size), int(8 * size) + 1, shape, generator=generator) / 8
        return torch.randn(shape, generator=generator) * size / 4

    def dtype() -> torch.dtype:
        return draw(st.sampled_from(DTYPES))

    names = (*NAMES[: draw(st.integers(2, 3))], *draw(st.sampled_from((TABLES[:1], TABLES[1:2], TABLES[2:], ()))))
    base = {name: values(draw(st.sampled_from(SHAPES)), 7).to(dtype()) for name in names}
    bricks: list[Tensors | Pairs] = []
    made, deltas = set[int](), list[Tensors]()
    kinds = ("changed", "changed", "opposite", "twin", "unchanged", *(("adapter",) if adapters else ()))
    only = ("adapter",) if adapters and draw(st.integers(0, 5)) == 0 else kinds
    for _ in range(draw(st.integers(least, most))):
        kind, stored, last = draw(st.sampled_from(only)), dtype(), deltas[-1] if deltas else None
        if kind == "adapter":
            rank = draw(st.integers(1, 3))
            sizes = {name: tuple(t.shape) for name, t in base.items() if t.dim() == 2 and t.numel()}
            pairs = {n: tuple(torch.randint(-2, 3, s, generator=generator) / 2 for s in ((rows, rank), (rank, cols)))
                     for n, (rows, cols) in sizes.items()}  # fmt: skip
            made.add(len(bricks))
            bricks.append(pairs)  # type: ignore[arg-type]
            deltas.append(
                {n: (pairs[n][0] @ pairs[n][1] if n in pairs else torch.zeros(t.shape)).double() for n, t in base.items()}
            )
            continue
        tuned = {}
        for name, origin in base.items():
            change = values(tuple(origin.shape), 1)
            if kind != "changed" and (last is not None or kind == "unchanged"):
                change = {"opposite": -1, "twin": 1, "unchanged": 0}[kind] * (last[name].float() if last else change)
            tuned[name] = (origin.float() + change).to(origin.dtype if kind == "unchanged" else stored)
        bricks.append(tuned)
        deltas.append({name: (tuned[name].float() - base[name].float()).double() for name in base})
    return World(base, bricks, made, deltas, exact, draw(st.booleans()), draw(st.sampled_from((1 << 18, 1, 6, 64))), dtype())


@dataclass
class Result:
    """A delta by its formula.

    Attributes:
        delta: In float64.
        size: Sum of the magnitudes of the terms that the method adds up or rounds, for each element.
        free: Elements that rounding may decide either way; None for none.
        condition: Factor of what rounding changes in the result.
    """

    delta: Tensor
    size: Tensor
    free: Tensor | None = None
    condition: float = 1.0


Formula = Callable[[World, str, list[float], dict[str, Any]], Result]


def combined(world: World, name: str, weights: list[float], base: float = 0.0) -> Result:
    """Σ wᵢτᵢ + base·θ₀."""
    stack, origin, w = world.stack(name), world.base[name].double(), np.asarray(weights)
    total = torch.tensordot(torch.from_numpy(w), stack, dims=1) + base * origin
    size = torch.tensordot(torch.from_numpy(abs(w)), stack.abs(), dims=1) + (abs(base) + abs(w).sum()) * origin.abs()
    return Result(total, size)


def linear(world: World, name: str, weights: list[float], fields: dict[str, Any]) -> Result:
    """Σ wᵢθᵢ / Σ wᵢ, or Σ wᵢθᵢ."""
    if fields.get("normalize", True):
        return combined(world, name, [w / sum(weights) for w in weights])
    return combined(world, name, weights, sum(weights) - 1)


def average(world: World, name: str, weights: list[float], _fields: dict[str, Any]) -> Result:
    return combined(world, name, [1 / len(weights)] * len(weights))


def scaled_sum(world: World, name: str, weights: list[float], fields: dict[str, Any]) -> Result:
    return combined(world, name, [fields["lambda"] * w for w in weights])


def keep(count: int, density: float) -> int:
    return max(1, int(density * count)) if density > 0 and count else 0


def trim(world: World, brick: int, name: str, density: float, whole: bool) -> Tensor:
    """τ̂: the ⌊density · n⌋ elements of largest magnitude, the first ones among equals; of a whole model all equal ones."""
    own = world.deltas[brick][name]
    if whole:
        changed = set().union(*world.bricks)
        parts = [delta.reshape(-1) for n, delta in world.deltas[brick].items() if n in changed]
        every = torch.cat(parts or [own.reshape(-1)[:0]]).abs().sort(descending=True).values
        count = keep(len(every), density)
        return own * (own.abs() >= every[count - 1]) if count else own * 0
    flat = own.reshape(-1)
    kept = (-flat.abs()).argsort(stable=True)[: keep(len(flat), density)]
    return torch.zeros_like(flat).index_copy(0, kept, flat[kept]).reshape(own.shape)


def column(weights: list[float], like: Tensor) -> Tensor:
    return torch.tensor(weights, dtype=torch.float64).view(-1, *[1] * (like.dim() - 1))


def elected(stack: Tensor, weights: list[float], fields: dict[str, Any], exact: bool) -> Result:
    """λ · mean over {i : sign(τ̂ᵢ) = γ} of wᵢτ̂ᵢ."""
    weighted = stack * column(weights, stack)
    voices = weighted if fields["weigh"] == "before" else stack
    votes = voices.sign().sum(0) if fields["sign"] == "frequency" else voices.sum(0)
    agree = (voices.sign() * votes.sign() > 0).double()
    mass = (agree if fields["divide"] == "count" else agree * column(weights, stack)).sum(0)
    mass = torch.where(mass == 0, 1.0, mass)
    close = (votes.abs() <= 2.0**-20 * voices.abs().sum(0)) & (voices != 0).any(0)
    free = None if exact or fields["sign"] == "frequency" else close
    found = fields["lambda"] * (weighted * agree).sum(0) / mass
    size = abs(fields["lambda"]) * weighted.abs().sum(0) / mass.abs()
    if fields["divide"] == "weight":  # weights of both signs cancel in the sum that divides
        size = size + found.abs() * (agree * column(weights, stack).abs()).sum(0) / mass.abs()
    return Result(found, size, free)


def ties(world: World, name: str, weights: list[float], fields: dict[str, Any]) -> Result:
    stack = torch.stack([trim(world, i, name, d, fields["threshold"] == "model") for i, d in enumerate(fields["densities"])])
    return elected(stack, weights, fields, world.exact and not fields.get("weights"))


def random_bits(key: int, count: int) -> np.ndarray:
    """32 bits for each element: SplitMix64 (Steele, Lea & Flood 2014) at counter i/2, the lower half first."""
    with np.errstate(over="ignore"):
        z = np.uint64(key) + np.arange((count + 1) // 2, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return np.stack([z & np.uint64(0xFFFFFFFF), z >> np.uint64(32)], 1).reshape(-1)[:count]


def dare(world: World, name: str, weights: list[float], fields: dict[str, Any]) -> Result:
    """λ Σ wᵢ · mᵢ⊙τᵢ / p, with masks of the documented generator."""
    kept = []
    for i, density in enumerate(fields["densities"]):
        own = world.deltas[i][name]
        key = xxhash.xxh3_64_intdigest(f"{fields['seed']}\0key{i}\0{name}".encode())
        mask = torch.from_numpy(random_bits(key, own.numel()) < round(density * 2**32)).reshape(own.shape)
        full, rest = float(own.abs().sum()), float((own * mask).abs().sum())
        scale = {"inverse": 1 / density if density else 1.0, "none": 1.0, "l1": full / rest if rest else 1.0}[fields["rescale"]]
        kept.append(own * mask * scale)
    stack = torch.stack(kept)
    if fields["then"] == "ties":
        exact = (
            world.exact
            and fields["rescale"] != "l1"
            and set(fields["densities"]) <= {0.0, 0.5, 1.0}
            and not fields.get("weights")
        )
        return elected(stack, weights, {**fields, "weigh": "before", "sign": "mass", "divide": "weight"}, exact)
    weighted = stack * column(weights, stack) * fields["lambda"]
    return Result(weighted.sum(0), weighted.abs().sum(0))


def slerp(world: World, name: str, weights: list[float], fields: dict[str, Any]) -> Result:
    """sin(w₁φ)/sin φ · θ₁ + sin(w₂φ)/sin φ · θ₂, and the line where |cos φ| is above `parallel`."""
    one, two = (world.base[name].double() + delta[name] for delta in world.deltas)
    lengths = float(one.norm() * two.norm())
    cosine = float((one * two).sum()) / lengths if lengths else 1.0
    assume(abs(abs(cosine) - fields["parallel"]) > 1e-4 or abs(cosine) > 1 - 1e-12)
    size = sum(abs(w) for w in weights) * (one.abs() + two.abs()) + world.base[name].double().abs()
    if lengths == 0 or abs(cosine) > min(fields["parallel"], 1 - 1e-9):
        return Result(weights[0] * one + weights[1] * two - world.base[name].double(), size)
    angle = math.acos(cosine)
    assume(math.sin(angle) > 1e-2)
    found = (math.sin(weights[0] * angle) * one + math.sin(weights[1] * angle) * two) / math.sin(angle)
    return Result(found - world.base[name].double(), size, condition=math.sin(angle) ** -3)


def masked(world: World, name: str, weights: list[float], fields: dict[str, Any]) -> Result:
    """λ · m ⊙ τ_mt with mᵢ = 1[|wᵢτᵢ| ≥ t · |τ_mt − wᵢτᵢ|]: the brick's own mask, or where at least so many bricks have theirs."""
    stack = world.stack(name)
    stack = stack * column(weights, stack)
    total, t = stack.sum(0), fields["threshold"]
    margin = stack.abs() - t * (total - stack).abs()
    close = (margin.abs() <= 2.0**-20 * stack.abs().sum(0)) & (stack != 0).any(0)
    used = margin >= 0
    mask = used.sum(0) >= fields["least"] if "least" in fields else used[fields.get("chosen", 0)]
    size = abs(fields["lambda"]) * stack.abs().sum(0)
    return Result(fields["lambda"] * total * mask, size, None if world.exact else close.any(0))


def localize_and_stitch(world: World, name: str, weights: list[float], fields: dict[str, Any]) -> Result:
    """λ · Σ wᵢ mᵢ⊙τᵢ / Σ mᵢ."""
    stack = torch.stack([trim(world, i, name, fields["density"], fields["threshold"] == "model") for i in range(len(weights))])
    claims = (stack != 0).sum(0).clamp_min(1)
    weighted = stack * column(weights, stack) * fields["lambda"]
    return Result(weighted.sum(0) / claims, weighted.abs().sum(0))


# -- methods that decompose matrices


def by_matrix(merge: Callable[[list[np.ndarray], float], tuple[np.ndarray, float]]) -> Formula:
    """The formula for matrices and stacks of them; λ/T Σ wτ for vectors, tables, and matrices with fewer sides than bricks."""

    def formula(world: World, name: str, weights: list[float], fields: dict[str, Any]) -> Result:
        shape, lam = tuple(world.base[name].shape), fields["lambda"]
        if len(shape) not in (2, 3) or min(shape[-2:]) < max(2, len(weights)) or name in TABLES:
            return combined(world, name, [lam * w / len(weights) for w in weights])
        stacks = [w * delta[name].numpy().reshape(-1, *shape[-2:]) for w, delta in zip(weights, world.deltas, strict=True)]
        flip = fields.get("directed") and world.flipped(name)
        found = [merge([m.T if flip else m for m in matrices], lam) for matrices in zip(*stacks, strict=True)]
        whole = torch.from_numpy(np.stack([m.T if flip else m for m, _ in found])).reshape(shape)
        size = abs(lam) * sum(float(np.linalg.norm(m)) for m in (*stacks, whole.numpy()))
        return Result(lam * whole, torch.full(shape, size, dtype=torch.float64), condition=max(c for _, c in found))

    return formula


def parts(matrix: np.ndarray, count: int | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """U, σ and Vᵀ of the non-zero singular values, at most `count`, and what an error of the matrix is multiplied by."""
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    largest = s[0] if len(s) else 0.0
    assume(not any(1e-9 * largest < x < 1e-2 * largest for x in s))  # else zero or not is a question of rounding
    rank = int((s > 1e-6 * largest).sum())
    used = rank if count is None else min(rank, count)
    gap = s[used - 1] - s[used] if 0 < used < len(s) else largest
    assume(used == 0 or gap > 1e-2 * largest)
    return u[:, :used], s[:used], v[:used], largest / min(s[used - 1], gap) if used else 1.0


def polar(columns: np.ndarray) -> tuple[np.ndarray, float]:
    u, s, v = np.linalg.svd(columns, full_matrices=False)
    kept = s > 1e-6 * s[:1]
    assume(not any(1e-9 < x < 1e-2 for x in s))
    return u[:, kept] @ v[kept], float(1 / s[kept].min()) if kept.any() else 1.0


def iso(matrices: list[np.ndarray], _lam: float) -> tuple[np.ndarray, float]:
    """σ̄ UVᵀ of UΣVᵀ = svd(Σ wᵢτᵢ) (Marczak et al. 2025)."""
    scale = sum(np.linalg.norm(m) for m in matrices)
    total = np.sum(matrices, axis=0)
    assume(not 0 < np.linalg.norm(total) < 1e-3 * scale)
    u, s, v, condition = parts(total)
    return u @ v * (s.mean() if len(s) else 0.0), float(
        condition * scale / max(float(np.linalg.norm(total)), 1e-3 * scale, 1e-30)
    )


def tsv(matrices: list[np.ndarray], _lam: float) -> tuple[np.ndarray, float]:
    """Û diag(σ) V̂ᵀ with the polar factors of all leading left and right singular vectors (Gargiulo et al. 2025)."""
    found = [parts(m, min(m.shape) // len(matrices)) for m in matrices]
    left, one = polar(np.concatenate([p[0] for p in found], 1))
    right, two = polar(np.concatenate([p[2] for p in found], 0).T)
    return left * np.concatenate([p[1] for p in found]) @ right.T, max(p[3] for p in found) * max(one, two) ** 2


def wudi(matrices: list[np.ndarray], _lam: float) -> tuple[np.ndarray, float]:
    """S + (D C⁻¹ − S) V_K V_Kᵀ (SWUDI)."""
    used = [m for m in matrices if m.any()]
    total = np.sum(matrices, axis=0)
    if not used:
        return total, 1.0
    gram = sum(m.T @ m / (m**2).sum() for m in used)
    right = sum(m @ m.T @ m / (m**2).sum() for m in used)
    values, vectors = np.linalg.eigh(gram)
    values, vectors = values[::-1].clip(0), vectors[:, ::-1]
    exact = np.sqrt(values).sum() ** 2 / values.sum()
    assume(abs(exact % 1 - 0.5) > 1e-3)
    count = round(exact)
    gap = values[count - 1] - values[count] if count < len(values) else values[0]
    condition = values[0] / min(gap, values[count - 1]) if min(gap, values[count - 1]) > 0 else 1e9
    assume(condition < 1e3)
    top = vectors[:, :count]
    return total + (right @ top / values[:count] - total @ top) @ top.T, condition**2


# -- methods that measure, given what they measured


def overlap_shares(world: World) -> list[float]:
    """1 / Σⱼ RVᵢⱼ with the mean of ‖τᵢᵀτⱼ‖² / (‖τᵢᵀτᵢ‖ · ‖τⱼᵀτⱼ‖) over the matrices that one of both changes (Robert & Escoufier 1976)."""
    count, found = len(world.deltas), list[np.ndarray]()
    for name, tensor in world.base.items():
        if tensor.dim() in (2, 3) and min(tensor.shape[-2:]) > 1 and name not in TABLES:
            stacks = [d[name].numpy().reshape(-1, *tensor.shape[-2:]) for d in world.deltas]
            for matrices in zip(*stacks, strict=True):
                grams = [m.T @ m if world.flipped(name) else m @ m.T for m in matrices]
                found.append(np.array([[float((a * b).sum()) for b in grams] for a in grams]))
    shares = []
    for i in range(count):
        row = 1.0
        for j in set(range(count)) - {i}:
            own = [g[i, j] / math.sqrt(g[i, i] * g[j, j]) if g[i, i] * g[j, j] else 0.0 for g in found if g[i, i] or g[j, j]]
            row += sum(own) / len(own) if own else 0.0
        shares.append(1 / row)
    return shares
