"""An output's vocabulary, and every model's weights with its rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.errors import WorkbenchError
from workbench.models.architecture import is_embedding_module, is_head_module
from workbench.models.layout import Model
from workbench.vocabulary.missing import MadeRows
from workbench.weights.row_alignment import AlignedWeights, RowPlan, WholeTensors
from workbench.weights.specs import TensorSpec, Weights

if TYPE_CHECKING:
    from workbench.weights.row_alignment import Index


@dataclass(frozen=True)
class Member:
    """A model whose vocabulary is aligned.

    Attributes:
        name: "base" or the brick's name.
        path: Directory of its tokenizer.
        key: Sort key of its content, which orders the bricks.
        weights: Its weights; None for an adapter, which has no vocabulary rows.
        config: The content of config.json; None for an adapter.
        donor: Weights of a brick that no step uses and that gives the output its tokenizer; None for all others.
    """

    name: str
    path: Path
    key: str
    weights: Weights | None
    config: dict[str, Any] | None
    donor: Weights | None = None

    @property
    def label(self) -> str:
        """The model's name in messages."""
        return "base" if self.name == "base" else f"brick '{self.name}'"


def vocabulary_tensors(specs: Mapping[str, TensorSpec], label: str = "base") -> list[str]:
    """Return the names of the tensors with one row per token, embeddings first.

    These are embeddings and heads, with their biases, that have as many rows as the first embedding.

    Args:
        specs: Shapes of the model's tensors.
        label: The model's name in messages.

    Raises:
        WorkbenchError: If there is no such tensor.
    """
    modules = {n: n.rpartition(".")[0] for n, s in specs.items() if n.endswith((".weight", ".bias")) and 1 <= len(s.shape) <= 2}
    names = [n for n, module in modules.items() if is_embedding_module(module) or is_head_module(module)]
    if not names:
        raise WorkbenchError(
            f"{label}: no tensor has the name of an embedding (names are {', '.join(list(specs)[:3])}, …)",
            "Only vocabularies of decoder-only language models can be aligned. Remove `tokenizer` from the recipe.",
        )
    names.sort(key=lambda n: is_head_module(modules[n]))
    rows = specs[names[0]].shape[0]
    return [n for n in names if specs[n].shape[0] == rows]


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
        members: The models with vocabulary rows: the base, then checkpoint bricks in the order of their keys.
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
    config: dict[str, Any]
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

    @property
    def base_rows(self) -> Index:
        """[rows]: the base's row for each output row, or -1; an adapter's update follows these rows."""
        return self.plan.own[0]

    def memory(self) -> int:
        """Return the bytes of all tensors that are read completely, of all models together: their rows are scattered, or rows are made."""
        return (self._made.nbytes if self._made else 0) + sum(
            sum(weights.specs[name].nbytes for name in self.tensors if name in weights.specs)
            for number, weights in enumerate(self._weights)
            if self.plan.is_read_whole(number) or (self._made is not None and number == 0)
        )

    def note(self) -> str | None:
        """Return a line about missing tokens and the rows that replace them; None if no model lacks a token."""
        lacking = self.describe()["lacking"]
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

    def describe(self) -> dict[str, Any]:
        """Return the fields for the run's record."""
        rows = self.plan.tokens
        lacking = {m.name: int((rows & (owned < 0)).sum()) for m, owned in zip(self.members, self.plan.owned, strict=True)}
        return {
            "rows": self.plan.rows,
            "tokens": int(rows.sum()),
            "lacking": {n: k for n, k in sorted(lacking.items(), key=lambda item: (item[0] != "base", item[0])) if k},
            "digest": self.digest,
            **({"missing": self.donor.rule} if self.donor else {}),
            **(self._made.describe() if self._made else {}),
        }
