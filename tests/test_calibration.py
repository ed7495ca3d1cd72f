"""Data-driven merges: calibration texts, Grams collected layer by layer, Fisher information, losses; through recipes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from project import CPU, Project
from tiny import WORDS, save_adapter, save_finetuned
from torch import Tensor, nn

from workbench.compose import Composition, compose, compute, live_model
from workbench.errors import WorkbenchError
from workbench.layout import Model
from workbench.merge.calibration import batches, encode, read_texts
from workbench.registry import MergeContext, MergeMethod

FAMILIES = ["llama", "llama_untied", "qwen2", "gemma2", "gpt2", "gpt_neox", "gpt_neo", "opt"]


def sentence(seed: int, length: int) -> str:
    generator = torch.Generator().manual_seed(seed)
    return " ".join(WORDS[i] for i in torch.randint(2, len(WORDS), (length,), generator=generator).tolist())


def write_rows(path: Path, count: int, seed: int = 0) -> Path:
    """Prompts and completions of different lengths, some longer than a sliding window of 8."""
    rows = [
        {"prompt": sentence(seed + i, 3 + 5 * i % 17), "completion": sentence(seed + 100 + i, 1 + i % 3)} for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


@pytest.fixture
def family_project(tmp_path: Path, model_of: Callable[..., Path]) -> Callable[[str], Project]:
    """A project on a family's tiny model, with two fine-tunes and two files of texts."""

    def make(family: str) -> Project:
        base = model_of(family, torch.float32)
        (tmp_path / "recipes").mkdir()
        (tmp_path / "base").symlink_to(base)
        for i, name in enumerate(("one", "two")):
            save_finetuned(base, tmp_path / "bricks" / name, seed=i)
            write_rows(tmp_path / f"{name}.jsonl", 7, seed=1000 * i)
        return Project(tmp_path)

    return make


REGMEAN = """
    bricks: {one: bricks/one, two: bricks/two}
    steps: [{merge: regmean, bricks: {one: {calibration: one.jsonl}, two: {calibration: two.jsonl}}}]
"""


def words_tokenizer(path: Path) -> Any:
    return transformers.PreTrainedTokenizerFast.from_pretrained(path)


def context_of(project: Project, text: str, monkeypatch: pytest.MonkeyPatch) -> tuple[MergeContext, Any]:
    """The context that a recipe's first step gets."""
    resolved = project.resolve(text)
    step = resolved.recipe.steps[0]
    seen: list[MergeContext] = []
    measure = type(step).measure
    # AutoTokenizer takes the class of the model's family, which does not read the tests' whole-word vocabulary.
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda path, **_: words_tokenizer(path))
    monkeypatch.setattr(type(step), "measure", lambda self, context: (seen.append(context), measure(self, context))[1])
    compose(resolved, CPU)
    monkeypatch.undo()
    return seen[0], step


def full_grams(context: MergeContext, step: Any, brick: str) -> dict[str, Tensor]:
    """Second moments of every linear layer's inputs, by hooks on the whole live model, one unpadded row at a time."""
    model, (rows, _) = context.live(brick), step.rows(context, brick)
    sums: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def see(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].reshape(-1, args[0].shape[-1]).double()
            sums[name] = sums.get(name, 0) + x.T @ x

        return see

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            module.register_forward_pre_hook(hook(name))
    with torch.no_grad():
        for row in rows:
            model(input_ids=torch.tensor([row.tokens]))
    tokens = sum(len(row.tokens) for row in rows)
    return {f"{name}.weight": total / tokens for name, total in sums.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_grams_are_those_of_the_whole_model(
    family: str, family_project: Callable[[str], Project], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padding, sliding windows, tuples as outputs, Conv1D, an untied head: the same inputs as a plain forward pass reads."""
    context, step = context_of(family_project(family), REGMEAN, monkeypatch)
    found = step.measure(context).value["one"]
    renamed = {"lm_head.weight": "embed_out.weight"} if family == "gpt_neox" else {}
    expected = {renamed.get(name, name): gram for name, gram in full_grams(context, step, "one").items()}
    assert found.record["streamed"]
    tied = context.base.config.get("tie_word_embeddings", True)
    heads = {n for n in expected if n.split(".")[-2] in ("lm_head", "embed_out")}
    assert set(found.files) == {n for n in expected if n not in heads or not tied}
    for name in found.files:
        gram, right = found.gram(name, CPU).double(), expected[name]
        assert float((gram - right).norm() / right.norm()) < 1e-5, name
