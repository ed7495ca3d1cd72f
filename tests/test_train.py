"""The trainer, on a two-layer model built here."""

# ruff: noqa: SIM905 - word lists read better as text

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from workbench import yamldoc
from workbench.errors import WorkbenchError
from workbench.train import IGNORED, TrainSpec, collate, encode, read_rows, train

torch = pytest.importorskip("torch")

WORDS = "a b c d say back is then".split()


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices this small lose time on more threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers, 32 wide, with a word tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    out = tmp_path_factory.mktemp("base")
    vocabulary = {word: index for index, word in enumerate(["<unk>", "<eos>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", unk_token="<unk>").save_pretrained(out)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True, eos_token_id=1, pad_token_id=1,
        initializer_range=0.3,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    rows = [{"prompt": f"say {one} then {two} is", "completion": f"{two} {one}"} for one in "abcd" for two in "abcd"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def lora(**changes: Any) -> TrainSpec:
    return TrainSpec(**{"rank": 4, "alpha": 8, "learning_rate": 2e-2, "steps": 30, "warmup": 2, **changes})


def tokenizer_of(base: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(base))


def test_labels_are_the_completion_alone(base: Path) -> None:
    tokenizer = tokenizer_of(base)
    rows = [encode(tokenizer, "say a then b is", "b a", 16), encode(tokenizer, "say c", "c", 16)]
    ids = tokenizer.convert_tokens_to_ids
    assert rows[0] == ([*ids("say a then b is b a".split()), 1], 3)
    assert encode(tokenizer, "say a then b is", "b a", 16, learn_end=False) == (rows[0][0][:-1], 2)
    batch = collate(rows, pad=1)
    assert batch["input_ids"].tolist() == [rows[0][0], [1, 1, 1, 1, *ids(["say", "c", "c"]), 1]]
    assert batch["attention_mask"].tolist() == [[1] * 8, [0, 0, 0, 0, 1, 1, 1, 1]]
    assert batch["logits_to_keep"].tolist() == [4, 5, 6, 7]
    assert batch["labels"].tolist() == [
        [IGNORED, *ids(["b", "a"]), 1],
        [IGNORED, IGNORED, *ids(["c"]), 1],
    ]


def test_loss_equals_the_plain_one(base: Path) -> None:
    """Left padding and fewer logits change nothing: the loss is that of whole, unpadded rows."""
    from transformers import AutoModelForCausalLM

    tokenizer = tokenizer_of(base)
    model = AutoModelForCausalLM.from_pretrained(str(base), dtype=torch.float32).eval()
    rows = [encode(tokenizer, "say a then b is", "b a", 16), encode(tokenizer, "say c", "c", 16)]
    with torch.no_grad():
        loss = model(**collate(rows, pad=1)).loss
        parts = []
        for tokens, learned in rows:
            logits = model(torch.tensor([tokens])).logits[0, -learned - 1 : -1]
            parts.append(torch.nn.functional.cross_entropy(logits, torch.tensor(tokens[-learned:]), reduction="none"))
    torch.testing.assert_close(loss, torch.cat(parts).mean(), rtol=1e-5, atol=1e-6)


def test_lora_learns_and_is_saved_in_bfloat16(base: Path, data: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    seen: list[tuple[int, int, float]] = []
    record = train(lora(), base=base, data=data, out=tmp_path / "brick", progress=lambda *a: seen.append(a))
    assert [step for step, _, _ in seen] == list(range(1, 31))
    assert record["loss"] < 0.5 * seen[0][2]
    assert sorted(path.name for path in (tmp_path / "brick").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    tensors = load_file(tmp_path / "brick" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert len(tensors) == 2 * 7 * 2  # A and B, seven linear layers, two blocks
    config = json.loads((tmp_path / "brick" / "adapter_config.json").read_text("utf-8"))
    assert config["base_model_name_or_path"] == "bricks/starter/base"
    model = AutoModelForCausalLM.from_pretrained(str(base), dtype=torch.float32)
    before = model(torch.tensor([[2, 3]])).logits
    model = PeftModel.from_pretrained(model, str(tmp_path / "brick"))
    assert not torch.equal(before, model(torch.tensor([[2, 3]])).logits)


def test_record_holds_no_path(base: Path, data: Path, tmp_path: Path) -> None:
    record = train(lora(steps=2), base=base, data=data, out=tmp_path)
    text = json.dumps(record)
    assert str(tmp_path) not in text
    assert str(base) not in text
    assert record["rows"] == 16
    assert record["tokens"] > record["learned_tokens"] > 0
    assert set(record["versions"]) == {"torch", "transformers", "peft"}


@pytest.mark.parametrize("method", ["lora", "full"])
def test_same_seed_same_bytes(base: Path, data: Path, tmp_path: Path, method: str) -> None:
    runs = [("one", 0), ("two", 0), ("three", 1)]
    for name, seed in runs:
        train(lora(steps=5, batch_size=4, seed=seed, dropout=0.1, method=method), base=base, data=data, out=tmp_path / name)
    file = "adapter_model.safetensors" if method == "lora" else "model.safetensors"
    one, two, three = ((tmp_path / name / file).read_bytes() for name, _ in runs)
    assert one == two
    assert one != three


def test_replay_is_sampled_from_the_base(base: Path, data: Path, tmp_path: Path) -> None:
    prompts = data.with_name("replay.jsonl")
    prompts.write_text('{"prompt": "back is"}\n{"prompt": "d then"}\n', "utf-8")
    spec = lora(steps=6, batch_size=4, replay="replay.jsonl", replay_share=0.25, replay_tokens=3)
    records = [train(spec, base=base, data=data, out=tmp_path / name) for name in ("one", "two")]
    assert records[0]["replayed"] == 6
    assert records[0]["learned_tokens"] == 18 * 3 + 6 * 3
    one, two = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two


def test_full_writes_a_checkpoint_with_its_tokenizer(base: Path, data: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    record = train(lora(method="full", learning_rate=5e-3), base=base, data=data, out=tmp_path)
    model = AutoModelForCausalLM.from_pretrained(str(tmp_path))
    assert model.dtype == torch.bfloat16
    assert AutoTokenizer.from_pretrained(str(tmp_path)).eos_token == "<eos>"
    assert record["method"] == "full"


def test_process_state_is_put_back(base: Path, data: Path, tmp_path: Path) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    train(lora(steps=1), base=base, data=data, out=tmp_path)
    assert torch.equal(torch.rand(3), expected)
    assert not torch.are_deterministic_algorithms_enabled()


def test_errors_name_place_and_repair(base: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(WorkbenchError, match="no such file of training rows"):
        read_rows(tmp_path / "absent.jsonl", "prompt")
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n', "utf-8")
    with pytest.raises(WorkbenchError, match=r"broken\.jsonl:2"):
        read_rows(broken, "prompt", "completion")
    broken.write_text("\n", "utf-8")
    with pytest.raises(WorkbenchError, match="holds no training rows"):
        read_rows(broken, "prompt", "completion")
    with pytest.raises(WorkbenchError, match="more than max_length 8"):
        encode(tokenizer_of(base), "say a then b is say a then b is", "b a", 8)
    (tmp_path / "train.yaml").write_text("stepz: 3\n", "utf-8")
    with pytest.raises(WorkbenchError, match=r"train\.yaml:1:1 stepz: unknown field"):
        yamldoc.load(tmp_path / "train.yaml").validate(TrainSpec)
