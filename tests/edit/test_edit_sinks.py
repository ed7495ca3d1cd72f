"""Attention sinks in second moments: strengths are relative to the trace without them, and edits at such layers write their values."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from worlds.dense import context_of
from worlds.edit_steps import Interrupt, projected, solve, stopping
from worlds.jsonl import write_jsonl
from worlds.project import CPU, Project

from workbench.edit.closed_form import moments
from workbench.edit.closed_form.moments import DOMINATES, OUTLIER, SINKS_A_ROW, Moments, MomentSums
from workbench.edit.places.parts import Parts
from workbench.facts.published import read_facts
from workbench.models.texts import longest_row
from workbench.steps import MethodContext

WIDTH = 24
LONG = 3000.0
"""Factor by which a row's first key is longer than others in the model with a sink."""


def vectors(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))


def summed(keys: Tensor, first: Tensor, batch: int = 100) -> MomentSums:
    sums = MomentSums.empty(WIDTH, CPU)
    for start in range(0, len(keys), batch):
        sums.add(keys[start : start + batch], first[start : start + batch])
    return sums


def rows_with(length: float, every: int = 20, rows: int = 30) -> tuple[Tensor, Tensor]:
    """Keys of rows of text, the first of each so many times as long, and which those are."""
    keys = vectors(every * rows)
    first = torch.arange(len(keys)) % every == 0
    keys[first] *= length
    return keys, first


def test_dominating_sinks_are_summed_apart() -> None:
    """All of them stay in C; the trace is that of the others."""
    keys, first = rows_with(300.0)
    keys[7] *= 300.0  # a sink elsewhere in a row
    sums = summed(keys, first)
    long = first.clone()
    long[7] = True
    norms = keys.double().square().sum(1)
    assert sums.counts == [600, 31, 30]
    torch.testing.assert_close(sums.rest + sums.outliers, keys.double().T @ keys.double(), rtol=1e-6, atol=1e-2)
    torch.testing.assert_close(sums.rest.trace(), norms[~long].sum(), rtol=1e-6, atol=0)
    found = sums.left_out(30)
    assert found is not None
    assert found[:2] == (31, 30)
    assert found[2] == pytest.approx(float(norms[long].sum() / norms.sum()), rel=1e-6)


def test_other_vectors_are_not_lost_beside_a_sink() -> None:
    """In float32 a product of 1e10 hides what other tokens add: the two are never in one sum."""
    keys, first = rows_with(1e6)
    others = keys[~first].double()
    torch.testing.assert_close(summed(keys, first).rest, others.T @ others, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        (rows_with(1.0), "no vector is long"),
        (rows_with(9.0), "four times the squared norms' spread, as in layers without a sink"),
        (rows_with(12.0, every=400, rows=5), "long, and a third of the trace"),
        ((rows_with(300.0, every=5)[0], torch.arange(150) % 20 == 0), "one token in five: a common word, no sink"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_dominate_is_kept(keys: tuple[Tensor, Tensor], why: str) -> None:
    rows = 7 if "common word" in why else int(keys[1].sum())
    assert summed(*keys).left_out(rows) is None, why


def test_edges_of_a_sink() -> None:
    """100 medians are not more than 100, half of the trace does not dominate, two a row are few; the first batch gives the median."""
    eye, first = torch.eye(WIDTH), torch.tensor([True] + [False] * 9)
    for length, outliers in ((10.0, 0), (10.1, 1)):
        sums = MomentSums.empty(WIDTH, CPU)
        sums.add(torch.cat([length * eye[:1], eye[:9]]), first)
        assert (sums.counts, sums.median) == ([10, outliers, outliers], 1.0)
        sums.add(eye[:10] * 20.0, first)
        assert (sums.counts, sums.median) == ([20, 10 + outliers, 1 + outliers], 1.0)
    rest = torch.eye(WIDTH, dtype=torch.float64)
    assert MomentSums(rest, rest, [100, 1, 1], 1.0).left_out(30) is None
    sums = MomentSums(rest, 1.5 * rest, [100, 60, 5], 1.0)
    assert sums.left_out(30) == (60, 5, 0.6)
    assert sums.left_out(29) is None


def test_rows_of_text_end_at_the_longest_that_the_model_takes(facts: Project) -> None:
    """A rest of one token has no earlier one, and is left out."""
    context = context_of(facts)
    longest = min(moments.LENGTH, longest_row(context.layout.config, moments.LENGTH))
    texts = [" ".join(["w1"] * count) for count in (longest + 1, longest + 2, 1, 2 * longest)]
    assert [len(row) for row in moments.token_rows(context, texts)] == [longest, longest, 2, longest, longest]
    write_jsonl(facts.path / "rows.jsonl", [{"prompt": "w1 w2", "completion": "w3"}, {"text": " w4 w5 "}])
    assert moments.statistics_source(context, "rows.jsonl")[0] == ["w1 w2 w3", "w4 w5"]


def test_without_a_sink_nothing_changes() -> None:
    """Sums are the same bits as the plain mean of k kᵀ."""
    keys, first = rows_with(1.0)
    sums, plain = summed(keys, first), torch.zeros(WIDTH, WIDTH, dtype=torch.float64)
    for part in keys.split(100):
        plain += (part.T @ part).to(plain)
    assert torch.equal(sums.rest + sums.outliers, plain)
    assert OUTLIER > 50
    assert SINKS_A_ROW < 3 < DOMINATES * 10


def test_strengths_are_relative_to_the_rest() -> None:
    values = torch.tensor([1.0, 2.0, 3.0, 9994.0], dtype=torch.float64)
    plain, robust = (Moments(torch.eye(4, dtype=torch.float64), values, 10, {}, trace) for trace in (None, 6.0))
    assert (plain.total, plain.scale, robust.total, robust.scale) == (10000.0, 2500.0, 6.0, 1.5)
    from workbench.edit.closed_form.preset import of_moments, of_null_space

    metric = of_null_space(robust, 0.5, 0.01)
    assert metric.diagonal.tolist() == [0.06, 0.06], "directions that carry up to half of the rest's trace, 1 + 2 of 6"
    assert of_null_space(plain, 0.5, 0.01).diagonal.tolist() == [100.0] * 3
    assert of_moments(robust, 0.0, 1e-3).diagonal.tolist() == pytest.approx([0.006] * 4)
    assert of_moments(robust, 1.0, 0.0).diagonal[-1] == 4 * 9994.0, "the sink's own direction stays as hard to change as it is"
    unused = Moments(torch.eye(4, dtype=torch.float64), torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=torch.float64), 10, {})
    assert of_moments(unused, 2.0, 0.0).diagonal.tolist() == pytest.approx([8 * 1.5e-7, 8.0, 16.0, 24.0], rel=1e-12)
    assert of_null_space(plain, 1e-5, 0.01).diagonal.tolist() == [100.0], "one direction at least"


@pytest.fixture
def sink(facts: Project) -> MethodContext:
    """A live model whose first token of a row reads a key of length LONG at layer 1, along a direction that other tokens, and the facts, use as well."""
    context = context_of(facts)
    module = Parts.find(context).out(1)
    weight = module.weight
    assert isinstance(weight, Tensor)
    weight.data[:, 0] = 0.0

    def swell(_module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        keys = args[0].clone()
        keys[:, 0, 0] = LONG * keys[:, -1].norm(dim=-1)
        return (keys, *args[1:])

    module.register_forward_pre_hook(swell)
    return context


@pytest.mark.parametrize("name", ["alphaedit", "encore", "memit", "rome", "emmet"])
def test_edits_at_a_sink_layer_write_their_values(name: str, sink: MethodContext, facts: Project) -> None:
    """The edit writes what it writes at the same layer without the sink, and the sink's own output does not change."""
    with_sink = solve(sink, name, refine=0)
    plain = solve(replace(context_of(facts), cache=facts.path / "plain"), name, refine=0)
    left_out = with_sink.record["statistics"]["1"]["left_out"]
    assert left_out["share"] > 0.99
    assert left_out["vectors"] == left_out["first"] > 1
    assert "left_out" not in plain.record["statistics"]["1"]
    written, expected = ([f["written"] for f in edit.record["facts"]] for edit in (with_sink, plain))
    assert min(written) > 0.8 * min(expected) > 0.3
    update = with_sink.factors["model.layers.1.mlp.down_proj.weight"]
    some = read_facts(facts.path / "facts.jsonl", "facts.jsonl")
    moved = LONG * float((update.left @ update.right[:, 0]).norm())
    assert moved < 0.2 * float(projected(sink, some)[1].norm(dim=1).mean()), "‖ΔW k‖ of the sink's key, in norms of a key"


def test_an_interrupted_collection_keeps_what_it_set_apart(
    sink: MethodContext,
    facts: Project,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(moments, "_SAVE_EVERY", 0.0)
    monkeypatch.setattr(moments, "BATCH_TOKENS", moments.LENGTH)
    whole = solve(replace(sink, cache=facts.path / "other"), first=1)
    with pytest.raises(Interrupt):
        solve(replace(sink, progress=stopping("statistics", 200)), first=1)
    again = solve(sink, first=1)
    assert again.record["statistics"] == whole.record["statistics"]
    assert again.record["statistics"]["1"]["left_out"]["vectors"] == 12
