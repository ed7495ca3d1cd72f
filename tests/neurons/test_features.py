"""Features beside neurons: scores against a direct computation, a planted feature that is found, and a null world in which nothing is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score
from torch import Tensor

from worlds.project import CPU
from worlds.tiny import config

from workbench.activations.labelled import Item, ItemRow, Labelled
from workbench.activations.sites import find_sites, visiting
from workbench.neurons.feature_families import Units, directions_at
from workbench.neurons.features import (
    FamilyScore,
    FamilyScores,
    FeatureSettings,
    FeaturesResult,
    _judged,
    _scores,
    compare_features,
    selectivity,
)
from workbench.neurons.sparse_coder import Dictionary, seeing
from workbench.neurons.statistics import task_test
from workbench.neurons.subject import NeuronSubject

FUNCTIONS, TASKS, EACH = 3, 6, 4
WIDTH, FEATURES, PLANTED = 32, 40, 7
MARKERS = (50, 51, 52)


class Rows:
    """Texts as tokens, by the number in an item's prompt."""

    def __init__(self, tokens: list[list[int]]) -> None:
        self.tokens = tokens

    def __call__(self, items: Any, *_: Any) -> list[ItemRow]:
        return [ItemRow(self.tokens[int(item.prompt)], len(self.tokens[int(item.prompt)])) for item in items]


def world(marked: bool, seed: int = 0) -> tuple[Labelled, list[list[int]]]:
    """Texts of random words; each task has words of its own, and a function's texts its marker if `marked`."""
    draw = np.random.default_rng(seed)
    items, tokens = [], []
    for f in range(FUNCTIONS):
        for t in range(TASKS):
            own = draw.integers(2, 50, 12)
            for _ in range(EACH):
                words = draw.choice(own, 6 + int(draw.integers(5))).tolist()
                for place in (2, 4) if marked else ():
                    words[place] = MARKERS[f]
                split: Any = "train" if t % 2 == 0 else "heldout"
                items.append(Item(str(len(items)), str(len(items)), "", f"f{f}", f"f{f}t{t}", split, "x:1"))
                tokens.append(words)
    return Labelled(tuple(items), "texts.jsonl", "digest"), tokens


@pytest.fixture(scope="module")
def model() -> Any:
    import transformers as t

    torch.manual_seed(0)
    return t.LlamaForCausalLM(config("llama", 2)).eval()


def subject_of(model: Any, tokens: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> NeuronSubject:
    rows = Rows(tokens)
    monkeypatch.setattr(NeuronSubject, "rows", lambda _self, items, *_: rows(items))
    none: Any = None
    return NeuronSubject("tiny", model, none, find_sites(model, 2, CPU), model.config.to_dict(), "digest", "tiny", Path("none"))


def states_of(subject: NeuronSubject, place: Any, tokens: list[list[int]], layer: int = 0) -> list[Tensor]:
    """Activations at a place of every text without its first token, each text alone."""
    found, site = [], subject.sites[layer]
    for text in tokens:
        seen: dict[str, Tensor] = {}
        with seeing(subject.model, subject.config, site, (place,), seen.__setitem__), torch.no_grad():
            subject.model(input_ids=torch.tensor([text]))
        found.append(seen[place][0, 1:])
    return found


def dictionary_of(
    subject: NeuronSubject, tokens: list[list[int]], marker: int | None, place: Any = "resid_pre", **more: Any
) -> Dictionary:
    """Random features that are rarely active; feature PLANTED is active at a marker's embedding alone."""
    draw = torch.Generator().manual_seed(3)
    encoder = torch.randn(FEATURES, WIDTH, generator=draw)
    bias = torch.full((FEATURES,), -0.5)
    if marker is not None:
        states = torch.cat(states_of(subject, place, tokens))
        embeddings = subject.model.get_input_embeddings().weight.detach()
        basis = torch.linalg.qr(embeddings[list(MARKERS)].T).Q
        encoder -= encoder @ basis @ basis.T  # other features see no marker
        direction = embeddings[marker]
        direction = direction / direction.norm()
        along = states @ direction
        top = along.max()
        encoder[PLANTED], bias[PLANTED] = direction, -(top + along[along < top - 1e-4].max()) / 2
    decoder = torch.randn(FEATURES, WIDTH, generator=draw)
    writes = "mlp_out" if place == "mlp_in" else place
    return Dictionary("mine", "sparsify", 0, "", place, writes, encoder, bias, decoder, torch.zeros(WIDTH), "relu", **more)


def family(result: FeaturesResult, name: str) -> FamilyScores:
    return next(of for of in result.families if of.family == name)


def test_a_planted_feature_is_found_and_judged_perfect(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    texts, tokens = world(marked=True)
    subject = subject_of(model, tokens, monkeypatch)
    result = compare_features(subject, texts, dictionary_of(subject, tokens, MARKERS[1]))
    row = family(result, "features").functions[1]
    assert (row.found, row.heldout) == (1, 1)
    assert [other.found for other in family(result, "features").functions] == [0, 1, 0]
    assert row.density_others == 0
    marked = [sum(word == MARKERS[1] for word in text[1:]) for text in tokens[TASKS * EACH : 2 * TASKS * EACH]]
    counted = sum(len(text) - 1 for text in tokens[TASKS * EACH : 2 * TASKS * EACH])
    assert row.density == pytest.approx(sum(marked) / counted, rel=1e-6)
    assert row.largest_effect > 5 > (row.smallest_effect or 99)
    chance = family(result, "random_encoder").functions[1]
    assert chance.heldout < 1
    assert result.data.tokens == sum(len(text) - 1 for text in tokens)


@pytest.mark.parametrize("place", ["resid_post", "mlp_in"])
def test_scores_are_those_of_a_direct_computation(place: str, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    texts, tokens = world(marked=False, seed=1)
    subject = subject_of(model, tokens, monkeypatch)
    made = dictionary_of(subject, tokens, None, place)
    result = compare_features(subject, texts, made, seed=5)
    states = states_of(subject, place, tokens)
    neurons: list[Tensor] = []
    with visiting(model, subject.sites[:1], lambda _, a: neurons.append(a[0, 1:].clone())), torch.no_grad():
        for text in tokens:
            model(input_ids=torch.tensor([text]))
    mean = torch.cat(states).mean(0)
    eigen = torch.linalg.svd(torch.cat(states) - mean, full_matrices=False).Vh
    singular = [torch.cat([(x - mean) @ eigen.T, -(x - mean) @ eigen.T], 1).relu() for x in states]
    owners = np.repeat(np.arange(FUNCTIONS), TASKS)
    for name, activations in (("features", [made.features(x) for x in states]), ("neurons", neurons), ("singular", singular)):
        values = torch.stack([a.abs().mean(0) for a in activations]).numpy()
        found = family(result, name)
        assert (found.units, found.alive) == (values.shape[1], int((values > 0).any(0).sum()))
        assert found.density == pytest.approx(float((torch.cat(activations) > 0).float().mean()), abs=2e-3)
        means = np.stack([values[i * EACH : (i + 1) * EACH].mean(0) for i in range(FUNCTIONS * TASKS)])
        test = task_test([means], owners, seed=5)
        for f, row in enumerate(found.functions):
            ap = {}
            for split in ("train", "heldout"):
                index = [i for i, item in enumerate(texts.items) if item.split == split]
                label = [texts.items[i].function == f"f{f}" for i in index]
                ap[split] = np.array([average_precision_score(label, values[index, unit]) for unit in range(values.shape[1])])
            assert row.heldout == pytest.approx(ap["heldout"][ap["train"] >= ap["train"].max() - 1e-9].mean(), abs=0.02)
            assert row.largest_effect == pytest.approx(test.effects[0][f].max(), rel=0.02)
            assert row.prevalence == pytest.approx(1 / 3)
    targets = torch.cat(states_of(subject, made.writes, tokens))
    missed = (targets - made.reconstruct(torch.cat(states))).square().sum()
    assert result.dictionary.explained == pytest.approx(float(1 - missed / (targets - targets.mean(0)).square().sum()), rel=1e-3)


def test_nothing_is_found_in_a_null_world(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five families of ten worlds whose functions have nothing in common: found in few of 50 (5 % each), and best units near chance."""
    wrong, best = 0, []
    for seed in range(10):
        texts, tokens = world(marked=False, seed=10 + seed)
        subject = subject_of(model, tokens, monkeypatch)
        result = compare_features(subject, texts, dictionary_of(subject, tokens, None), seed=seed)
        for of in result.families:
            wrong += any(row.found for row in of.functions)
            best += [row.heldout_equal - row.prevalence for row in of.functions]
        assert all(one.verdict == "undecided" or abs(one.difference) < 0.3 for one in result.summary)
    assert wrong <= 8
    assert abs(np.mean(best)) < 0.12


def test_families_have_equal_counts_and_draws_repeat(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    texts, tokens = world(marked=True)
    subject = subject_of(model, tokens, monkeypatch)
    made = dictionary_of(subject, tokens, MARKERS[0])
    first, again, other = (compare_features(subject, texts, made, seed) for seed in (0, 0, 1))
    assert first.to_dict() == again.to_dict()
    assert {of.family: of.units for of in first.families} == {
        "neurons": 48,
        "features": FEATURES,
        "random": FEATURES,
        "random_encoder": FEATURES,
        "singular": 2 * WIDTH,
    }
    assert first.count == FEATURES
    for row in family(first, "features").functions:  # the smallest family is not cut
        assert (row.heldout_equal, row.found_equal) == (row.heldout, pytest.approx(row.found_per_mille))
    assert family(first, "features") == family(other, "features").model_copy(
        update={"functions": family(first, "features").functions}
    )
    assert family(first, "random") != family(other, "random")
    assert [row.heldout for row in family(first, "neurons").functions] == [
        row.heldout for row in family(other, "neurons").functions
    ]


def test_the_scale_of_the_input_is_measured(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    texts, tokens = world(marked=False)
    subject = subject_of(model, tokens, monkeypatch)
    made = dictionary_of(subject, tokens, None, normalization="expected_average_only_in")
    scaled, mean, directions = directions_at(subject, subject.sites[0], subject.rows(texts.items), made)
    states = torch.cat(states_of(subject, "resid_pre", tokens))
    torch.testing.assert_close(scaled.encoder, made.encoder * WIDTH**0.5 / states.norm(dim=1).mean())
    torch.testing.assert_close(mean, states.mean(0), atol=1e-5, rtol=1e-5)
    spread = ((states - mean) @ directions.T).var(0)
    assert torch.equal(spread.sort(descending=True).values, spread)
    assert compare_features(subject, texts, made).to_dict() == compare_features(subject, texts, replace(scaled)).to_dict()


@pytest.mark.filterwarnings("ignore:invalid value")  # of the test where no unit of a cut is ever active
def test_families_are_cut_by_drawing_units() -> None:
    """One of 60 units is active on a function's texts: a cut of 20 has it in about a third of 400 draws."""
    texts, _ = world(marked=False)
    values = torch.zeros(len(texts.items), 60)
    values[: TASKS * EACH, 11] = 1
    tokens = torch.tensor([40.0, 50, 60])
    firing = torch.zeros(FUNCTIONS, 60)
    firing[0, 11], firing[1, 11] = 30, 11
    units = Units(lambda neurons, _: neurons, values, firing)
    made = _scores("random", units, texts, tokens, 20, FeatureSettings(draws=400), 3)
    own, other, _ = made.functions
    assert (own.found, own.heldout, own.density, own.density_others) == (1, 1, 0.75, 0.1)
    assert own.found_per_mille == pytest.approx(1000 / 60)
    share = own.found_equal * 20 / 1000
    assert share == pytest.approx(1 / 3, abs=0.08)
    assert own.heldout_equal == pytest.approx(share + (1 - share) / 3)
    assert own.crossed_equal == pytest.approx(own.heldout_equal)  # both splits are alike, and a hundredth of 20 units is one
    assert (other.found, other.found_equal, made.alive, made.units) == (0, 0, 1, 60)
    assert made.density == pytest.approx(41 / 150 / 60)


@pytest.mark.filterwarnings("ignore:invalid value")
def test_both_splits_choose_and_judge() -> None:
    """A unit that is active on a function's train texts alone is chosen by them for nothing, and held-out texts choose none of 60 units."""
    texts, _ = world(marked=False)
    values = torch.zeros(len(texts.items), 60)
    values[[i for i, item in enumerate(texts.items) if item.function == "f0" and item.split == "train"], 11] = 1
    units = Units(lambda neurons, _: neurons, values, torch.zeros(FUNCTIONS, 60))
    row = _scores("random", units, texts, torch.ones(FUNCTIONS), 60, FeatureSettings(), 3).functions[0]
    assert (row.heldout, row.heldout_equal) == pytest.approx((1 / 3, 1 / 3))
    assert row.crossed_equal == pytest.approx((1 / 3 + (1 + 59 / 3) / 60) / 2)


@pytest.mark.filterwarnings("ignore:invalid value")
def test_a_random_encoder_has_the_norms_of_the_dictionary(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Features too small for their bias are silent, and so are random ones in their place."""
    texts, tokens = world(marked=False)
    subject = subject_of(model, tokens, monkeypatch)
    made = dictionary_of(subject, tokens, None)
    result = compare_features(subject, texts, replace(made, encoder=made.encoder * 1e-3))
    assert [family(result, name).alive for name in ("features", "random_encoder", "random")] == [0, 0, FEATURES]
    assert family(compare_features(subject, texts, made), "random_encoder").alive > FEATURES / 2


def test_the_best_units_of_one_half_are_judged_on_the_other() -> None:
    choosing = np.array([[0.9, 0.2, 0.7, 0.7, 0.7, 0.1]])
    judging = np.array([[0.5, 0.9, 0.1, 0.2, 0.6, 0.8]])
    assert _judged(choosing, judging)[0] == pytest.approx(0.5)
    assert _judged(choosing, judging, 3)[0] == pytest.approx((0.5 + 2 * 0.3) / 3)
    assert _judged(choosing, judging, 4)[0] == pytest.approx(1.4 / 4)
    assert _judged(choosing, judging, 6)[0] == pytest.approx(judging.mean())


def scores(name: Any, values: list[float], found: float = 0) -> FamilyScores:
    fixed = {"prevalence": 0.2, "found": 0, "found_per_mille": 0, "found_equal": found, "largest_effect": 1}
    fixed |= {"heldout": 0, "heldout_equal": 0}
    rows = [
        FamilyScore(function=str(f), crossed_equal=value, smallest_effect=None, density=0, density_others=0, **fixed)  # type: ignore[arg-type]
        for f, value in enumerate(values)
    ]
    return FamilyScores(family=name, units=9, alive=9, density=0, functions=rows)


@pytest.mark.parametrize(("sign", "spread", "verdict"), [(1, 1, "more"), (-1, 1, "less"), (1, 9, "undecided")])
def test_the_summary_is_a_t_interval_over_functions(sign: int, spread: int, verdict: str) -> None:
    differences = np.array([0.1, 0.1 + 0.02 * spread, 0.1 - 0.02 * spread, 0.1]) * sign
    result = selectivity(scores("features", (0.5 + differences).tolist(), 3), scores("neurons", [0.5] * 4, 1))
    half = 3.182446 * differences.std(ddof=1) / 2
    assert (result.difference, result.low, result.high) == pytest.approx(
        (0.1 * sign, 0.1 * sign - half, 0.1 * sign + half), abs=1e-6
    )
    assert (result.verdict, result.found_difference) == (verdict, 2)
