"""Each configuration is scored with its own tokenizer, whatever is scored before it: item by item what lm-eval gives for its directory."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from worlds.commands import call, document, refused
from worlds.jsonl import write_jsonl
from worlds.local_tasks import CHOICE, GENERATE, LOCALDATA
from worlds.tiny import edit_json

from workbench.scores.store import Scores, ScoreStore, stored_in

ROLLING = """
task: roll
custom_dataset: !function localdata.jsonl
dataset_kwargs: {data_files: {test: data/copy.jsonl}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: text
metric_list: [{metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}]
metadata: {version: 1.0}
"""
TASKS = {"copy": GENERATE, "pick": CHOICE, "roll": ROLLING}
ITEMS = 8
Numbers = Mapping[tuple[str, str], list[Any]]
"""(task, item) -> its log-likelihoods, or its text."""


def configs() -> dict[str, Any]:
    """One small configuration of five architectures, and a llama of half the length."""
    common = {"vocab_size": 300, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "initializer_range": 0.3}
    wide = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, **common}
    return {
        "llama": transformers.LlamaConfig(max_position_embeddings=128, **wide),
        "qwen2": transformers.Qwen2Config(max_position_embeddings=128, num_key_value_heads=4, **wide),
        "gpt2": transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=128, **common),
        "neox": transformers.GPTNeoXConfig(max_position_embeddings=128, **wide),
        "mamba": transformers.MambaConfig(hidden_size=32, num_hidden_layers=2, state_size=8, **common),
        "short": transformers.LlamaConfig(max_position_embeddings=64, **wide),
    }


def save_tokenizer(out: Path) -> None:
    """Bytes with a few merges, "\\n\\n" among them: whether a class lets them apply depends on how it splits a text first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {token: i for i, token in enumerate(["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    merges = [("Ċ", "Ċ"), ("Ġ", "t"), ("t", "h"), ("Ġ", "a"), ("e", "r")]
    for pair in merges:
        vocabulary["".join(pair)] = len(vocabulary)
    inner = Tokenizer(models.BPE(vocabulary, merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", bos_token="<eos>").save_pretrained(out)


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with models of equal tokenizer files, one with a normalizer of its own, and a suite of all kinds of requests."""
    place = tmp_path_factory.mktemp("line")
    tasks, models = place / "evals" / "tasks", place / "models"
    (place / "recipes").mkdir()
    (place / "evals" / "suites").mkdir(parents=True)
    (tasks / "data").mkdir(parents=True)
    for seed, (name, config) in enumerate(configs().items()):
        torch.manual_seed(seed)
        transformers.AutoModelForCausalLM.from_config(config).float().save_pretrained(models / name)
        save_tokenizer(models / name)
    shutil.copytree(models / "llama", models / "lower")
    edit_json(models / "lower" / "tokenizer.json", normalizer={"type": "Lowercase"})
    (tasks / "localdata.py").write_text(LOCALDATA)
    for name, text in TASKS.items():
        (tasks / f"{name}.yaml").write_text(text)
    rows = [
        {
            "id": f"d{i}",
            "prompt": f"Say The Thing {i}\n\nagain {'the other ' * (i % 5)}->",
            "answer": f"w{i}",
            "choices": [f"A{i}\n\n b", "the", " no Other"],
            "gold": i % 3,
            "text": ("The Other\n\nthing is Later there. " * (1 + i)).strip(),
        }
        for i in range(ITEMS)
    ]
    write_jsonl(tasks / "data" / "copy.jsonl", rows)
    (place / "evals" / "suites" / "all.yaml").write_text(f"suite: all\ntasks: [{', '.join(TASKS)}]\ncluster: id\n")
    return place


@pytest.fixture(scope="module")
def expected(line: Path) -> dict[str, Numbers]:
    """Model -> what `lm_eval --model hf` gives for its directory."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    from workbench.evaluate.measured import quiet

    numbers = {}
    for model in sorted((line / "models").iterdir()):
        settings = f"pretrained={model},dtype=float32,logits_cache=False,softmax_dtype=float32"
        manager = TaskManager(include_path=str(line / "evals" / "tasks"), include_defaults=False)
        with quiet():
            found = lm_eval.simple_evaluate(
                "hf", model_args=settings, device="cpu", batch_size=32, tasks=list(TASKS), task_manager=manager,
                bootstrap_iters=0, log_samples=True,
            )  # fmt: skip
        numbers[model.name] = {
            (task, sample["doc"]["id"]): [r[0] if isinstance(r[0], (str, float)) else r[0][0] for r in sample["resps"]]
            for task in TASKS
            for sample in found["samples"][task]
        }
    return numbers


def stored(runs: Path) -> list[Scores]:
    return [scores for folder in sorted((runs / "scores").iterdir()) for scores in stored_in(folder)]


def equal(runs: Path, expected: Mapping[str, Numbers]) -> dict[str, tuple[int, int]]:
    """Model -> (number of equal numbers and texts, number of all) over the stored scores; log-likelihoods agree to 1e-4."""
    counts: dict[str, tuple[int, int]] = {}
    store = ScoreStore(runs / "scores")
    for scores in stored(runs):
        name = scores.configuration.name
        found = {
            (t, row["id"]): row["loglikelihoods"] or [row["response"]] for t, rows in store.rows(scores).items() for row in rows
        }
        assert found.keys() == expected[name].keys()
        pairs = [pair for key, want in expected[name].items() for pair in zip(found[key], want, strict=True)]
        same = sum(a == b if isinstance(b, str) else a == pytest.approx(b, rel=1e-4, abs=1e-4) for a, b in pairs)
        before = counts.get(name, (0, 0))
        counts[name] = (before[0] + same, before[1] + len(pairs))
    return counts


WITH_MAMBA = ["llama", "qwen2", "gpt2", "neox", "mamba", "lower", "short"]


@pytest.mark.parametrize("first", [0, 4, *(pytest.param(n, marks=pytest.mark.nightly) for n in (1, 2, 3, 5, 6))])
def test_scores_are_those_of_lm_eval_in_every_order(
    line: Path, expected: dict[str, Numbers], first: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each architecture is first once and last once, with a state-space model (hflm scores all) and without one (prefix)."""
    monkeypatch.chdir(line)
    order = [*WITH_MAMBA[first:], *WITH_MAMBA[:first]]
    lines = [order, [name for name in reversed(order) if name != "mamba"]]
    for number, names in enumerate(lines):
        runs = tmp_path / str(number)
        result = call("eval", *(f"models/{name}" for name in names), "--suite", "all", "--runs-dir", str(runs))
        counts = equal(runs, expected)
        assert counts == dict.fromkeys(names, (ITEMS * 5, ITEMS * 5)), names
        assert result.output.count("composing") == len(names), "no configuration is scored twice"
        assert ("mamba: its layers pass a state" in result.output) == (number == 0)


def test_one_plan_and_key_hold_one_number(line: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scores of equal weights under tokenizers that differ have keys of their own, and are used again whatever is scored beside them."""
    monkeypatch.chdir(line)
    kept: list[dict[str, Any]] = []
    for names in (["llama", "lower"], ["lower", "llama"], ["lower"]):
        arguments = (*(f"models/{name}" for name in names), "--suite", "all", "--runs-dir", str(tmp_path))
        kept.append({c["name"]: c for c in document("eval", *arguments)["configurations"]})
    assert kept[0] == kept[1]
    assert kept[2]["lower"] == kept[0]["lower"]
    assert kept[0]["llama"]["weights"] == kept[0]["lower"]["weights"]
    assert kept[0]["llama"]["digest"] != kept[0]["lower"]["digest"]
    assert len(stored(tmp_path)) == 2
    label = "llama, lower have different tokenizers, and each is scored with its own"
    for command in ("eval", "compare"):
        assert call(command, "models/llama", "models/lower", *arguments[-4:], code=(0, 3)).stderr.count(label) == 1, command
    call("report", "models/llama", "models/lower", *arguments[-4:])
    assert label in Path("reports/report.md").read_text("utf-8")


def test_a_model_that_fails_is_named_and_the_others_keep_their_scores(
    line: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(line)
    bad, arguments = tmp_path / "bad", ("--suite", "all", "--runs-dir", str(tmp_path))
    shutil.copytree(line / "models" / "qwen2", bad)
    config = transformers.Qwen2Config(**{**configs()["qwen2"].to_dict(), "num_key_value_heads": 32})  # it loads and cannot run
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(bad)
    error = refused("eval", "models/llama", str(bad), "models/neox", *arguments)
    assert error.message.startswith("bad: its model fails while it is scored: RuntimeError: ")
    assert [scores.configuration.name for scores in stored(tmp_path)] == ["llama"]
    assert "llama (1/2)  scores are stored" in call("eval", "models/llama", "models/neox", *arguments).output
