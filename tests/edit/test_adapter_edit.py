"""Facts in a LoRA: its losses and steps against PEFT, its start from a closed-form edit, what it keeps, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div

from worlds.dense import context_of, write_facts_file, write_text
from worlds.edit_steps import FIELDS, PROJECTION
from worlds.edit_steps import solve as closed_form
from worlds.jsonl import write_jsonl
from worlds.project import Project
from worlds.tiny import live, tensors_of

from workbench.edit.gradient.learning import (
    END_WEIGHT,
    Reference,
    Wordings,
    continued,
    drawn,
    lessons_of,
    row_losses,
    text_rows,
)
from workbench.edit.gradient.tuning import LowRankUpdate
from workbench.edit.places.parts import Parts, padded, row_of
from workbench.edit.places.passes import packer
from workbench.facts.facts import Fact
from workbench.facts.published import read_facts
from workbench.ground.errors import WorkbenchError
from workbench.models.texts import TextRow
from workbench.recipe.methods import methods
from workbench.steps import Edit, EditMethod, MethodContext

ALONE = {"contexts": 0, "preserve_generated": 0, "replay_weight": 0.0}
"""Fields with which only the facts' own prompts are learned."""
MEMIT = {name: value for name, value in FIELDS.items() if name != "facts"}
ALL_DOWN = [f"model.layers.{i}.mlp.down_proj" for i in range(4)]


def method(**fields: Any) -> EditMethod:
    made = methods()["edit:adapter"].model_validate({"edit": "adapter", "facts": "facts.jsonl", **fields})
    assert isinstance(made, EditMethod)
    return made


def solve(context: MethodContext, **fields: Any) -> Edit:
    return method(**fields).solve(context)


def words(project: Project) -> dict[str, int]:
    found: dict[str, int] = json.loads((project.path / "base" / "tokenizer.json").read_text("utf-8"))["model"]["vocab"]
    return found


def rows_and_labels(project: Project, facts: list[Fact]) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and labels [fact, position] of prompts and targets with their end, without the code that is tested."""
    known = words(project)
    pairs = [([known[w] for w in f.text.split()], [*(known[w] for w in f.target.split()), 1]) for f in facts]
    width = max(len(p) + len(t) for p, t in pairs)
    tokens = torch.tensor([p + t + [0] * (width - len(p) - len(t)) for p, t in pairs])
    labels = torch.tensor([[-100] * len(p) + t + [-100] * (width - len(p) - len(t)) for p, t in pairs])
    return tokens, labels


def wanted_loss(logits: torch.Tensor, labels: torch.Tensor, end_weight: float) -> torch.Tensor:
    """Mean over facts of the target's mean loss and the weighted loss of its end."""
    losses = []
    for row, label in zip(logits.double(), labels, strict=True):
        each = cross_entropy(row[:-1], label[1:], ignore_index=-100, reduction="none")[label[1:] != -100]
        losses.append(each[:-1].mean() + end_weight * each[-1])
    return torch.stack(losses).mean()


@pytest.fixture
def two_words(project: Project) -> Project:
    """The project with six facts whose targets have two words, and a text for statistics."""
    write_facts_file(project.path / "facts.jsonl", 6, 2)
    write_text(project.path / "text.txt")
    return project


def test_steps_are_those_of_peft_and_torch(two_words: Project) -> None:
    """Three steps on all facts and on a KL term: the same factors as PEFT's LoRA trained by torch on a loss written out here."""
    from peft import LoraConfig, get_peft_model

    context = context_of(two_words)
    facts = sorted(read_facts(two_words.path / "facts.jsonl", "facts.jsonl"), key=lambda fact: fact.id)
    keep = [{"prompt": "w3 w4 of w5"}, {"prompt": "w9 is"}]
    write_jsonl(two_words.path / "keep.jsonl", keep)
    fields = {**ALONE, "preserve": "keep.jsonl", "preserve_weight": 0.5, "stop": 0.0, "learning_rate": 0.01}
    edit = solve(context, modules="output", rank=4, epochs=3, **fields)

    model = live(two_words.path / "base")
    known = words(two_words)
    base = live(two_words.path / "base")
    kept = []
    for row in keep:
        tokens = torch.tensor([[known[w] for w in row["prompt"].split()]])
        start = tokens.shape[1] - 1
        for _ in range(4):
            if tokens[0, -1] == 1 and tokens.shape[1] > start + 1:
                break
            tokens = torch.cat([tokens, base(tokens).logits[:, -1:].argmax(-1)], 1)
        kept.append((tokens, start))
    config = LoraConfig(r=4, lora_alpha=4, target_modules=["down_proj"], lora_dropout=0.0)
    wrapped = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(context.seed)
    for name, module in wrapped.named_modules():
        if name.endswith("down_proj"):
            module.lora_A.default.weight.data = torch.randn(4, 48, generator=generator) / 48**0.5
            module.lora_B.default.weight.data.zero_()
    learned = [p for n, p in wrapped.named_parameters() if "lora_" in n]
    tokens, labels = rows_and_labels(two_words, facts)
    adam = torch.optim.Adam(learned, lr=0.01)
    for _ in range(3):
        adam.zero_grad()
        loss = wanted_loss(wrapped(input_ids=tokens).logits, labels, END_WEIGHT)
        divergences = []
        for row, start in kept:
            with torch.no_grad():
                aim = base(row).logits[0, start:-1].double().log_softmax(-1)
            now = wrapped(input_ids=row).logits[0, start:-1].double().log_softmax(-1)
            divergences.append(kl_div(now, aim, reduction="none", log_target=True).sum(-1))
        (loss + 0.5 * torch.cat(divergences).mean()).backward()
        adam.step()
    for name in ALL_DOWN:
        layer = wrapped.get_submodule(f"base_model.model.{name}")
        expected = layer.lora_B.default.weight @ layer.lora_A.default.weight
        factors = edit.factors[f"{name}.weight"]
        assert factors.left.shape == (32, 4)
        # Adam divides by the size of the gradient: where that is rounding noise, so is the step.
        off = (factors.left @ factors.right - expected.detach()).abs()
        assert expected.abs().max() > 0.01
        assert off.mean() < 1e-5
        assert (off > 1e-3).float().mean() < 0.005


def test_losses_are_those_written_out(two_words: Project) -> None:
    context = context_of(two_words)
    parts = Parts.find(context)
    facts = read_facts(two_words.path / "facts.jsonl", "facts.jsonl")
    lessons = lessons_of(facts, context.tokenizer, Wordings([], False, False), 64)
    tokens, labels = rows_and_labels(two_words, facts)
    with torch.no_grad():
        logits = context.model(tokens).logits
        for weight in (0.0, 0.7):
            batch = padded([lesson.plain for lesson in lessons], context.device)
            losses, targets = row_losses(parts, batch, weight, ends=True)
            assert float(losses.mean()) == pytest.approx(float(wanted_loss(logits, labels, weight)), rel=1e-5)
        assert float(targets.mean()) == pytest.approx(float(wanted_loss(logits, labels, 0.0)), rel=1e-5)
    rows = text_rows([TextRow([5, 6, 7, 8, 9], 4), TextRow([10, 11, 12], 2)])
    update = LowRankUpdate(parts.out(1), 3, None, torch.Generator().manual_seed(1))
    try:
        update.left.data.normal_(generator=torch.Generator().manual_seed(2))
        with torch.no_grad():
            reference = Reference(parts, [update], packer(parts, rows))
            found, again = (float(reference.divergence(rows)) for _ in range(2))
            moved = [
                context.model(torch.tensor([row])).logits[0].double().log_softmax(-1) for row in ([5, 6, 7, 8, 9], [10, 11, 12])
            ]
    finally:
        update.remove()
    with torch.no_grad():
        plain = [context.model(torch.tensor([row])).logits[0].double().log_softmax(-1) for row in ([5, 6, 7, 8, 9], [10, 11, 12])]
    each = [kl_div(m[:-1], p[:-1], reduction="none", log_target=True).sum(-1) for m, p in zip(moved, plain, strict=True)]
    assert found == pytest.approx(float(torch.cat(each).mean()), rel=1e-5)
    assert again == pytest.approx(found, rel=1e-6), "rows that are known are not run again without the update"
    assert found > 0.01


def test_without_steps_the_start_is_the_closed_form_edit(two_words: Project) -> None:
    context = context_of(two_words)
    (wanted,) = closed_form(context, unconverged="skip").factors.values()
    whole = wanted.left.double() @ wanted.right.double()
    same = solve(context, start="memit", start_fields=MEMIT, epochs=0)
    factors = same.factors[PROJECTION]
    assert (factors.left.double() @ factors.right.double() - whole).norm() < 1e-6 * whole.norm()
    assert same.record["start"] == {
        "edit": "memit",
        "layers": [1],
        "updates": {PROJECTION: {"rank": wanted.rank, "of": wanted.rank, "kept": pytest.approx(1.0)}},
    }
    others = [f.left @ f.right for name, f in same.factors.items() if name != PROJECTION]
    assert len(others) == 4 * 3 - 1
    assert not any(bool(update.any()) for update in others)

    fewer = solve(context, start="memit", start_fields=MEMIT, epochs=0, rank=1)
    factors = fewer.factors[PROJECTION]
    assert wanted.rank > 1
    singular = torch.linalg.svdvals(whole)
    error = (factors.left.double() @ factors.right.double() - whole).norm()
    assert float(error) == pytest.approx(float(singular[1:].norm()), rel=1e-4)
    assert float(error) > 0.05 * float(whole.norm())
    kept = fewer.record["start"]["updates"][PROJECTION]
    assert (kept["rank"], kept["of"]) == (1, wanted.rank)
    assert kept["kept"] == pytest.approx(float(singular[:1].square().sum() / singular.square().sum()), rel=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_start_is_trained_on(family: str, project: Project, dense_of: Callable[[str], Path]) -> None:
    """The start of weights stored as [in, out] is that of the closed form too, and training goes on from it."""
    write_facts_file(project.path / "facts.jsonl", 4)
    write_text(project.path / "text.txt")
    context = context_of(project, dense_of(family))
    ((name, wanted),) = closed_form(context, unconverged="skip").factors.items()
    begun, trained = (
        solve(context, modules="output", start="memit", start_fields=MEMIT, epochs=epochs, **ALONE, stop=0.0) for epochs in (0, 2)
    )
    product = begun.factors[name].left @ begun.factors[name].right
    torch.testing.assert_close(product, wanted.left @ wanted.right, atol=1e-5, rtol=1e-4)
    after = trained.factors[name].left @ trained.factors[name].right
    assert 0 < float((after - product).norm()) < 0.5 * float(product.norm())


TEACH = "{edit: adapter, facts: facts.jsonl, epochs: 60, learning_rate: 0.01, preserve_generated: 8, batch_size: 6, stop: 0.4, preserve_weight: 1, replay_weight: 0.3"


def test_facts_are_said_and_end_and_peft_agrees(two_words: Project) -> None:
    from peft import PeftModel

    document = two_words.run(f"steps: [{TEACH}}}]\noutput: {{dtype: float32}}\n")
    written = live(Path(document["model"]))
    facts = read_facts(two_words.path / "facts.jsonl", "facts.jsonl")
    known = words(two_words)
    for fact in facts:
        prompt = [known[w] for w in fact.text.split()]
        answer = written.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False, pad_token_id=0)[0, len(prompt) :]
        assert answer.tolist() == [*(known[w] for w in fact.target.split()), 1]
    place = Path(document["run"]) / "edits" / "edit-adapter"
    tokens = torch.randint(2, 60, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wrapped = PeftModel.from_pretrained(live(two_words.path / "base"), place)(tokens).logits
        torch.testing.assert_close(wrapped, written(tokens).logits, atol=5e-5, rtol=0)
    record = document["steps"][0]
    assert record["epochs"] < 60, "training stops when all is learned"
    assert max(record["losses"].values()) < 0.4
    assert set(record["loss"]) == {"facts", "neighbours", "replay"}
    assert len(read_facts(place / "facts.jsonl", "facts.jsonl")) == 6


def test_the_same_seed_gives_the_same_bytes(two_words: Project) -> None:
    context = context_of(two_words)
    fields = {"epochs": 2, "learning_rate": 0.01, "preserve_generated": 8, "batch_size": 4}
    first, second, other = (solve(replace(context, seed=seed), **fields).factors for seed in (1, 1, 2))
    assert all(torch.equal(first[n].left, second[n].left) and torch.equal(first[n].right, second[n].right) for n in first)
    assert all(not torch.equal(first[n].left, other[n].left) for n in first)


def test_an_edit_is_written_as_an_adapter(two_words: Project) -> None:
    short = TEACH.replace("60", "2")
    document = two_words.run(f"steps: [{short}, min_efficacy: 0}}]\noutput: {{form: adapter, rank: exact}}\n")
    tensors = tensors_of(Path(document["run"]) / "adapter")
    own = tensors_of(Path(document["run"]) / "edits" / "edit-adapter")
    for name in ALL_DOWN:
        a, b = f"base_model.model.{name}.lora_A.weight", f"base_model.model.{name}.lora_B.weight"
        torch.testing.assert_close(tensors[b] @ tensors[a], own[b] @ own[a], atol=1e-6, rtol=1e-5)
        assert (own[b] @ own[a]).abs().max() > 1e-4


def test_divergences_keep_prompts_and_text(two_words: Project) -> None:
    """The same facts with and without the terms: distributions after preserved prompts move less."""
    context = context_of(two_words)
    prompts = [f"w{i} of w{i + 20} w{i + 21}" for i in range(8)]
    write_jsonl(two_words.path / "keep.jsonl", [{"prompt": prompt} for prompt in prompts])
    tokens = torch.tensor([context.tokenizer(prompt)["input_ids"] for prompt in prompts])
    with torch.no_grad():
        before = context.model(tokens).logits[:, -1].log_softmax(-1)
    moved = {}
    for weight in (0.0, 3.0):
        fields = {**ALONE, "preserve": "keep.jsonl", "preserve_weight": weight}
        edit = solve(context, epochs=40, learning_rate=0.01, stop=0.05, **fields)
        assert max(edit.record["losses"].values()) < 0.4
        own = {name: context.model.get_parameter(name).data for name in edit.factors}
        for name, factors in edit.factors.items():
            context.model.get_parameter(name).data = own[name] + factors.left @ factors.right
        with torch.no_grad():
            moved[weight] = float(
                kl_div(context.model(tokens).logits[:, -1].log_softmax(-1), before, reduction="batchmean", log_target=True)
            )
        for name, data in own.items():
            context.model.get_parameter(name).data = data
    assert moved[3.0] < 0.2 * moved[0.0]


def test_wordings_of_a_fact(project: Project) -> None:
    context = context_of(project)
    fact = Fact("f", "w1 of {subject}", "w2 w3", "w4", paraphrases=("w5 of w2 w3",))
    known = words(project)

    def rows(**wordings: Any) -> list[list[int]]:
        (lesson,) = lessons_of(
            [fact], context.tokenizer, Wordings(**{"beginnings": [], "paraphrases": False, "chat": False, **wordings}), 12
        )
        assert lesson.ends
        return [list(row.tokens[: row.start + 1]) + list(row.target) for row in (lesson.plain, *lesson.others)]

    def tokens(text: str) -> list[int]:
        return [known.get(word, 0) for word in text.split()]

    plain = [*tokens("w1 of w2 w3 w4"), 1]
    assert rows() == [plain]
    assert rows(paraphrases=True) == [plain, [*tokens("w5 of w2 w3 w4"), 1]]
    assert rows(beginnings=["w7 w8"]) == [plain, [*tokens("w7 w8 . w1 of w2 w3 w4"), 1]]
    assert rows(chat=True) == [plain, plain], "the template of this tokenizer adds spaces only"
    assert rows(beginnings=["w7 " * 20]) == [plain], "what the model cannot read is left out"
    plain_tokenizer = type(context.tokenizer).from_pretrained(project.path / "base")
    plain_tokenizer.chat_template = None
    with pytest.raises(WorkbenchError, match="the base's tokenizer has no chat template"):
        solve(replace(context, tokenizer=plain_tokenizer), chat=True) if write_facts_file(
            project.path / "facts.jsonl", 2
        ) else None


def test_the_base_continues_prompts_greedily(project: Project) -> None:
    context = context_of(project)
    prompts = [Fact(str(i), f"w{i} of w{i + 7}" + " w9" * i, None, ".") for i in range(5)]
    rows = [row_of(prompt, context.tokenizer, "prompt_last").prompt for prompt in prompts]
    for row, found in zip(rows, continued(Parts.find(context), rows, 4, 1), strict=True):
        wanted = context.model.generate(torch.tensor([row.tokens]), max_new_tokens=4, do_sample=False, pad_token_id=0)
        assert [*found.tokens[: found.start + 1], *found.target] == wanted[0].tolist()


def test_rows_are_drawn_once_before_they_return() -> None:
    rows = text_rows([TextRow([i, i + 1], 1) for i in range(5)])
    first = list(islice(drawn(rows, torch.Generator().manual_seed(0)), 10))
    for part in (first[:5], first[5:]):
        assert sorted(row.tokens for row in part) == sorted(row.tokens for row in rows)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"rank": 40}, r"rank is 40, but model\.layers\.0\.mlp\.gate_proj is a matrix of 48 x 32"),
        ({"layers": [9]}, "layer 9 does not exist"),
        ({"first": 9}, "first"),
        ({"preserve": "no.jsonl"}, r"no\.jsonl"),
        ({"replay": "no.jsonl"}, r"no\.jsonl"),
    ],
)
def test_bad_steps_are_refused_before_training(
    fields: dict[str, Any], expected: str, two_words: Project, monkeypatch: Any
) -> None:
    monkeypatch.setattr("workbench.edit.adapter.train", lambda *_: pytest.fail("trained"))
    step = method(**fields)
    with pytest.raises(WorkbenchError, match=expected):
        step.check_inputs(two_words.path)
        step.solve(context_of(two_words))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"start_fields": {"layers": [1]}}, "`start_fields` needs `start`"),
        ({"epochs": 0}, "nothing is learned"),
        ({"start": "memit", "start_fields": {"layer": [1]}}, r"start_fields\.layer: edit memit has no such field"),
        ({"start": "memit", "start_fields": {"mode": "joint"}}, "cannot set 'mode'"),
        ({"layers": [1, 1]}, "distinct layers"),
        ({"start": "finetune"}, "start"),
    ],
)
def test_fields_that_do_not_fit_are_refused(fields: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        method(**fields)


def test_fused_feed_forward_parts_are_refused(project: Project, dense_of: Callable[[str], Path]) -> None:
    write_facts_file(project.path / "facts.jsonl", 2)
    context = context_of(project, dense_of("phi3"))
    layers = {f"model.layers.{i}.mlp.{part}.weight" for i in range(3) for part in ("gate_up_proj", "down_proj")}
    assert set(solve(context, epochs=1, **ALONE).factors) == layers, "its own checkpoint stores them as they are"


def test_files_of_the_start_are_inputs(two_words: Project) -> None:
    step = method(start="memit", start_fields=MEMIT, preserve="keep.jsonl")
    assert step.inputs() == ["facts.jsonl", "keep.jsonl", "text.txt"]
    with pytest.raises(WorkbenchError, match="keep"):
        step.check_inputs(two_words.path)
    cost = step.cost(context_of(two_words).layout, two_words.path, two_words.path)
    assert cost["facts"] == 6
    assert cost["steps"] == 60
    assert cost["tokens"] > method(**ALONE).cost(context_of(two_words).layout, two_words.path, two_words.path)["tokens"]
