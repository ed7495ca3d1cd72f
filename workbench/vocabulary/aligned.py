"""An output's vocabulary, and every model's weights with its rows.

Rows of tokens that no merged model has can be made of rows of tokens that the base and another model, the donor, share. The donor gives
the output its tokenizer, and its rows may have any width: a donor's row is approximated by a sparse combination of the donor's rows of
shared tokens (orthogonal matching pursuit), and the same combination of the base's rows is the new row.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from workbench.adapters.bind import AdaptedWeights
from workbench.ground.files import bytes_digest, json_digest
from workbench.ground.lazy import no_grad, np, torch
from workbench.models.architecture import is_head_module
from workbench.models.identity import computed_on
from workbench.models.layout import Model
from workbench.weights.header import is_whole, save_tensors
from workbench.weights.row_alignment import ZERO, AlignedWeights, Combination, RowPlan, WholeTensors
from workbench.weights.specs import Weights, load

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from workbench.weights.row_alignment import Index


# Elements of the largest intermediate result, targets x atoms.
_ELEMENTS = 1 << 26
# An atom whose part outside the chosen ones is shorter than this adds nothing but rounding errors.
_DEPENDENT = 1e-4


@dataclass(frozen=True)
class Combinations:
    """Sparse combinations of atoms, one for each target.

    Attributes:
        atoms: [targets, k]: indices of atoms, 0 where fewer than k are used.
        coefficients: [targets, k], float32; 0 where fewer than k are used.
        residuals: [targets], float32: length of what no combination explains, over the target's length.
    """

    atoms: Tensor
    coefficients: Tensor
    residuals: Tensor


@no_grad
def pursue(targets: Tensor, atoms: Tensor, k: int) -> Combinations:
    """Approximate each target by a combination of at most k atoms.

    In each of k rounds the atom with the largest absolute cosine with the residual is chosen, and the target is projected on all
    chosen atoms. An orthonormal basis of them grows by one vector a round (Gram-Schmidt, done twice), so that no least-squares
    problem is solved again.

    Args:
        targets: [targets, width], float32.
        atoms: [atoms, width], float32, on the same device. Atoms of length 0 are never chosen.
        k: Largest number of atoms of a combination.

    Source: Pati, Rezaiifar and Krishnaprasad 1993, Orthogonal Matching Pursuit.
    """
    k = min(k, len(atoms), targets.shape[1])
    lengths = atoms.norm(dim=1)
    unit = atoms / lengths.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
    size = max(1, _ELEMENTS // max(1, len(atoms)))
    parts = [_pursue(targets[start : start + size], unit, lengths, k) for start in range(0, len(targets), size)]
    if not parts:
        empty = targets.new_zeros(0, k)
        return Combinations(empty.long(), empty, targets.new_zeros(0))
    return Combinations(
        torch.cat([part.atoms for part in parts]),
        torch.cat([part.coefficients for part in parts]),
        torch.cat([part.residuals for part in parts]),
    )


def _pursue(targets: Tensor, unit: Tensor, lengths: Tensor, k: int) -> Combinations:
    """Return the combinations of some targets."""
    count, width = targets.shape
    chosen = torch.zeros(count, k, dtype=torch.long, device=targets.device)
    basis = targets.new_zeros(count, k, width)
    triangle = torch.eye(k, dtype=targets.dtype, device=targets.device).repeat(count, 1, 1)
    inside = targets.new_zeros(count, k)
    residual = targets.clone()
    for number in range(k):
        # The residual is orthogonal to all chosen atoms, so that none of them is the best again.
        likeness, best = (residual @ unit.T).abs_().max(1)
        new, before = unit[best], basis[:, :number]
        along = targets.new_zeros(count, number)
        for _ in range(2):  # once loses orthogonality where atoms are alike
            part = torch.einsum("nkd,nd->nk", before, new)
            along += part
            new = new - torch.einsum("nk,nkd->nd", part, before)
        length = new.norm(dim=1)
        is_used = (length > _DEPENDENT) & (likeness > 0)
        new = torch.where(is_used[:, None], new / length.clamp_min(_DEPENDENT)[:, None], 0.0)
        basis[:, number] = new
        chosen[:, number] = torch.where(is_used, best, 0)
        triangle[:, :number, number] = torch.where(is_used[:, None], along, 0.0)
        triangle[:, number, number] = torch.where(is_used, length, 1.0)
        inside[:, number] = (residual * new).sum(1)
        residual = residual - inside[:, number, None] * new
    # unit[chosen] = basis @ triangle, so that the coefficients solve triangle @ x = inside.
    of_units = torch.linalg.solve_triangular(triangle, inside[:, :, None], upper=True)[:, :, 0]
    scale = lengths[chosen]
    coefficients = torch.where(scale > 0, of_units / scale.clamp_min(torch.finfo(torch.float32).tiny), 0.0)
    norms = targets.norm(dim=1)
    return Combinations(chosen, coefficients, torch.where(norms > 0, residual.norm(dim=1) / norms, 0.0))


VERSION = 1
"""Version of the combinations; part of the keys of all that depends on them."""


@dataclass
class MadeRows:
    """Combinations for the rows that a base lacks; those of a tensor are computed when they are first read, and kept in the cache.

    Attributes:
        donor: The donor's weights.
        tensors: Tensor of the base -> tensor of the donor.
        rows: [made]: rows of the output, and of the donor, that are made.
        shared: [shared]: the donor's rows of tokens that the base has.
        base: [shared]: the base's rows of the same tokens.
        k: Largest number of rows of a combination.
        size: Number of rows of the output.
        cache: Folder for combinations.
        residuals: Tensor -> mean share of a donor's row that its combination leaves unexplained, for tensors that were computed.
    """

    donor: Weights
    tensors: Mapping[str, str]
    rows: Index
    shared: Index
    base: Index
    k: int
    size: int
    cache: Path
    residuals: dict[str, float] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of the largest tensor of the donor in float32, twice, for the time of the computation."""
        return 2 * max(4 * self.donor.specs[name].numel for name in self.tensors.values())

    def combination(self, name: str, device: torch.device) -> Combination:
        """Return the combinations of a tensor's rows."""
        spec = self.donor.specs[self.tensors[name]]
        rows = load(self.donor, self.tensors[name], torch.float32, device).view(spec.rows, spec.cols)
        from safetensors.torch import load_file

        words = [VERSION, self.k, computed_on(device), *(bytes_digest(part.tobytes()) for part in (self.rows, self.shared))]
        place = self.cache / "combinations" / f"{json_digest([*words, bytes_digest(rows.cpu().numpy().tobytes())])}.safetensors"
        if not is_whole(place):
            made, shared = (rows[torch.from_numpy(index).to(device)] for index in (self.rows, self.shared))
            found = pursue(made, shared, self.k)
            save_tensors({"atoms": found.atoms, "coefficients": found.coefficients, "residuals": found.residuals}, place)
        stored: dict[str, Tensor] = load_file(place)
        self.residuals[name] = float(stored["residuals"].mean()) if len(self.rows) else 0.0
        number = np.full(self.size, -1, dtype=np.int64)
        number[self.rows] = np.arange(len(self.rows))
        atoms = torch.from_numpy(self.base).to(device)[stored["atoms"].to(device)]
        return Combination(number, atoms, stored["coefficients"].to(device))

    def describe(self) -> dict[str, object]:
        """Return the fields for the run's record."""
        return {
            "shared": len(self.shared),
            "made": len(self.rows),
            "k": self.k,
            **({"residual": {name: round(value, 4) for name, value in self.residuals.items()}} if self.residuals else {}),
        }


def counterparts(tensors: Sequence[str], donors: Sequence[str]) -> dict[str, str]:
    """Return for each vocabulary tensor of the base the donor's tensor that its combinations are computed from.

    Embeddings go with embeddings, and a head with the donor's head, or with its embeddings where these are tied. A bias has the
    combinations of its head.

    Args:
        tensors: Vocabulary tensors of the base.
        donors: Vocabulary tensors of the donor, embeddings first.
    """
    matrices = [name for name in donors if name.endswith(".weight")]
    heads = [name for name in matrices if is_head_module(name.rpartition(".")[0])]
    return {name: heads[0] if heads and is_head_module(name.rpartition(".")[0]) else matrices[0] for name in tensors}


@dataclass(frozen=True)
class Member:
    """A model whose vocabulary is aligned.

    Attributes:
        name: "base" or the brick's name.
        path: Directory of its tokenizer.
        key: Sort key of its content, which orders the bricks.
        weights: Its weights; None for an adapter without tokens of its own.
        config: The content of config.json; None for an adapter.
        donor: Weights of a brick that no step uses and that gives the output its tokenizer; None for all others.
    """

    name: str
    path: Path
    key: str
    weights: Weights | None
    config: dict[str, object] | None
    donor: Weights | None = None

    @property
    def label(self) -> str:
        """The model's name in messages."""
        return "base" if self.name == "base" else f"brick '{self.name}'"


@dataclass(frozen=True)
class Donor:
    """A brick that gives the output its tokenizer, and the rows of tokens that the base lacks.

    Attributes:
        name: The brick.
        rule: The origin of the rows: omp, mean or zero.
        made: The rows of `omp`; None for other rules.
    """

    name: str
    rule: str
    made: MadeRows | None

    @property
    def rows(self) -> str:
        """The origin of the rows, in words."""
        return {"omp": "combinations of rows of shared tokens", "mean": "the mean of all rows", "zero": "zeros"}[self.rule]


@dataclass(frozen=True)
class AlignedVocabulary:
    """The output's vocabulary and every model's rows in it.

    Attributes:
        members: The models with vocabulary rows: the base, then bricks in the order of their keys.
        plan: The origin of every row of every model.
        tensors: Names of the tensors with one row per token.
        tokens: Token -> id in the output.
        path: Directory with the output's tokenizer files and generation_config.json.
        config: The base's config.json, changed for the output's vocabulary.
        digest: Digest of all vocabularies and rules, but not of the models' rows.
        warnings: Warnings for the user.
        donor: The brick that gives its tokenizer alone; None if there is none.
    """

    members: list[Member]
    plan: RowPlan
    tensors: frozenset[str]
    tokens: dict[str, int]
    path: Path
    config: dict[str, object]
    digest: str
    warnings: list[str]
    donor: Donor | None = None

    @property
    def _made(self) -> MadeRows | None:
        """The rows that are made of others."""
        return self.donor.made if self.donor else None

    @cached_property
    def _weights(self) -> list[Weights]:
        return [member.weights for member in self.members if member.weights is not None]

    @cached_property
    def _whole_tensors(self) -> WholeTensors:
        return WholeTensors()

    @property
    def plain(self) -> Weights:
        """The base's weights with its own vocabulary."""
        return self._weights[0]

    @cached_property
    def base(self) -> Model:
        """The base with the output's vocabulary."""
        return Model(self._aligned(0), self.config)

    def view(self, brick: str) -> AlignedWeights:
        """Return a checkpoint brick's weights with the output's vocabulary."""
        return self._aligned([member.name for member in self.members].index(brick))

    def on_base(self, weights: Weights) -> AlignedWeights:
        """Convert weights from the base's vocabulary to the output's, for example a recipe's result."""
        return self._aligned(0, weights)

    def _aligned(self, number: int, inner: Weights | None = None) -> AlignedWeights:
        """Return the weights of a member, or other ones in its vocabulary, with the output's vocabulary."""
        combination = self._made.combination if self._made else None
        return AlignedWeights(self._weights, number, self.plan, self.tensors, self._whole_tensors, inner, combination)

    def adapted(self, brick: str) -> AdaptedWeights | None:
        """Return the base with an adapter that has tokens of its own; None for an adapter of the base's vocabulary."""
        found = [member.weights for member in self.members if member.name == brick]
        return found[0] if found and isinstance(found[0], AdaptedWeights) else None

    def delta_rows(self, adapter: str) -> Index:
        """Return [rows]: an adapter's row for each output row, or -1 where the base has none, whose rows are the adapter's then."""
        number = [member.name for member in self.members].index(adapter) if self.adapted(adapter) else 0
        return np.where(self.plan.own[0] >= 0, self.plan.own[number], -1)

    def equal_rows(self, bricks: Collection[str]) -> NDArray[np.bool_]:
        """Return [rows], bool: the rows that the base and all of these bricks have from one model, or as zeros.

        A brick that is no member, such as an adapter without tokens of its own, may change every row of the base.
        """
        numbers = {member.name: number for number, member in enumerate(self.members)}
        models = {0, *(numbers[brick] for brick in bricks if brick in numbers)}
        equal: NDArray[np.bool_] = (self.plan.donor >= 0) | (self.plan.donor == ZERO)
        for number in models:
            own = self.plan.own[number]
            equal &= (own < 0) | ((self.plan.donor == number) & (self.plan.donor_row == own))
        if any(brick not in numbers for brick in bricks):
            equal &= self.plan.own[0] < 0
        return equal

    def memory(self) -> int:
        """Return the bytes of all tensors that are read completely, of all models together: their rows are scattered, or rows are made."""
        return (self._made.nbytes if self._made else 0) + sum(
            sum(weights.specs[name].nbytes for name in self.tensors if name in weights.specs)
            for number, weights in enumerate(self._weights)
            if self.plan.is_read_whole(number) or (self._made is not None and number == 0)
        )

    @property
    def _lacking(self) -> dict[str, int]:
        """Model -> number of tokens that it lacks, the base first."""
        rows = self.plan.tokens
        counts = {m.name: int((rows & (owned < 0)).sum()) for m, owned in zip(self.members, self.plan.owned, strict=True)}
        return {n: k for n, k in sorted(counts.items(), key=lambda item: (item[0] != "base", item[0])) if k}

    def note(self) -> str | None:
        """Return a line about missing tokens and the rows that replace them; None if no model lacks a token."""
        lacking = self._lacking
        if not lacking:
            return None
        counts = ", ".join(f"{name} lacks {count:,}" for name, count in lacking.items())
        if self.donor is not None:
            text = f"tokenizer: the {len(self.tokens):,} tokens of '{self.donor.name}' in {self.plan.rows:,} rows; {counts}"
            return f"{text}. The rows of tokens that no model has are {self.donor.rows}"
        return (
            f"tokenizer: {len(self.tokens):,} tokens in {self.plan.rows:,} rows; {counts}. A missing row is replaced by the base's, else "
            "by that of the only model that has the token, else by the mean, so that a model without a token does not change its row"
        )

    def carried(self) -> str | None:
        """Return what rows that were made have of the donor's rows, once they have been read; None if none are made."""
        residuals = list(self._made.residuals.values()) if self._made else []
        if self._made is None or not residuals:
            return None
        left = ", ".join(f"{value:.0%}" for value in residuals)
        return (
            f"{len(self._made.shared):,} rows carried over, {len(self._made.rows):,} made of up to {self._made.k} of them; combinations "
            f"leave {left} of the length of the brick's rows unexplained"
        )

    def describe(self) -> dict[str, object]:
        """Return the fields for the run's record."""
        return {
            "rows": self.plan.rows,
            "tokens": int(self.plan.tokens.sum()),
            "lacking": self._lacking,
            "digest": self.digest,
            **({"missing": self.donor.rule} if self.donor else {}),
            **(self._made.describe() if self._made else {}),
        }
