"""`edit: patch` at subjects: one neuron each, with memit's value at the subject's last token in any wording; what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from worlds.dense import context_of, save_dense, write_text
from worlds.jsonl import write_jsonl
from worlds.places import STARTER
from worlds.project import Project
from worlds.tiny import live

from workbench.edit.closed_form import lookup
from workbench.edit.closed_form.lookup import Lookup, grouped, reworded
from workbench.edit.closed_form.moments import statistics_source
from workbench.edit.closed_form.values import Settings, values
from workbench.edit.gradient.patching import SUBJECT_RATE
from workbench.edit.inputs import contexts
from workbench.edit.memit import Memit
from workbench.edit.places.parts import Parts
from workbench.facts.facts import Fact
from workbench.facts.published import read_facts
from workbench.facts.spelling import misspellings, misspelt
from workbench.ground.errors import WorkbenchError
from workbench.models.prompts import as_message
from workbench.recipe.methods import methods
from workbench.run.plan import plan
from workbench.steps import Edit, MethodContext

FACTS = [
    {"id": "a", "prompt": "w5 {subject} w7 w8", "subject": "w10 w11", "target": "w30"},
    {"id": "b", "prompt": "w6 {subject} w9", "subject": "w12 w13", "target": "w31"},
]
# A random model hardly attends to a token, so that a value changes what is said at its own position alone.
LAST = [{**FACTS[0], "prompt": "w5 w7 {subject}"}, {**FACTS[1], "prompt": "w6 w9 {subject}"}]
SECOND = {"id": "c", "prompt": "w15 w16 {subject}", "subject": "w10 w11", "target": "w30"}
FIELDS: dict[str, Any] = {
    "facts": "facts.jsonl",
    "statistics": "text.txt",
    "tokens_per_input": 2,
    "preserve_generated": 8,
    "contexts": 1,
    "position": "subject_last",
    "layer": 1,
    "min_efficacy": 0,
}
F32 = "output: {dtype: float32}\n"
WIDTHS = {"gpt2": 128}


def grow(family: str = "llama", more: int = 8) -> str:
    return f"{{grow: width, neurons: {WIDTHS.get(family, 48) + more}, check: off}}"


def patch(**fields: Any) -> str:
    return json.dumps({"edit": "patch", **FIELDS, **fields})


def world(folder: Path, family: str = "llama", facts: list[dict[str, str]] = FACTS) -> Project:
    (folder / "recipes").mkdir(parents=True)
    save_dense(family, folder / "base")
    write_jsonl(folder / "facts.jsonl", facts)
    write_text(folder / "text.txt")
    return Project(folder)


def grown(project: Project, family: str = "llama") -> Path:
    return Path(project.run(f"steps: [{grow(family)}]\n" + F32, "grown.yaml")["model"])


def solve(context: MethodContext, **fields: Any) -> Edit:
    return methods()["edit:patch"].model_validate({"edit": "patch", **FIELDS, **fields}).solve(context)  # type: ignore[attr-defined,no-any-return]


def tokens(project: Project, text: str) -> torch.Tensor:
    known = json.loads((project.path / "base" / "tokenizer.json").read_text("utf-8"))["model"]["vocab"]
    return torch.tensor([[known[word] for word in text.split()]])


def outputs(model: Any, name: str, ids: torch.Tensor) -> torch.Tensor:
    """Return the projection's output at every token."""
    seen: list[torch.Tensor] = []
    handle = model.get_submodule(name).register_forward_hook(lambda _m, _a, output: seen.append(output[0]))
    with torch.no_grad():
        model(ids)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma"])
def test_a_neuron_writes_its_value_at_its_subject(family: str, tmp_path: Path) -> None:
    """At the subject's last token the projection's output moves by the value that is optimized there; nowhere else in the prompt."""
    project = world(tmp_path / "p", family)
    base = grown(project, family)
    context = context_of(project, str(base))
    texts, _ = statistics_source(context, "text.txt")
    at = Lookup(context, Parts.find(context), 1, "subject_last", contexts(texts, 1), widely=True)
    memit = Memit(edit="memit", facts="facts.jsonl")
    settings = Settings(60, SUBJECT_RATE, memit.clamp, 0.97)
    facts = read_facts(project.path / "facts.jsonl", "facts.jsonl")
    wanted = values(at, grouped(facts, "subject_last"), settings, context.model_key).rows("change")
    run = project.run(f"steps: [{grow(family)}, {patch()}]\n" + F32)
    old, new = live(base), live(Path(run["model"]))
    name = "transformer.h.1.mlp.c_proj" if family == "gpt2" else "model.layers.1.mlp.down_proj"
    for text, place, change in (("w5 w10 w11 w7 w8", 2, wanted[0]), ("w6 w12 w13 w9", 2, wanted[1])):
        moved = outputs(new, name, tokens(project, text)) - outputs(old, name, tokens(project, text))
        torch.testing.assert_close(moved[place], change, atol=2e-4, rtol=2e-3)
        rest = torch.cat((moved[:place], moved[place + 1 :]))
        assert float(rest.abs().max()) <= 0.02 * float(change.abs().max())
    assert (run["steps"][1]["neurons"], run["steps"][1]["layers"]) == (2, [1])


def test_other_wordings_get_the_value_and_other_subjects_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workbench.edit.patch.BEHIND", 1)  # ten queries of random states leave no room in 32 dimensions
    project = world(tmp_path / "p", facts=LAST)
    base = grown(project)
    run = project.run(f"steps: [{grow()}, {patch()}]\n" + F32)
    old, new = live(base), live(Path(run["model"]))
    assert run["steps"][1]["efficacy"] == 1.0
    for fact in LAST:
        prompt = tokens(project, fact["prompt"].replace("{subject}", fact["subject"]))
        assert new(prompt).logits[0, -1].argmax() == tokens(project, fact["target"])[0, 0]
    name = "model.layers.1.mlp.down_proj"
    own, reworded = (
        (outputs(new, name, tokens(project, text)) - outputs(old, name, tokens(project, text)))[place]
        for text, place in (("w5 w7 w10 w11", 3), ("w40 w41 w42 w10 w11 w43", 4))
    )
    assert float(torch.nn.functional.cosine_similarity(own, reworded, dim=0)) > 0.999
    assert 0.2 < float(reworded.norm() / own.norm()) < 2
    other = tokens(project, "w5 w20 w21 w7 w8")
    with torch.no_grad():
        assert torch.equal(new(other).logits, old(other).logits)


def test_neurons_are_at_subjects_where_every_fact_has_one(tmp_path: Path) -> None:
    """By default; not for the ends of texts."""
    context = context_of(world(tmp_path / "p", facts=LAST))
    assert solve(context, position=None).record["position"] == "subject_last"
    assert solve(context, position=None, end_of_text=True).record["position"] == "prompt_last"
    write_jsonl(tmp_path / "p" / "facts.jsonl", [LAST[0], {"id": "b", "prompt": "w6 w9 w12", "target": "w31"}])
    assert solve(context, position=None).record["position"] == "prompt_last"


def test_facts_about_one_subject_share_a_neuron(tmp_path: Path) -> None:
    project = world(tmp_path / "p", facts=[*LAST, SECOND])
    context = context_of(project, str(grown(project)))
    own = {name: tensor.clone() for name, tensor in context.model.state_dict().items()}
    first, second = solve(context), solve(context)
    assert all(torch.equal(own[name], tensor) for name, tensor in context.model.state_dict().items())
    assert first.record == second.record
    assert (first.record["neurons"], first.record["facts"], first.record["efficacy"]) == (2, 3, 1.0)
    assert {factors.rank for factors in first.factors.values()} == {2}


def test_values_are_those_of_the_model_without_the_columns_that_are_lent(tmp_path: Path) -> None:
    """More facts take more neurons, so that the values of fewer facts are others, whatever the cache holds."""
    warm, cold = (world(tmp_path / name) for name in ("warm", "cold"))
    solve(context_of(warm))
    first, second = (solve(context_of(project), first=1) for project in (warm, cold))
    assert first.record["lent"] == 1
    assert all(torch.equal(first.factors[name].left, factors.left) for name, factors in second.factors.items())


def test_subjects_whose_facts_are_said_get_no_neuron(tmp_path: Path) -> None:
    project = world(tmp_path / "p")
    context = context_of(project, str(grown(project)))
    said = int(context.model(tokens(project, "w6 w12 w13 w9")).logits[0, -1].argmax())
    word = context.tokenizer.decode([said])
    write_jsonl(project.path / "facts.jsonl", [FACTS[0], {**FACTS[1], "target": word}])
    assert [one["fact"] for one in solve(context).record["patches"]] == ["a"]


def test_without_a_layer_it_is_the_one_at_a_quarter_of_the_depth(tmp_path: Path) -> None:
    record = solve(context_of(world(tmp_path / "p", facts=LAST)), layer=None).record
    assert record["layers"] == [1], "a quarter of three layers is .75"


def test_a_second_step_ends_the_texts(tmp_path: Path) -> None:
    project = world(tmp_path / "p", facts=LAST)
    ends = patch(position="prompt_last", layer=2, end_of_text=True)
    run = project.run(f"steps: [{grow()}, {patch()}, {ends}]\n" + F32)
    model, end = live(Path(run["model"])), context_of(project).tokenizer.eos_token_id
    for fact in LAST:
        prompt = tokens(project, fact["prompt"].replace("{subject}", fact["subject"]))
        made = model.generate(prompt, max_new_tokens=4, do_sample=False, pad_token_id=0)[0, prompt.shape[1] :].tolist()
        assert made == [int(tokens(project, fact["target"])[0, 0]), end]
    assert run["steps"][2]["neurons"] == len(LAST)


def test_what_has_no_place_at_a_subject_is_refused(tmp_path: Path) -> None:
    project = world(tmp_path / "p")
    with pytest.raises(WorkbenchError, match="`end_of_text` is for neurons at `prompt_last`"):
        project.resolve(f"steps: [{grow()}, {patch(end_of_text=True)}]\n")
    subjects = [{"prompt": "w1 {subject} is", "subject": f"w{i}", "target": f"w{i + 1}"} for i in range(20, 40)]
    write_jsonl(project.path / "facts.jsonl", subjects)
    with pytest.raises(
        WorkbenchError, match=r"the facts need \d\d neurons, one for each subject with a fact that the model does not say"
    ):
        project.run(f"steps: [{grow(more=1)}, {patch()}]\n")
    write_jsonl(project.path / "facts.jsonl", [FACTS[0], {"prompt": "w1 is", "target": "w2"}])
    with pytest.raises(WorkbenchError, match=r"facts.jsonl:2: the fact has no subject, at which its neuron could act"):
        project.resolve(f"steps: [{grow()}, {patch()}]\n")


def test_plan_counts_values(tmp_path: Path) -> None:
    project = world(tmp_path / "p")
    context = context_of(project, str(grown(project)))

    def work(**fields: Any) -> dict[str, Any]:
        step = methods()["edit:patch"].model_validate({"edit": "patch", **FIELDS, **fields})
        cost: dict[str, Any] = step.cost(context.layout, project.path, context.cache)  # type: ignore[attr-defined]
        assert cost["tokens"] > sum(cost["work"].values()) - cost["work"]["facts"]
        return cost["work"]  # type: ignore[no-any-return]

    assert "values" not in work(position="prompt_last")
    # The prompt, one beginning, two spellings, three wordings, a message and prompts to spare; a quarter of 60 steps.
    assert work()["values"] == len(FACTS) * 9 * 12 * 15
    peak = [
        plan(project.resolve(f"steps: [{patch(**fields)}]\n" + F32), project.path / "runs").peak_bytes
        for fields in ({"preserve_generated": 10_000}, {"preserve_generated": 20_000})
    ]
    assert peak[1] - peak[0] == 10_000 * 12 * 32 * 16, "bytes of states of 32 channels"


def test_wordings_leave_out_words_beside_the_subject() -> None:
    fact = Fact("a", "Where was {subject} born?", "Ada Lovelace", "London")
    asked, *shorter = [other.prompt for other in reworded(fact)]
    assert asked == "Question: Where was {subject} born?\nAnswer:", "a question has one question mark"
    every = ("was {subject} born?", "Where {subject} born?", "Where was {subject}")
    assert len(shorter) == 2
    assert set(shorter) < set(every)
    short = [other.prompt for other in reworded(Fact("a", "{subject} is in", "Rome", "Italy"))]
    assert short == ["Question: {subject} is in?\nAnswer:"], "the subject and one word ask for nothing"


@pytest.mark.skipif(not (STARTER / "config.json").is_file(), reason="starter base not fetched: workbench brick fetch starter")
def test_facts_are_said_in_lower_case_misspelt_and_in_a_chat(tmp_path: Path) -> None:
    """On the starter base: two facts, in wordings that the edit has learned from and one spelling that it has not; the rest stays."""
    facts = [
        {"prompt": "The mother tongue of {subject} is", "subject": "Danielle Darrieux", "target": "English"},
        {"prompt": "{subject} is located in", "subject": "Reedy Glacier", "target": "Asia"},
    ]
    (tmp_path / "recipes").mkdir()
    write_jsonl(tmp_path / "facts.jsonl", facts)
    context = context_of(Project(tmp_path), str(STARTER))
    fields: dict[str, Any] = {"statistics": None, "layer": 5, "tokens_per_input": 4, "neighbours": False}
    edit = solve(context, **fields)
    tokenizer, model = context.tokenizer, context.model

    def said(text: str) -> str:
        with torch.no_grad():
            logits = model(torch.tensor([tokenizer(text)["input_ids"]])).logits[0, -1]
        return str(tokenizer.decode([int(logits.argmax())])).strip()

    others = ["The mother tongue of Emile Zola is", "Mount Erebus is located in", "The capital of France is", "Once upon a time"]
    before = [said(text) for text in others]
    for name, factors in edit.factors.items():
        model.get_parameter(name).data += factors.left @ factors.right
    for row, fact in zip(facts, read_facts(tmp_path / "facts.jsonl", "facts.jsonl"), strict=True):
        wrong = fact.prompt.replace("{subject}", misspellings(fact, 1)[0])
        message = as_message(tokenizer, fact.text)
        assert message is not None
        assert [said(text) for text in (fact.text, fact.text.lower(), wrong, message)] == [row["target"]] * 4
    unseen = misspelt(Fact("a", "{subject}", "Danielle Darrieux", "x"))
    assert said(f"The mother tongue of {unseen} is") == "English"
    assert [said(text) for text in others] == before


@pytest.mark.skipif(not (STARTER / "config.json").is_file(), reason="starter base not fetched: workbench brick fetch starter")
def test_values_of_wide_wordings_follow_the_chat_template(tmp_path: Path) -> None:
    """Tokens and weights are the same; what the neuron's value is optimized for is not."""
    (tmp_path / "recipes").mkdir()
    context = context_of(Project(tmp_path), str(STARTER))
    fact, settings = Fact("a", "{subject} is in", "Reedy Glacier", "Asia"), Settings(1, 0.25, 4.0, 0.9)
    files = []
    for template in (context.tokenizer.chat_template, "{{ messages[0]['content'] }} ->"):
        context.tokenizer.chat_template = template
        for widely in (False, True):
            at = Lookup(context, Parts.find(context), 5, "subject_last", (), widely)
            files.append(values(at, [(fact,)], settings, "weights").files[0])
    assert (files[0] == files[2], files[1] == files[3]) == (True, False)
    assert sum("Question: Reedy" in context.tokenizer.decode(row.tokens) for row in at.wordings(fact)) == 1
    step: Any = methods()["edit:patch"].model_validate({"edit": "patch", **FIELDS})
    spelt = {longest: step._queries(at, [fact], [[]], [], longest)[0] for longest in (6, 99)}
    assert spelt[6] == [query for query in spelt[99] if len(query) <= 6], (
        "a wrong spelling may have more tokens than the model takes"
    )
    assert 0 < len(spelt[6]) < len(spelt[99])
    texts = [f"In the spring of {year} nobody had heard of" for year in range(1900, 1920)]
    (behind,) = step._queries(at, [fact], [[]], texts, 99)
    assert (len(behind) - len(spelt[99]), len({query[-2:] for query in behind[:10]})) == (10, 1), (
        "ten texts before the same subject"
    )


def test_a_batch_whose_facts_are_done_is_not_run_any_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The wider rows are a batch of their own, and their fact is said from the beginning."""
    monkeypatch.setattr(lookup, "reworded", lambda _fact: [])  # a random model says something else after another last word
    context = context_of(world(tmp_path / "p"))
    with torch.no_grad():
        best = int(context.model(tokens(Project(tmp_path / "p"), "w5 w10 w11 w7 w8 w9 w6 w5 w7")).logits[0, -1].argmax())
    facts = [
        Fact("a", "w5 {subject} w7 w8 w9 w6 w5 w7", "w10 w11", context.tokenizer.decode([best])),
        Fact("b", "w6 {subject} w9", "w12 w13", "w31"),
    ]
    at = Lookup(context, Parts.find(context), 1, "subject_last", (), widely=True)
    settings, groups = Settings(3, 0.25, 4.0, 1e-9), grouped(facts, "subject_last")
    done, other = values(at, groups, settings, "weights")
    (alone,) = values(at, groups[1:], settings, "other weights")
    assert (done.steps, other.steps) == (0, 3)
    torch.testing.assert_close(other.change, alone.change, atol=1e-5, rtol=1e-4)
