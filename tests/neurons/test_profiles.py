"""Profiles of single neurons on a model whose neurons are planted: what excites them, what they write, what goes with them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel

from worlds.project import CPU
from worlds.tiny import live

from workbench.activations.labelled import Item, Labelled
from workbench.activations.sets import set_of
from workbench.activations.sites import find_sites, stream
from workbench.neurons.ablation import FLIPPED, MATCHED, WRITTEN, ablate_functions, flipped_items, matched_changes
from workbench.neurons.controls import ablate
from workbench.neurons.profiles import BINS, Chosen, NeuronProfile, ProfilesResult, named_places, profile_neurons
from workbench.neurons.subject import NeuronSubject


@pytest.fixture(scope="module")
def subject(llama: Path) -> NeuronSubject:
    model = live(llama)
    sites = find_sites(model, model.config.num_hidden_layers, CPU)
    config = model.config.to_dict()
    return NeuronSubject("llama", model, AutoTokenizer.from_pretrained(llama), sites, config, "digest", "base", llama)


def texts() -> Labelled:
    items = [
        Item(
            f"{f}-{t}-{i}",
            " ".join(f"w{(11 * f + 7 * t + 3 * i + 5 * k) % 40}" for k in range(4 + i)),
            "w1 w2",
            f"f{f}",
            f"f{f}t{t}",
            "train",
            "x:1",
        )
        for f in range(2)
        for t in range(2)
        for i in range(2)
    ]
    return Labelled(tuple(items), "texts.jsonl", "digest")


@pytest.fixture(scope="module")
def profiled(subject: NeuronSubject) -> ProfilesResult:
    return profile_neurons(subject, texts(), [Chosen((0, 5), {"f0": 3.5}, True), Chosen((1, 2), {}, False)])


def activations(subject: NeuronSubject) -> list[list[torch.Tensor]]:
    """Activations of every text, read alone: text -> site -> [tokens, units]."""
    found = []
    for row in subject.rows(texts().items):
        sites: list[torch.Tensor] = []
        stream(subject.model, subject.sites, [row], lambda _, a, __: sites.append(a[0].float()), "whole")  # noqa: B023 - called at once
        found.append(sites)
    return found


def test_the_texts_with_the_largest_activations_are_shown(subject: NeuronSubject, profiled: ProfilesResult) -> None:
    """The first token of a text does not count."""
    alone, rows = activations(subject), subject.rows(texts().items)
    for profile, (site, unit) in zip(profiled.neurons, ((0, 5), (1, 2)), strict=True):
        own = [of_text[site][1:, unit] for of_text in alone]
        largest = sorted((float(values.abs().max()) for values in own), reverse=True)
        shown = [abs(example.values[example.top]) for example in profile.examples]
        assert shown == pytest.approx(largest[:6], rel=1e-4)
        every = torch.cat(own)
        assert (profile.low, profile.high) == pytest.approx((float(every.min()), float(every.max())), rel=1e-4)
        assert (sum(profile.histogram), len(profile.histogram)) == (len(every), BINS)
        assert profile.histogram[0] >= 1 <= profile.histogram[-1]
        best = profile.examples[0]
        text = max(range(len(own)), key=lambda i: float(own[i].abs().max()))
        assert best.task == texts().items[text].task
        assert [t.strip() for t in best.tokens] == [subject.tokenizer.decode([t]).strip() for t in rows[text].tokens][
            : len(best.tokens)
        ]


def test_favors_are_logits_with_minus_without(subject: NeuronSubject, profiled: ProfilesResult) -> None:
    """Weights are set to zero here instead of activations; the mean over the vocabulary is taken away."""
    rows, own = subject.rows(texts().items), [of_text[1][:, 2] for of_text in activations(subject)]
    peaks = [float(values[1:].abs().max()) for values in own]
    best = sorted(range(len(own)), key=lambda i: -peaks[i])[:6]
    out = subject.sites[1].module.weight
    assert isinstance(out, torch.nn.Parameter)
    kept, moved, changed, predictions = out.detach().clone(), torch.zeros(0), 0, 0
    with torch.no_grad():
        for text in best:
            tokens = torch.tensor([rows[text].tokens])
            before = subject.model(input_ids=tokens).logits[0]
            out[:, 2] = 0
            after = subject.model(input_ids=tokens).logits[0]
            out.copy_(kept)
            at = 1 + int(own[text][1:].abs().argmax())
            moved = (before - after)[at] + (moved if len(moved) else 0)
            changed += int((before.argmax(-1) != after.argmax(-1)).sum())
            predictions += len(before)
    moved = moved / 6 - (moved / 6).mean()
    profile = profiled.neurons[1]
    top = moved.topk(3)
    assert [subject.tokenizer.decode([i]) for i in top.indices.tolist()] == list(profile.favors)[:3]
    assert list(profile.favors.values())[:3] == pytest.approx(top.values.tolist(), rel=1e-3, abs=1e-6)
    assert min(profile.disfavors.values()) == pytest.approx(float(moved.min()), rel=1e-3, abs=1e-6)
    assert (profile.changed, profile.predictions) == (changed, predictions)
    assert len(profile.changes) == min(8, changed)


def test_neighbors_are_correlations_over_tokens(subject: NeuronSubject, profiled: ProfilesResult) -> None:
    alone = activations(subject)
    every = [torch.cat([of_text[site][1:] for of_text in alone]) for site in range(len(subject.sites))]
    whole = torch.cat(every, 1)
    own = every[0][:, 5]
    r = torch.corrcoef(torch.cat([own[:, None], whole], 1).T.double())[0, 1:]
    r[5] = 0
    expected = r[r.abs().topk(8).indices]
    found = profiled.neurons[0].neighbors
    assert [n.correlation for n in found] == pytest.approx(expected.tolist(), abs=1e-4)
    starts = {site.layer: sum(s.units for s in subject.sites[:n]) for n, site in enumerate(subject.sites)}
    assert [starts[n.layer] + n.neuron for n in found] == r.abs().topk(8).indices.tolist()


def test_names(subject: NeuronSubject, profiled: ProfilesResult) -> None:
    assert [one.place for one in named_places(subject, ["1.7", "0.0"])] == [(1, 7), (0, 0)]
    first, second = profiled.neurons
    assert (first.layer, first.neuron, first.functions, first.found) == (0, 5, {"f0": 3.5}, True)
    assert (second.functions, second.found) == ({}, False)
    assert isinstance(first, NeuronProfile)


def greedy(model: PreTrainedModel, tokens: list[int]) -> list[int]:
    """The most likely tokens until the end token, computed from the whole text every time."""
    written: list[int] = []
    with torch.no_grad():
        while len(written) < WRITTEN and model.generation_config.eos_token_id not in written:
            written.append(int(model(input_ids=torch.tensor([tokens + written])).logits[0, -1].argmax()))
    return written


def test_items_that_lose_most_are_continued_with_and_without_the_set(subject: NeuronSubject, llama: Path) -> None:
    items, layer = list(texts().items), subject.sites[0]
    none = [torch.tensor([], dtype=torch.long)] * (len(subject.sites) - 1)
    sets = {
        name: set_of(name, subject.sites, [torch.arange(first, layer.units, 2), *none]) for first, name in enumerate(("f0", "f1"))
    }
    lost = ablate(subject.model, subject.sites, subject.rows(items), list(sets.values()))
    found = flipped_items(subject, items, sets, lost)
    for first, name in enumerate(sets):
        rise = ((lost.sums[first] - lost.base.sums) / lost.tokens).tolist()
        own = sorted((i for i, item in enumerate(items) if item.function == name), key=lambda i: -rise[i])
        assert [one.rise for one in found[name]] == pytest.approx([rise[i] for i in own[:FLIPPED]])
        other = live(llama)
        with torch.no_grad():
            other.model.layers[0].mlp.down_proj.weight[:, first::2] = 0
        for one, i in zip(found[name], own, strict=False):
            prompt = subject.rows([items[i]])[0].read("prompt")
            assert one.with_set == subject.tokenizer.decode(greedy(subject.model, prompt))
            assert one.without == subject.tokenizer.decode(greedy(other, prompt))
    assert any(one.with_set != one.without for of in found.values() for one in of)


def test_random_sets_are_measured_on_the_function_s_own_items(subject: NeuronSubject, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every draw changes as much as the set itself if the set takes its place; the first is that of the matrix."""
    items, few = list(texts().items), [torch.tensor([2 * n, 2 * n + 1]) for n in range(len(subject.sites))]
    sets = {name: set_of(name, subject.sites, [index + first for index in few]) for first, name in enumerate(("f0", "f1"))}
    means = [torch.rand(site.units, generator=torch.Generator().manual_seed(n)) for n, site in enumerate(subject.sites)]
    measured = ablate_functions(subject, items, sets, means)
    drawn = matched_changes(subject, items, sets, means, measured)
    monkeypatch.setattr("workbench.neurons.ablation.matched_set", lambda _name, _sites, like, *_: like)
    found = matched_changes(subject, items, sets, means, measured)
    for number, name in enumerate(sets):
        own, first = measured[0].changes[number][number], measured[0].controls["matched"].changes[number][number]
        assert found[name] == pytest.approx([first, *[own] * (MATCHED - 1)], rel=1e-4, abs=1e-7)
        assert (drawn[name][0], len(set(drawn[name]))) == (first, MATCHED)
