"""Two small local tasks, a byte tokenizer and a tiny model, for the tests of scoring."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from worlds.jsonl import write_jsonl

from workbench.evaluate import build_plan
from workbench.scores.plan import ScorePlan
from workbench.scores.store import Configuration
from workbench.scores.suite import Suite

LOCALDATA = """
import json
from pathlib import Path
import datasets

def jsonl(config_source, data_files, **_):
    base = Path(config_source).parent
    return {s: datasets.Dataset.from_list([json.loads(x) for x in (base / p).read_text("utf-8").splitlines()])
            for s, p in data_files.items()}
"""


def asks_for_texts(task: str, data: str, more: str, docs: str = "localdata.jsonl", prompt: str = "prompt") -> str:
    """Return the file of a task that generates, with further lines.

    Args:
        task: Its name.
        data: The file of its items.
        more: Generation settings and metrics.
        docs: The function that reads the items.
        prompt: The field or the function that gives the prompt.
    """
    return f"""
task: {task}
custom_dataset: !function {docs}
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: generate_until
test_split: test
doc_to_text: {prompt}
doc_to_target: answer
metadata: {{version: 1.0}}
{more}"""


GENERATE = asks_for_texts(
    "copy",
    "data/copy.jsonl",
    """\
generation_kwargs: {until: ["\\n"], max_gen_toks: 4, do_sample: false}
filter_list: [{name: strip, filter: [{function: remove_whitespace}, {function: take_first}]}]
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
)
CHOICE = """
task: pick
custom_dataset: !function localdata.jsonl
dataset_kwargs: {data_files: {test: data/copy.jsonl}}
output_type: multiple_choice
test_split: test
doc_to_text: prompt
doc_to_choice: choices
doc_to_target: gold
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
metadata: {version: 1.0}
"""
A = Configuration("a" * 32, "a")


def documents(n: int = 24) -> list[dict[str, Any]]:
    words = [f"{chr(97 + i)}{chr(97 + (i * 7) % 26)}{i}" for i in range(26)]
    return [
        {
            "id": f"copy-{i:03d}",
            "cluster": f"t{i % 8}",
            "prompt": f"Say {words[i % 26]} {'again ' * (i % 4)}->",
            "answer": words[i % 26],
            "choices": [words[i % 26], words[(i + 1) % 26], "no"],
            "gold": 0,
        }
        for i in range(n)
    ]


def write_data(folder: Path, docs: list[dict[str, Any]]) -> None:
    write_jsonl(folder / "data" / "copy.jsonl", docs)


def lay_out_tasks(folder: Path) -> Path:
    """The tasks `copy` and `pick` in a new folder."""
    (folder / "data").mkdir(parents=True)
    (folder / "localdata.py").write_text(LOCALDATA)
    (folder / "copy.yaml").write_text(GENERATE)
    (folder / "pick.yaml").write_text(CHOICE)
    write_data(folder, documents())
    return folder


def byte_tokenizer() -> Any:
    """One token a byte, and the end of text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<eos>", *alphabet])}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", bos_token="<eos>")


def tiny(seed: int = 0, **settings: Any) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        **settings,
    )
    return LlamaForCausalLM(config).eval()


def suite(**fields: Any) -> Suite:
    return Suite.model_validate({"suite": "toy", "tasks": ["copy", "pick"], "chance": {"pick": 1 / 3}, **fields})


def plan_of(tasks_dir: Path, tokenizer: Any, **fields: Any) -> ScorePlan:
    return build_plan(suite(**fields), tokenizer, tasks_dir=tasks_dir, dtype="float32", batch_size=4)


@pytest.fixture
def place(tmp_path: Path, tokenizer: Any, cwd: Path) -> Path:
    """A project with the suite `toy` (generation and choices, 24 clusters) and a base of 256 positions."""
    tasks = tmp_path / "evals" / "tasks"
    (tasks / "data").mkdir(parents=True)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "evals" / "suites").mkdir()
    (tmp_path / "evals" / "suites" / "toy.yaml").write_text(
        "suite: toy\ndescription: Two small tasks\ntasks: [copy, pick]\ncluster: id\n"
    )
    (tasks / "localdata.py").write_text(LOCALDATA)
    (tasks / "copy.yaml").write_text(GENERATE)
    (tasks / "pick.yaml").write_text(CHOICE)
    write_data(tasks, documents())
    tiny().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path
