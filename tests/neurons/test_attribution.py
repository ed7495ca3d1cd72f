"""Knowledge neurons: attributions against their definition, and facts whose neurons were planted or trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, MambaConfig

from worlds import mixtures
from worlds.planted import CLASSES, CONTINUATIONS, MARKERS, NEURONS, planted_llama
from worlds.project import CPU
from worlds.tiny import live

from workbench.activations.sites import find_sites, visiting
from workbench.facts.facts import Fact
from workbench.ground.errors import WorkbenchError
from workbench.neurons.attribution import (
    Attribution,
    FactPrompt,
    answer_probabilities,
    attribute,
    earlier_tokens,
    fact_prompts,
    norm_behind,
)
from workbench.neurons.fact_neurons import LocateSettings, knowledge_neurons, layer_shares, locate_facts, union_of


def prompt_of(answer: int = 2, seed: int = 0, length: int = 7) -> FactPrompt:
    tokens = torch.randint(2, 60, (length + answer,), generator=torch.Generator().manual_seed(seed)).tolist()
    return FactPrompt("f", tuple(tokens[:-1]), length, tuple(tokens[length:]))


def probability(model: Any, prompt: FactPrompt) -> float:
    with torch.no_grad():
        p = model(input_ids=torch.tensor([prompt.tokens])).logits[0].double().softmax(-1)
    return float(torch.stack([p[prompt.prompt - 1 + j, token] for j, token in enumerate(prompt.answer)]).prod())


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "granite"])
def test_attributions_add_up(family: str, dense_of: Callable[[str], Path]) -> None:
    """Attributions of every layer add up to P(ā) − P(0) within 2 % at 50 steps; P(0) comes from a run with zeroed activations."""
    model, prompt = live(dense_of(family)), prompt_of()
    sites = find_sites(model, 3, CPU)
    learned = [p.requires_grad for p in model.parameters()]
    found = attribute(model, sites, prompt, steps=50)
    assert [p.requires_grad for p in model.parameters()] == learned
    assert found.clean == pytest.approx(probability(model, prompt), rel=1e-4)
    for number, site in enumerate(sites):

        def zero(_n: int, activations: torch.Tensor) -> torch.Tensor:
            flat = activations.reshape(len(prompt.tokens), -1).clone()
            flat[prompt.prompt - 1] = 0
            return flat.reshape(activations.shape)

        with visiting(model, [site], zero):
            assert found.zeroed[number] == pytest.approx(probability(model, prompt), rel=1e-4)
        gap = found.clean - found.zeroed[number]
        assert float(found.scores[number].sum()) == pytest.approx(gap, rel=0.02, abs=1e-3 * found.clean)
    assert found.error <= 0.02


@pytest.mark.parametrize("answer", [1, 3])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma3", "phi3"])
def test_a_cache_of_earlier_tokens_changes_nothing(
    family: str, answer: int, dense_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attributions in passes over the last tokens of several layers at once equal those of one layer and all tokens at a time."""
    model, prompt = live(dense_of(family)), prompt_of(answer, length=11)
    sites = find_sites(model, 3, CPU)
    found = attribute(model, sites, prompt, steps=6)
    passes: list[int] = []
    hook = model.get_input_embeddings().register_forward_hook(lambda _m, args, _o: passes.append(args[0].numel()))
    attribute(model, sites, prompt, steps=6)
    # All tokens once; the earlier ones; the last ones behind them; and all layers in one pass, at P(0) and six scales each.
    assert passes == [10 + answer, 10, answer, 3 * 7 * answer]
    hook.remove()
    monkeypatch.setattr("workbench.neurons.attribution.earlier_tokens", lambda *_: None)
    whole = attribute(model, sites, prompt, steps=6)
    assert found.clean == whole.clean
    for mine, other in zip(found.scores, whole.scores, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5 * float(other.abs().max()), rtol=1e-5)
    assert found.zeroed == pytest.approx(whole.zeroed, rel=1e-5)


def test_a_cache_that_says_something_else_is_not_used(dense_of: Callable[[str], Path]) -> None:
    """A wrong probability behind the cache, an architecture without one, and a prompt of one token take whole passes."""
    model, prompt = live(dense_of("llama")), prompt_of()
    clean = probability(model, prompt)
    assert earlier_tokens(model, prompt, clean) is not None
    assert earlier_tokens(model, prompt, 1.01 * clean) is None
    assert earlier_tokens(model, prompt_of(length=1), 0.5) is None
    recurrent = AutoModelForCausalLM.from_config(
        MambaConfig(vocab_size=62, hidden_size=32, num_hidden_layers=2, state_size=4)
    ).eval()
    assert earlier_tokens(recurrent, prompt, probability(recurrent, prompt)) is None


def test_a_norm_behind_the_projection_is_reported(dense_of: Callable[[str], Path]) -> None:
    """It undoes the scaling down to almost zero, where the probability jumps: the sums miss the jump, and the error says so."""
    model = live(dense_of("gemma2"))
    assert attribute(model, find_sites(model, 3, CPU), prompt_of(), steps=50).error > 0.5


@pytest.mark.parametrize(
    ("family", "undone"), [("gemma2", True), ("olmo2", True), ("llama", False), ("gpt2", False), ("opt", False)]
)
def test_a_norm_behind_the_projection_is_found(family: str, undone: bool, dense_of: Callable[[str], Path]) -> None:
    """Halving the activations halves what they add to the hidden state only if no norm follows, with biases too."""
    model = live(dense_of(family))
    assert [norm_behind(model, site, [3, 9, 4, 11]) for site in find_sites(model, 3, CPU)] == [undone] * 3


def test_experts_are_attributed(tmp_path: Path) -> None:
    model, prompt = live(mixtures.save_mixture("mixtral", tmp_path / "m")), prompt_of()
    sites = find_sites(model, 2, CPU)
    found = attribute(model, sites, prompt, steps=50)
    assert found.error <= 0.02
    assert all(int((scores != 0).sum()) == 2 for scores in found.scores), "two of six experts are selected"


def test_one_step_is_the_gradient_by_activation(dense_of: Callable[[str], Path]) -> None:
    """At m = 1, an attribution is ā · ∂P/∂a at ā / 2: against finite differences of single neurons in a layer that is halved."""
    model, prompt = live(dense_of("llama")).double(), prompt_of()
    sites = find_sites(model, 3, CPU)
    found = attribute(model, sites, prompt, steps=1)
    for number, unit in ((0, 3), (2, 17)):
        values = []
        for step in (1e-2, -1e-2):

            def halved(_n: int, activations: torch.Tensor, step: float = step, unit: int = unit) -> torch.Tensor:
                changed = activations.clone()
                changed[..., prompt.prompt - 1, :] *= 0.5
                changed[..., prompt.prompt - 1, unit] += step * activations[..., prompt.prompt - 1, unit]
                return changed

            with visiting(model, [sites[number]], halved):
                values.append(probability(model, prompt))
        expected = (values[0] - values[1]) / 2e-2
        assert float(found.scores[number][unit]) == pytest.approx(expected, rel=0.02, abs=1e-3 * found.clean)


def test_padding_does_not_change_probabilities(dense_of: Callable[[str], Path]) -> None:
    model = live(dense_of("gpt2"))
    sites = find_sites(model, 3, CPU)
    prompts = [prompt_of(1, 0, 3), prompt_of(3, 1, 12), prompt_of(2, 2, 6)]
    found = answer_probabilities(model, sites, prompts, {})
    for value, prompt in zip(found.tolist(), prompts, strict=True):
        assert value == pytest.approx(probability(model, prompt), rel=1e-4)
    off = answer_probabilities(model, sites, prompts, {1: torch.arange(9)}, 0.0)
    single = [float(answer_probabilities(model, sites, [p], {1: torch.arange(9)}, 0.0)) for p in prompts]
    assert off.tolist() == pytest.approx(single, rel=1e-4)
    assert off.tolist() != pytest.approx(found.tolist(), rel=1e-4)


def scores_of(*rows: list[float]) -> Attribution:
    return Attribution(tuple(torch.tensor(row, dtype=torch.float64) for row in rows), 1.0, (0.0,) * len(rows))


def test_kept_neurons() -> None:
    """Above a fifth of the largest attribution of a wording, in enough wordings."""
    from workbench.activations.sites import Site

    sites = [Site(n, "neurons", "", torch.nn.Linear(3, 2), 3) for n in (4, 9)]
    wordings = [
        scores_of([1.0, 0.1, 0.5], [0.0, 0.3, -2.0]),
        scores_of([0.2, 0.3, 0.0], [0.0, 0.6, 0.1]),
        scores_of([9.0, 1.0, 2.0], [0.0, 1.0, 0.0]),
    ]

    def kept(share: float) -> dict[int, list[int]]:
        found = knowledge_neurons("f", sites, wordings, share=share)
        return {layer: index.tolist() for layer, index in found.indices.items()}

    assert kept(1.0) == {4: [0]}
    assert kept(0.66) == {4: [0, 2], 9: [1]}
    assert kept(0.1) == {4: [0, 1, 2], 9: [1]}
    assert kept(2 / 3) == {4: [0, 2], 9: [1]}
    found = knowledge_neurons("f", sites, wordings, share=1.0)
    assert found.scores[4].tolist() == pytest.approx([10.2 / 3])
    assert knowledge_neurons("f", sites, [scores_of([-1.0, 0, 0], [0, 0, 0])]).size == 0
    assert layer_shares(sites, wordings[:2]) == pytest.approx({4: (1.6 / 1.9 + 0.5 / 1.2) / 2, 9: (0.3 / 1.9 + 0.7 / 1.2) / 2})


def test_planted_facts_are_found_and_proved() -> None:
    """The planted neuron carries its fact: off, the fact is gone and the others stay; random neurons do nothing."""
    model = planted_llama()
    sites = find_sites(model, 2, CPU)
    facts = [
        [FactPrompt(name, (*words, MARKERS[n]), len(words) + 1, (CONTINUATIONS[n],)) for words in ([9, 12], [15, 7, 20], [8])]
        for n, name in enumerate(CLASSES)
    ]
    seen: list[tuple[int, int]] = []
    texts = [(name, "answer") for name in CLASSES]
    found, sets = locate_facts(model, sites, facts, texts, LocateSettings(steps=50), progress=lambda a, b: seen.append((a, b)))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    for fact in found:
        layer, unit = NEURONS[fact.fact]
        assert [(neuron.layer, neuron.neuron) for neuron in fact.neurons] == [(layer, unit)]
        assert {n: index.tolist() for n, index in sets[fact.fact].indices.items()} == {layer: [unit]}
        assert fact.set == f"knowledge/facts/{fact.fact}"
        assert fact.probability > 0.9
        assert fact.error <= 0.02
        assert fact.layers[str(layer)] > 0.95
        off, double = fact.changes["suppressed"], fact.changes["amplified"]
        assert off.own < -0.9
        assert abs(off.random) < 0.01
        assert off.others == pytest.approx(0, abs=1e-5)
        assert 0 <= double.own < 0.1
        assert off.random == pytest.approx(sum(off.drawn) / 3)
    together = union_of("all", sets.values(), sites)
    assert {(layer, int(i)) for layer, index in together.indices.items() for i in index} == set(NEURONS.values())
    own = {fact.fact: fact.neurons[0].score for fact in found}
    assert sorted(together.scores[0].tolist()) == pytest.approx(sorted([own["red"], own["blue"]]))


def test_prompts_of_facts(tokenizer: Any) -> None:
    """The answer stands behind every wording, whose last token is where it is predicted."""
    fact = Fact("f", "The capital of {subject} is", "France", "Rome", "Paris", paraphrases=("France has the capital",))
    for answer, text in (("target", " Rome"), ("target_true", " Paris")):
        prompts = fact_prompts(None, tokenizer, fact, answer)  # type: ignore[arg-type]
        for prompt, wording in zip(prompts, (fact.text, *fact.paraphrases), strict=True):
            whole = [*prompt.tokens, prompt.answer[-1]]
            assert tokenizer.decode(whole) == wording + text
            assert tokenizer.decode(prompt.answer) == text
            assert prompt.prompt == len(whole) - len(prompt.answer)
    with pytest.raises(WorkbenchError, match="has no 'target_true'"):
        fact_prompts(None, tokenizer, Fact("f", "A is", None, "b", place="facts.jsonl:3"), "target_true")  # type: ignore[arg-type]


def test_the_model_s_own_answer() -> None:
    """Its most likely token after the first prompt is the answer of all wordings."""

    class Words:
        is_fast = False
        bos_token_id = None

        def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
            return {"input_ids": [int(word) for word in text.split()]}

        def convert_ids_to_tokens(self, token: int) -> str:
            return str(token)

    fact = Fact("f", f"9 12 {MARKERS[1]}", None, "20", paraphrases=(f"8 {MARKERS[1]}",))
    prompts = fact_prompts(planted_llama(), Words(), fact, "own")
    assert prompts == [
        FactPrompt("f", (9, 12, MARKERS[1]), 3, (CONTINUATIONS[1],)),
        FactPrompt("f", (8, MARKERS[1]), 2, (CONTINUATIONS[1],)),
    ]
