"""Null space: a sum of deltas in which one model keeps what it does at certain tokens, such as the tags around its thoughts."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field
from safetensors import safe_open

from workbench.facts.facts import joined
from workbench.ground.errors import WorkbenchError
from workbench.ground.files import json_digest
from workbench.ground.lazy import torch
from workbench.merge.measuring.calibration import ReadsTexts, by_pattern, is_conv1d, linear_deltas
from workbench.merge.measuring.layers import InputIndex, InputWalk, in_cache, write_inputs
from workbench.merge.measuring.matrices import rows_of
from workbench.models.layout import Model
from workbench.models.texts import read_texts
from workbench.steps import Combination, Group, Laws, Measured, MergeContext, Prepared, Problem, register
from workbench.steps.fields import BrickEntry, Bricks, Number, Real

if TYPE_CHECKING:
    from torch import Tensor


@register
class NullSpace(ReadsTexts):
    """A sum of deltas in which one model keeps what it does at certain tokens: the projection of RAIN-Merging (Huang et al. 2026).

    A reasoning model writes its thoughts between tags, and forgets the tags in a sum with an instruct model. Here, the other bricks' deltas
    are projected onto the null space of what each linear layer of the reasoning model reads at the tags and at the tokens before them, so
    that they change almost nothing there. Tensors that are no linear layer (norms, biases, embeddings, a tied head) get the kept brick's delta
    alone, as in the paper. The paper's second stage, coefficients from the attention to annotated instructions, is not here: weights may
    depend on the depth.
    """

    paper = "Huang et al. 2026, RAIN-Merging, arXiv 2602.22538"
    formula = (
        "Δ = λ (wₖτₖ + Σ wᵢτᵢ · ε(G + εI)⁻¹),  G = mean of x xᵀ over the tokens in brick k's model,  ε = ridge · mean diag G"
    )
    laws = Laws(linear_in_weight=True, single_is_identity=False, passes=2, memory="tensor", needs="texts")

    merge: Literal["null_space"]
    bricks: Bricks[BrickEntry] | None = None
    """Mapping of brick name to weight. A list: each has weight 1. Default: all bricks."""
    keep: str | None = None
    """Brick k, whose work at the tokens is kept; if omitted, that of the base."""
    tokens: list[Annotated[str, Field(min_length=1)]] = Field(min_length=1)
    """Strings, such as `["<think>", "</think>"]`. Their tokens, and the token before each, are those of the formula."""
    calibration: str
    """JSONL file of texts as the kept model writes them, with the strings, relative to the project: {"prompt":, "completion":} (or
    response, answer, target) or {"text":} a line."""
    lam: Number = Field(1.0, alias="lambda")
    """Scale of the sum."""
    ridge: Real = Field(1.0, gt=0)
    """ε relative to the mean diagonal of G. Directions that the tokens use less than this are left to the other bricks. The authors' code uses
    1e-4, almost the exact projection; the other bricks lost their skills there, and kept them between 0.1 and 10, as did brick k."""

    def check_names(self, names: Sequence[str], known: Sequence[str]) -> Iterator[Problem]:
        """Yield the errors of all merges, and one for a kept brick that is not merged."""
        yield from super().check_names(names, known)
        if self.keep is not None and self.keep not in names:
            yield Problem(
                ("keep",), f"'{self.keep}' is none of the merged bricks ({', '.join(names)})", "Name one, or omit `keep`."
            )

    def check_inputs(self, project: Path) -> None:
        """Read the texts once, so that errors in them appear before any work."""
        texts = read_texts(project / self.calibration, self.calibration, self.samples)
        self._require([f"{text.prompt}{joined(text.prompt, text.answer)}" for text in texts])

    def _require(self, texts: Sequence[str], where: str = "") -> None:
        """Raise WorkbenchError if one of the strings is in no text."""
        if missing := next((string for string in self.tokens if not any(string in text for text in texts)), None):
            message = f"null_space: {self.calibration}: none of {len(texts)} texts has '{missing}'{where}"
            raise WorkbenchError(message, "Give texts as the kept model writes them, or correct `tokens`.")

    def measure_bytes(self, model: Model) -> int:
        """Return the size of the embeddings or of one layer, whichever is larger, and of twice all hidden states: most inputs are as wide."""
        sizes = self.sizes(model)
        return max(sizes.outside, sizes.layer) + 2 * sizes.hidden

    def tensor_bytes(self, model: Model, tensor: str, bricks: int) -> int:
        """Return the size of the deltas in float32, and of four matrices in float64: two sums, a projection and its part in the inputs."""
        return model.weights.specs[tensor].numel * (4 * (bricks + 1) + 32)

    def measure(self, context: MergeContext) -> Measured:
        """Record the inputs of the kept model at the tokens, or find them in the cache."""
        who = self.keep or ""
        rows, key = self.rows_of(self.calibration, context, who)
        marked = [replace(row, counted=places) for row in rows if (places := _places(context.tokenizer, row.tokens, self.tokens))]
        self._require([context.tokenizer.decode(row.tokens) for row in rows], f" in its first {self.max_length} tokens")
        place = context.cache / "inputs" / json_digest([key, self.tokens])
        walk = InputWalk(context, who, marked, lambda parts: torch.cat(list(parts)), lambda *parts: torch.cat(parts))
        index = in_cache(place, lambda out: write_inputs(walk, out, "inputs", lambda rows, _: rows), InputIndex)
        if not index.record.streamed:
            fused = f"transformers fuses weights of {context.base.config.get('model_type')}, such as experts"
            raise WorkbenchError(f"null_space: {fused}, whose inputs are not read", "Use `merge: task_arithmetic`.")
        found = {tensor: place / file for tensor, file in index.files.items()}
        return Measured(found, {"calibration": {"file": self.calibration, "texts": len(marked), **index.record.to_dict()}})

    def report(self, notes: Mapping[str, Mapping[str, float]]) -> dict[str, object]:
        """Return what is left of the other bricks' deltas, and which tensors have the kept brick's delta alone."""
        left = [note["left"] for note in notes.values() if "left" in note]
        alone = by_pattern(name for name, note in sorted(notes.items()) if "left" not in note)
        return {"projected": len(left), "share_left": round(sum(left) / max(len(left), 1), 4), "kept_alone": alone}

    def prepare(self, group: Group) -> Prepared:
        """Return the kept brick's delta plus the projected sum of the others."""
        inputs: Mapping[str, Path] = group.survey
        weights = {brick: group.value("lam") * weight for brick, weight in zip(group.bricks, group.values("weight"), strict=True)}
        if group.tensor not in inputs:
            group.notes[group.tensor] = {}
            return Combination([weight * (brick == self.keep) for brick, weight in weights.items()])
        deltas = dict(zip(group.bricks, linear_deltas(group), strict=True))
        kept, others = (torch.zeros_like(deltas[group.bricks[0]], dtype=torch.float64) for _ in range(2))
        for brick, weight in weights.items():
            (kept if brick == self.keep else others).add_(deltas[brick], alpha=weight)
        with safe_open(inputs[group.tensor], "pt") as file:
            projected = outside(others, file.get_tensor("inputs").to(group.device), self.ridge)
        norm = float(others.norm())
        group.notes[group.tensor] = {"left": float(projected.norm()) / norm if norm else 1.0}
        merged = kept.add_(projected).float()
        return rows_of((merged.T if is_conv1d(group.model, group.tensor) else merged).contiguous())


def outside(delta: Tensor, inputs: Tensor, ridge: float) -> Tensor:
    """Return a delta [out, in] in float64 without what it does to some inputs X [token, in]: Δ ε(G + εI)⁻¹ with G = XᵀX / tokens.

    It minimizes ‖Δ' − Δ‖² + tr(Δ' G Δ'ᵀ) / ε. For ε → 0 it is the projection I − Xᵀ(XXᵀ)⁺X of RAIN-Merging.
    """
    # Computed as Δ − ΔXᵀ(XXᵀ + ε'I)⁻¹X: G itself would need more digits than float32 has, because ε is far below its largest eigenvalue.
    x = inputs.double()
    x = torch.linalg.qr(x, mode="r").R if len(x) > x.shape[1] else x
    epsilon = ridge * float(x.square().sum()) / max(x.shape[1], 1)
    if epsilon == 0:
        return delta.double()
    system = x @ x.T
    system.diagonal().add_(epsilon)
    return delta - torch.cholesky_solve((delta.double() @ x.T).T, torch.linalg.cholesky(system)).T @ x


def _places(tokenizer: Any, tokens: Sequence[int], strings: Sequence[str]) -> tuple[int, ...]:
    """Return the places of all tokens of some strings in a text, and of the token before each string, which predicts it."""
    # The tokens are decoded, because a string's own tokens differ from those that it has inside a text.
    decode = partial(tokenizer.decode, clean_up_tokenization_spaces=False)
    text = decode(list(tokens))
    found: set[int] = set()
    for string in strings:
        for match in re.finditer(re.escape(string), text):
            first, last = (
                bisect_right(range(len(tokens)), character, key=lambda i: len(decode(list(tokens[: i + 1]))))
                for character in (match.start(), match.end() - 1)
            )
            found.update(range(max(0, first - 1), last + 1))
    return tuple(sorted(found))
