"""Tests of weights: those of tokens in Grams, those of bricks by their loss, those of right texts in a search, and the elements that masks of tasks choose."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from worlds.jsonl import write_jsonl
from worlds.local_tasks import CHOICE, GENERATE, A, documents, plan_of, tiny, write_data
from worlds.merging import BASE, ONE, TWO, merge
from worlds.project import CPU, Project
from worlds.texts import sentence
from worlds.tiny import WORDS, tensors_of

from workbench.evaluate.models import GOLD, Resident
from workbench.evaluate.scorer import Scorer
from workbench.ground.errors import WorkbenchError
from workbench.grow.mixtures.gates import RIDGE, TEMPERATURE
from workbench.merge.measuring.layers import inputs_read, shared, without_padding
from workbench.models.live import live_model
from workbench.models.texts import TextRow, batches
from workbench.scores.store import ScoreStore

BRICKS = "bricks: {one: bricks/one, two: bricks/two}\n"


# -- routers


def texts_of_unequal_length(project: Project) -> dict[str, list[list[int]]]:
    """Texts of disjoint words: 40 long ones, 10 short ones, 15 of all lengths. Expert -> rows of tokens."""
    draw, found = random.Random(1), {}
    for i, (name, count, lengths) in enumerate((("anchor", 40, (20, 30)), ("one", 10, (3, 4)), ("two", 15, (2, 30)))):
        rows = [draw.choices(WORDS[2 + 6 * i : 10 + 6 * i], k=draw.randint(*lengths)) for _ in range(count)]
        (project.path / f"{name}.jsonl").write_text("".join(json.dumps({"text": " ".join(row)}) + "\n" for row in rows), "utf-8")
        found[name] = [[WORDS.index(word) for word in row] for row in rows]
    return found


@torch.no_grad()
def read_by_layers(path: Path, rows: list[list[int]]) -> list[Tensor]:
    """What each layer's feed-forward part reads on rows, one row at a time: [tokens, hidden] in float64."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    seen: list[list[Tensor]] = [[] for _ in model.model.layers]
    for layer, kept in zip(model.model.layers, seen, strict=True):
        layer.mlp.register_forward_pre_hook(lambda _module, given, kept=kept: kept.append(given[0][0].double()))
    for row in rows:
        model(torch.tensor([row]))
    return [torch.cat(kept) for kept in seen]


def test_experts_count_alike_in_the_routers_gram(project: Project) -> None:
    """W = Y' X (Σ over experts of their mean x x' + λ I)⁻¹ / T, x read from dense models, row by row; an expert with twenty
    times the tokens counts no more, and a fifth of its texts is held out."""
    texts = texts_of_unequal_length(project)
    bricks = "{one: {calibration: one.jsonl}, two: {calibration: two.jsonl}}"
    gate = "gate: ridge, calibration: anchor.jsonl"
    document = project.run(f"{BRICKS}steps: [{{grow: experts, bricks: {bricks}, {gate}}}]\noutput: {{dtype: float32}}\n")
    only = "{{merge: task_arithmetic, bricks: {{{}: 1}}, where: {{include: ['*.mlp.*']}}}}"
    dense = {"anchor": project.run("steps: []\noutput: {dtype: float32}\n", "anchor.yaml")["model"]}
    for name in ("one", "two"):
        dense[name] = project.run(f"{BRICKS}steps: [{only.format(name)}]\noutput: {{dtype: float32}}\n", f"{name}.yaml")["model"]
    solved_on = {name: [row for i, row in enumerate(rows) if i % 5] for name, rows in texts.items()}
    counts = {name: sum(map(len, rows)) for name, rows in solved_on.items()}
    assert document["steps"][0]["gate"]["tokens"] == counts
    assert counts["anchor"] > 20 * counts["one"]
    read = {name: read_by_layers(Path(dense[name]), solved_on[name]) for name in dense}
    made = tensors_of(Path(document["model"]))
    for layer in range(4):
        x = [read[name][layer] for name in ("anchor", "one", "two")]
        gram = sum(of.T @ of / len(of) for of in x)
        gram += RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
        expected = torch.stack([of.mean(0) for of in x]) @ torch.linalg.inv(gram) / TEMPERATURE
        found = made[f"model.layers.{layer}.block_sparse_moe.gate.weight"].double()
        assert float((found - expected).norm() / expected.norm()) < 1e-4


def test_a_mean_is_over_tokens_not_over_padding() -> None:
    """Of rows from one token to nine in one batch."""
    torch.manual_seed(0)
    linear, embed = torch.nn.Linear(5, 3), torch.nn.Embedding(20, 5)
    rows = [TextRow(list(range(1, 2 + n)), 0) for n in (0, 3, 8)]
    parts = []
    with inputs_read({"w": linear}) as read, torch.no_grad():
        for batch in batches(rows, CPU):
            linear(embed(batch.tokens))
            assert shared(read, batch) == {"w": ["w"]}
            parts.append(without_padding(read["w"], batch))
    x = torch.cat([embed(torch.tensor(row.tokens)) for row in rows]).detach()
    torch.testing.assert_close(torch.cat(parts), x)
    assert len(x) == 1 + 4 + 9


# -- right texts


def alone(model: Any, tokenizer: Any, prompt: str, answer: str) -> float:
    """Mean log-likelihood of a token of an answer behind its prompt, tokenized as one text."""
    start, ids = len(tokenizer(prompt)["input_ids"]), tokenizer(prompt + answer)["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, start - 1 : -1].double().log_softmax(-1)
    return float(logits.gather(1, torch.tensor(ids[start:])[:, None]).mean())


def gold_rows(tasks_dir: Path, tokenizer: Any, model: Any, tmp_path: Path, task: str) -> list[dict[str, Any]]:
    store = ScoreStore(tmp_path / "scores")
    scores = Resident(model, store).scored(plan_of(tasks_dir, tokenizer), A, gold=True)
    return list(store.rows(scores)[task])


def test_gold_of_a_text_is_the_mean_over_its_tokens(tasks_dir: Path, tokenizer: Any, tmp_path: Path) -> None:
    """Behind the task's delimiter, unless the text brings a space."""
    docs = documents(12)
    for i, doc in enumerate(docs):
        doc["answer"] = ["a", " b", "a much longer answer", doc["answer"]][i % 4]
    write_data(tasks_dir, docs)
    (tasks_dir / "copy.yaml").write_text(
        GENERATE.replace("doc_to_target: answer", "doc_to_target: answer\ntarget_delimiter: ' = '")
    )
    model = tiny(seed=3, initializer_range=0.3)
    rows = gold_rows(tasks_dir, tokenizer, model, tmp_path, "copy")
    expected = [
        alone(model, tokenizer, doc["prompt"], doc["answer"] if doc["answer"].startswith(" ") else " = " + doc["answer"])
        for doc in docs
    ]
    assert [row["metrics"][GOLD] for row in rows] == pytest.approx(expected, abs=1e-4)
    assert max(expected) - min(expected) > 0.5


def test_gold_of_choices_is_the_share_of_the_right_one(tasks_dir: Path, tokenizer: Any, tmp_path: Path) -> None:
    model = tiny(seed=3, initializer_range=0.3)
    rows = gold_rows(tasks_dir, tokenizer, model, tmp_path, "pick")
    for row, doc in zip(rows, documents(), strict=True):
        values = torch.tensor([alone(model, tokenizer, doc["prompt"], f" {c}") * len(f" {c}") for c in doc["choices"]])
        assert row["metrics"][GOLD] == pytest.approx(float(values.log_softmax(0)[0]), abs=1e-3)


@pytest.mark.parametrize("gold", ["text", "index"])
def test_a_right_choice_given_as_text_is_its_index(tasks_dir: Path, tokenizer: Any, gold: str) -> None:
    """The stored item, the lead of the right choice, and accuracy do not depend on how the data names it."""
    docs = documents(8)
    for i, doc in enumerate(docs):
        doc["gold"] = doc["choices"][i % 3] if gold == "text" else i % 3
    write_data(tasks_dir, docs)
    (tasks_dir / "pick.yaml").write_text(CHOICE)
    found = Scorer(plan_of(tasks_dir, tokenizer), A, tiny(seed=3, initializer_range=0.3)).task("pick")
    assert [item["gold"] for item in found["items"]] == [i % 3 for i in range(8)]
    for i, row in enumerate(found["rows"]):
        values = row["loglikelihoods"]
        lead = values[i % 3] - max(v for j, v in enumerate(values) if j != i % 3)
        assert row["metrics"]["margin"] == pytest.approx(lead, abs=1e-5)
        assert row["metrics"]["acc"] == float(lead > 0)


def test_by_hand() -> None:
    """Two bricks, threshold 1: an element of the sum belongs to the larger one, or to both where they are equal."""
    tuned = {"one": {"w": BASE + ONE}, "two": {"w": BASE + TWO}}
    one = merge("tall_mask", {"w": BASE}, tuned, brick="one", threshold=1)["w"] - BASE
    expected = torch.tensor([[0.4, 0.0, 0.0], [0.0, -0.4, 0.0]])
    torch.testing.assert_close(one, expected, atol=1e-6, rtol=0)
    both = merge("consensus", {"w": BASE}, tuned, threshold=0.5)["w"] - BASE
    # |τ₁| and |τ₂| within a factor of two: the third column, and the first of the second row.
    torch.testing.assert_close(both, torch.tensor([[0.0, 0.0, 0.8], [0.5, 0.0, -0.2]]), atol=1e-6, rtol=0)
    stitched = merge("localize_and_stitch", {"w": BASE}, tuned, density=0.5)["w"] - BASE
    # One claims .6 -.5 .4, two claims -.4 .5 -.6; they meet in the last element.
    torch.testing.assert_close(stitched, torch.tensor([[0.6, -0.4, 0.5], [0.0, -0.5, -0.1]]), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ("{merge: tall_mask, brick: three}", "expected one of the step's bricks .one, two., found 'three'"),
        ("{merge: tall_mask, threshold: -1}", "expected a threshold of 0 or more"),
        ("{merge: consensus, least: 3}", "3 bricks must use an element, but the step merges 2"),
        ("{merge: localize_and_stitch, density: {first: 0.1, last: 0.2}}", "one threshold per brick"),
    ],
)
def test_refused(project: Project, step: str, message: str) -> None:
    with pytest.raises(WorkbenchError, match=message):
        project.resolve(f"bricks: {{one: bricks/one, two: bricks/two}}\nsteps: [{step}]\n")


# -- Cocktail


def test_cocktail_weighs_by_loss(project: Project) -> None:
    rows = [{"prompt": sentence(i, 4), "answer": sentence(50 + i, 1 + i)} for i in range(4)] + [{"text": sentence(9, 6)}]
    write_jsonl(project.path / "few.jsonl", rows)
    text = """
        base: base
        bricks: {one: bricks/one, two: bricks/two, full: bricks/full}
        steps: [{merge: cocktail, examples: few.jsonl, temperature: 0.5, include_base: true}]
        output: {dtype: float32}
    """
    result = project.run(text)
    record = result["steps"][0]["cocktail"]
    models = {
        "base": "steps: []",
        **{n: f"bricks: {{{n}: bricks/{n}}}\nsteps: [{{merge: average}}]" for n in ("one", "two", "full")},
    }
    tensors = {name: project.tensors(one) for name, one in models.items()}
    losses = {}
    for name in models:
        model = live_model(project.resolve("steps: []").base.config, dict(tensors[name]), project.path / "base", CPU)
        tokenizer = transformers.AutoTokenizer.from_pretrained(project.path / "base")
        found = []
        for row in rows:
            start = len(tokenizer(row["prompt"])["input_ids"]) if "prompt" in row else 1
            ids = tokenizer(f"{row['prompt']} {row['answer']}" if "prompt" in row else row["text"])["input_ids"]
            with torch.no_grad():
                found.append(float(model(torch.tensor([ids]), labels=torch.tensor([[-100] * start + ids[start:]])).loss))
        losses[name] = sum(found) / len(found)
    total = sum(math.exp(-value / 0.5) for value in losses.values())
    weights = {name: math.exp(-value / 0.5) / total for name, value in losses.items()}
    for name, value in weights.items():
        assert record[name]["loss"] == pytest.approx(losses[name], rel=1e-5)
        assert record[name]["weight"] == pytest.approx(value, rel=1e-4)
    assert max(weights.values()) - min(weights.values()) > 0.05
    merged = tensors_of(Path(result["model"]))
    for name in merged:
        right = sum(weights[m] * tensors[m][name] for m in models)
        assert torch.allclose(merged[name], right, atol=1e-5)
