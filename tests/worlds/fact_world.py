"""A project with three facts, an edit for them, and own computations of everything that fact tasks report."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from worlds.jsonl import read_jsonl, write_jsonl
from worlds.project import CPU, Project

from workbench.evaluate.lineup import lineup
from workbench.evaluate.plans import plans, suites_of
from workbench.recipe.recipe import load_recipe
from workbench.run.materialize import materialize
from workbench.scores.plan import ScorePlan

FACTS = [
    {"id": "one", "prompt": "w1 w2 {subject} is", "subject": "w3", "target": "w4 w5", "target_true": "w6", "paraphrases": ["w7 {subject} of", "w8 w9 of"],
     "neighbours": ["w10 w2 is", {"prompt": "w11 w2 is", "target": "w12"}], "portability": [{"prompt": "w13 of", "target": "w14"}],
     "same_subject": ["w34 {subject} w35"], "translations": ["w36 {subject}", {"prompt": "w37 {subject}", "target": "w38"}]},
    {"id": "two", "prompt": "w20 {subject} is", "subject": "w21", "target": "w22", "target_true": "w23 w24 w25", "paraphrases": ["w26 w27 is"],
     "neighbours": [{"prompt": "w28 w29", "target": "w30"}, "w10 w2 is"]},
    {"id": "three", "prompt": "w31 w32 of", "target": "w33"},
]  # fmt: skip
# Strong enough for some answers to be right and some neighbours to change.
EDIT = "steps: [{edit: finetune, facts: facts.jsonl, form: lora, epochs: 60, layers: [1, 2], rank: 16, learning_rate: 0.01}]\n"
TEXT = "w1 w2 w3 is w4 w5\nw20 w21 is w22 of w9 w8 w7\n"
F32 = "output: {dtype: float32}\n"


def lay_out(project: Project) -> Project:
    """A project with three facts, a text, a recipe that edits the base for the facts and one that merges two bricks."""
    write_jsonl(project.path / "facts.jsonl", FACTS)
    (project.path / "text.txt").write_text(TEXT)
    project.write(EDIT + F32 + "eval: [{facts: facts.jsonl, text: text.txt}]\n", "edit.yaml")
    project.write("bricks: {one: bricks/one, two: bricks/two}\nsteps: [{merge: average}]\n" + F32, "mean.yaml")
    return project


def plan_of(
    project: Project, name: str = "edit.yaml", named: tuple[str, ...] = (), device: Any = CPU, **changes: Any
) -> ScorePlan:
    recipe = load_recipe(project.path / "recipes" / name)
    suites = suites_of([recipe], named, project.path)
    (plan,) = plans(lineup([recipe]), suites, batch_size=4, limit=None, device=device)
    return plan


def docs(plan: ScorePlan, kind: str) -> list[dict[str, Any]]:
    assert plan.suite.facts
    file = plan.tasks_dir / "data" / f"{plan.suite.facts.tasks[kind]}.jsonl"  # type: ignore[index]
    return read_jsonl(file)


def live(project: Project, name: str) -> Any:
    return materialize({e.name: e for e in lineup([load_recipe(project.path / "recipes" / "edit.yaml")])}[name].resolved, CPU)


class Reference:
    """Own computations on a live model and its tokenizer: no batches, no padding, no lm-eval."""

    def __init__(self, model: Any, folder: Path) -> None:
        from transformers import AutoTokenizer

        self.model, self.tokenizer = model, AutoTokenizer.from_pretrained(folder)

    def ids(self, text: str) -> list[int]:
        found: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return found

    @torch.no_grad()
    def logits(self, ids: list[int]) -> torch.Tensor:
        found: torch.Tensor = self.model(torch.tensor([ids])).logits[0].float()
        return found

    def answer(self, prompt: str, answer: str) -> tuple[float, bool, int]:
        """Log-likelihood of an answer in nats, whether every token is the most likely one, and the number of its tokens."""
        before, after = self.ids(prompt), self.ids(answer)
        rows = self.logits(before + after)[len(before) - 1 : -1]
        value = rows.log_softmax(-1)[range(len(after)), after].sum().item()
        return value, rows.argmax(-1).tolist() == after, len(after)

    def written(self, prompt: str, tokens: int, end: bool = True) -> str:
        """Greedy text; without end of text where `end` is False."""
        ids = self.ids(prompt)
        start = len(ids)
        while len(ids) < start + tokens:
            row = self.logits(ids)[-1]
            if not end:
                row[self.tokenizer.eos_token_id] = -math.inf
            if int(row.argmax()) == self.tokenizer.eos_token_id:
                break
            ids.append(int(row.argmax()))
        return str(self.tokenizer.decode(ids[start:], skip_special_tokens=True))

    def answered(self, prompt: str) -> list[str]:
        """The first eight words that it writes, up to one that text cannot say again."""
        words: list[str] = []
        while (
            len(words) < 8
            and (word := self.tokenizer.decode([int(self.logits(self.ids(" ".join([prompt, *words])))[-1].argmax())])) != "<unk>"
        ):
            words.append(word)
        return words

    def first(self, prompt: str, count: int) -> list[str]:
        """The first greedy words, whatever they are, up to end of text."""
        ids = self.ids(prompt)
        start = len(ids)
        while len(ids) < start + count:
            ids.append(int(self.logits(ids)[-1].argmax()))
        words = [str(self.tokenizer.decode([i])) for i in ids[start:]]
        return words[: words.index(self.tokenizer.eos_token)] if self.tokenizer.eos_token in words else words

    def text(self, text: str) -> float:
        """Log-likelihood of a text after end of text."""
        ids = [self.tokenizer.eos_token_id, *self.ids(text)]
        return self.logits(ids)[:-1].log_softmax(-1)[range(len(ids) - 1), ids[1:]].sum().item()


def expected(kind: str, doc: dict[str, Any], model: Reference) -> dict[str, Any]:
    """Metrics of one document."""
    if kind.startswith("preferred"):
        nll = [-value / count for value, _, count in (model.answer(doc["prompt"], c) for c in doc["choices"])]
        return {
            "token_mean_preferred": float(nll[0] < nll[1]),
            "token_mean_magnitude": math.exp(-nll[0]) - math.exp(-nll[1]),
            "token_mean_margin": nll[1] - nll[0],
        }
    if kind.startswith("generated") or kind == "chat":
        words, wanted = model.written(doc["prompt"], 16).split(), doc["answer"].split()
        begins = float(words[: len(wanted)] == wanted)
        if kind == "chat":
            return {"says": float(f" {' '.join(wanted)} " in f" {' '.join(words)} "), "starts_with": begins}
        return {"exact_match": float(words == wanted), "starts_with": begins}
    if kind == "entropy":
        words = model.written(doc["prompt"], 32, end=False).split()
        return {"ngram_entropy": (2 / 3 * bits(words, 2) + 4 / 3 * bits(words, 3)) / 2}
    if kind == "text":
        value = model.text(doc["text"])
        return {"bits_per_byte": [value, len(doc["text"].encode())], "word_perplexity": [value, len(doc["text"].split())]}
    return {"acc": float(model.answer(doc["prompt"], doc["answer"])[1])}


def bits(words: list[str], n: int) -> float:
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    shares = [grams.count(gram) / len(grams) for gram in set(grams)]
    return -sum(p * math.log2(p) for p in shares)
