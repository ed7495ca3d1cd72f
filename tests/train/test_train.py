"""The trainer, on a two-layer model built here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from worlds.jsonl import write_jsonl
from worlds.train_world import lora

from workbench.ground import yamldoc
from workbench.ground.errors import WorkbenchError
from workbench.train.fit import Reports, _arguments
from workbench.train.rows import batch_loss, collate, encode, read_replay, replay
from workbench.train.run import TrainFiles, reproducible, train
from workbench.train.spec import KEYED_IF_SET, HubData, TrainSpec
from workbench.train.texts import training_texts

torch = pytest.importorskip("torch")


def tokenizer_of(base: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(base))


def test_labels_are_the_completion_alone(base: Path) -> None:
    tokenizer = tokenizer_of(base)
    rows = [encode(tokenizer, "say a then b is", "b a", 16), encode(tokenizer, "say c", "c", 16)]
    ids = tokenizer.convert_tokens_to_ids
    assert rows[0] == ([*ids(["say", "a", "then", "b", "is", "b", "a"]), 1], 3)
    assert encode(tokenizer, "say a then b is", "b a", 16, learn_end=False) == (rows[0][0][:-1], 2)
    batch = collate(rows)
    assert batch["input_ids"].tolist() == [rows[0][0], [*ids(["say", "c", "c"]), 1, 0, 0, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1] * 8, [1, 1, 1, 1, 0, 0, 0, 0]]
    assert batch["places"].tolist() == [4, 5, 6, 8 + 1, 8 + 2]
    assert batch["targets"].tolist() == [*ids(["b", "a"]), 1, *ids(["c"]), 1]


def test_loss_equals_the_plain_one(base: Path) -> None:
    """Padding and fewer logits change nothing: the loss is that of whole, unpadded rows."""
    from transformers import AutoModelForCausalLM

    tokenizer = tokenizer_of(base)
    model = AutoModelForCausalLM.from_pretrained(str(base), dtype=torch.float32).eval()
    rows = [encode(tokenizer, "say a then b is", "b a", 16), encode(tokenizer, "say c", "c", 16)]
    with torch.no_grad():
        loss = batch_loss(model, collate(rows))
        parts = []
        for tokens, learned in rows:
            logits = model(torch.tensor([tokens])).logits[0, -learned - 1 : -1]
            parts.append(torch.nn.functional.cross_entropy(logits, torch.tensor(tokens[-learned:]), reduction="none"))
    torch.testing.assert_close(loss, torch.cat(parts).mean(), rtol=1e-5, atol=1e-6)


def test_lora_learns_and_is_saved_in_bfloat16(base: Path, data: Path, tmp_path: Path) -> None:
    """The record names no path of this machine, and the process has its random numbers and settings back."""
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    seen: list[tuple[int, int, float, float | None]] = []
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    torch.use_deterministic_algorithms(True, warn_only=True)  # as within a run on a CUDA device
    with reproducible(0):
        pass
    assert torch.is_deterministic_algorithms_warn_only_enabled(), "operators without an implementation warn, as before"
    torch.use_deterministic_algorithms(False)
    record = train(lora(), TrainFiles(base, data, tmp_path / "brick"), callbacks=Reports(progress=lambda *a: seen.append(a)))
    assert torch.equal(torch.rand(3), expected)
    assert not torch.are_deterministic_algorithms_enabled()
    text = json.dumps(record)
    assert str(tmp_path) not in text
    assert str(base) not in text
    assert record["rows"] == 16
    assert record["tokens"] > record["learned_tokens"] > 0
    assert set(record["versions"]) == {"torch", "transformers", "peft"}
    assert [step for step, _, _, _ in seen] == list(range(1, 31))
    assert {held_out for *_, held_out in seen} == {None}
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


def test_a_training_on_cuda_uses_the_named_device_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By default the Trainer takes the first device, and splits batches that are larger by the others' number over all."""
    current: list[torch.device] = []
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.set_device", current.append)
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    arguments = _arguments(lora(batch_size=4), tmp_path, "cuda:1", False)
    assert (arguments.n_gpu, arguments.train_batch_size, arguments.device) == (1, 4, torch.device("cuda:1"))
    assert current[-1] == torch.device("cuda:1")


@pytest.mark.parametrize("method", ["lora", "full"])
def test_same_seed_same_bytes(base: Path, data: Path, tmp_path: Path, method: str) -> None:
    runs = [("one", 0), ("two", 0), ("three", 1)]
    for name, seed in runs:
        train(lora(steps=5, batch_size=4, seed=seed, dropout=0.1, method=method), TrainFiles(base, data, tmp_path / name))
    file = "adapter_model.safetensors" if method == "lora" else "model.safetensors"
    one, two, three = ((tmp_path / name / file).read_bytes() for name, _ in runs)
    assert one == two
    assert one != three


def test_replay_is_sampled_from_the_base(base: Path, data: Path, tmp_path: Path) -> None:
    prompts = data.with_name("replay.jsonl")
    prompts.write_text('{"prompt": "back is"}\n{"prompt": "d then"}\n', "utf-8")
    spec = lora(steps=6, batch_size=4, replay="replay.jsonl", replay_share=0.25, replay_tokens=3)
    records = [train(spec, TrainFiles(base, data, tmp_path / name)) for name in ("one", "two")]
    assert records[0]["replayed"] == 6
    assert records[0]["learned_tokens"] == 18 * 3 + 6 * 3
    one, two = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two


def test_rehearsal_takes_the_completions_that_stand_there(base: Path, tmp_path: Path) -> None:
    """Rows with a completion are learned to their end; the others are sampled, each in its place."""
    from transformers import AutoModelForCausalLM

    file = tmp_path / "rehearsal.jsonl"
    file.write_text('{"prompt": "back is", "completion": "a"}\n{"prompt": "d then"}\n', "utf-8")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), tokenizer_of(base)
    rows = replay(lora(replay_tokens=3), model, tokenizer, read_replay(file), 4)
    assert rows[0] == rows[2] == encode(tokenizer, "back is", "a", 16)
    assert [learned for _, learned in rows] == [2, 3, 2, 3]
    assert rows[1][0][:2] == rows[3][0][:2] == tokenizer("d then").input_ids


def test_full_writes_a_checkpoint_with_its_tokenizer(base: Path, data: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    record = train(lora(method="full", learning_rate=5e-3), TrainFiles(base, data, tmp_path))
    model = AutoModelForCausalLM.from_pretrained(str(tmp_path))
    assert model.dtype == torch.bfloat16
    assert AutoTokenizer.from_pretrained(str(tmp_path)).eos_token == "<eos>"
    assert record["method"] == "full"


def test_errors_name_place_and_repair(base: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(WorkbenchError, match="no such file of training rows"):
        training_texts(lora(), tmp_path / "absent.jsonl", tmp_path)
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n', "utf-8")
    with pytest.raises(WorkbenchError, match=r"broken\.jsonl:2"):
        training_texts(lora(), broken, tmp_path)
    broken.write_text("\n", "utf-8")
    with pytest.raises(WorkbenchError, match=r"broken\.jsonl: no texts"):
        training_texts(lora(), broken, tmp_path)
    broken.write_text('{"prompt": "a"}\n{"text": "a"}\n', "utf-8")
    with pytest.raises(WorkbenchError, match=r"broken\.jsonl:2: expected an object with `prompt`"):
        read_replay(broken)
    with pytest.raises(WorkbenchError, match="more than max_length 8"):
        encode(tokenizer_of(base), "say a then b is say a then b is", "b a", 8)
    (tmp_path / "train.yaml").write_text("stepz: 3\n", "utf-8")
    with pytest.raises(WorkbenchError, match=r"train\.yaml:1:1 stepz: unknown field"):
        yamldoc.load(tmp_path / "train.yaml").validate(TrainSpec)


def test_numbers_of_the_settings_as_people_write_them(tmp_path: Path) -> None:
    (tmp_path / "train.yaml").write_text("learning_rate: 5e-4\nheld_out: 1e-1\nseed: 1_000\n", "utf-8")
    spec = yamldoc.load(tmp_path / "train.yaml").validate(TrainSpec)
    assert (spec.learning_rate, spec.held_out, spec.seed) == (5e-4, 0.1, 1000)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("held_out: 1.5", r"train\.yaml:1:1 held_out: expected a share between 0 and 1, or the name of a jsonl file; found 1\.5"),
        ("patience: 3", "patience: requires held_out"),
        ("epochs: 3\nsteps: 150", "epochs: expected either epochs or steps, found both; remove one of them"),
        ("epochs: 0.5", "epochs: expected"),
        ("dtype: float16", "dtype: expected 'bfloat16' or 'float32', found 'float16'"),
        ("method: full\northogonal_to: [add]", "orthogonal_to: expected method lora, found full"),
        ("data: {hub: a/b, colum: c}", r"train\.yaml:1:\d+ data\.colum: unknown field\. Known: completion"),
        ("evaluate_every: 0", "evaluate_every: expected"),
        ("learning_rate: yes", r"train\.yaml:1:1 learning_rate: expected a valid number, found True"),
        ("steps: 010", r"train\.yaml:1:8 YAML reads 010 as 8 \(octal\)"),
        ("learning_rate: .inf", r"learning_rate: expected a finite number, found inf"),
    ],
)
def test_bad_settings_are_named(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "train.yaml").write_text(text + "\n", "utf-8")
    with pytest.raises(WorkbenchError, match=message) as raised:
        yamldoc.load(tmp_path / "train.yaml").validate(TrainSpec)
    assert raised.value.exit_code == 2


def test_settings_that_are_off_are_not_recorded() -> None:
    assert set(lora().record()) == set(TrainSpec.model_fields) - {
        "held_out", "evaluate_every", "patience", "save_every", "orthogonal_to", "orthogonal", *KEYED_IF_SET,
    }  # fmt: skip
    on = lora(held_out=0.5, orthogonal_to=["add"]).record()
    assert (on["held_out"], on["evaluate_every"], on["patience"], on["orthogonal_to"], on["orthogonal"]) == (
        0.5,
        10,
        None,
        ["add"],
        0.02,
    )


def test_whole_texts_are_learned_but_for_the_first_token(base: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    tokenizer = tokenizer_of(base)
    ids = tokenizer.convert_tokens_to_ids
    text, short = encode(tokenizer, "", "say a then b", 16), encode(tokenizer, "say c", "c", 16)
    assert text == ([*ids(["say", "a", "then", "b"]), 1], 4)
    batch = collate([text, short])
    assert batch["targets"].tolist() == [*text[0][1:], *short[0][-2:]]
    assert batch["places"].tolist() == [0, 1, 2, 3, 5 + 1, 5 + 2]
    model = AutoModelForCausalLM.from_pretrained(str(base), dtype=torch.float32).eval()
    with torch.no_grad():
        tokens = torch.tensor([text[0]])
        torch.testing.assert_close(batch_loss(model, collate([text])), model(tokens, labels=tokens).loss, rtol=1e-5, atol=1e-6)
    with pytest.raises(WorkbenchError, match="one token, expected 2 or more"):
        encode(tokenizer, "", "a", 16, learn_end=False)
    (tmp_path / "texts.jsonl").write_text('{"text": "say a then b"}\n{"prompt": "back", "response": "a"}\n', "utf-8")
    record = train(lora(steps=2, batch_size=2), TrainFiles(base, tmp_path / "texts.jsonl", tmp_path / "brick"))
    assert record["learned_tokens"] == 2 * (4 + 2)


def hub_data(folder: Path) -> Path:
    """A folder that `datasets` reads as one split."""
    (folder / "set").mkdir(parents=True)
    rows = [{"question": f"say {word} is", "reply": word, "number": 1} for word in "abcd"]
    write_jsonl(folder / "set" / "train.jsonl", rows)
    return folder


@pytest.fixture
def datasets_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.mark.usefixtures("datasets_cache")
def test_a_data_set_gives_the_bytes_of_its_rows(base: Path, tmp_path: Path) -> None:
    folder = hub_data(tmp_path)
    columns = {"prompt": "question", "completion": "reply"}
    spec = lora(steps=3, batch_size=2, data={"hub": "set", **columns})
    record = train(spec, TrainFiles(base, folder, tmp_path / "one"))
    assert (record["data"]["hub"], record["rows"]) == ("set", 4)
    assert set(record["data_digest"]) == {"rows"}
    plain = [{"prompt": f"say {word} is", "completion": word} for word in "abcd"]
    write_jsonl(tmp_path / "plain.jsonl", plain)
    same = train(lora(steps=3, batch_size=2), TrainFiles(base, tmp_path / "plain.jsonl", tmp_path / "two"))
    assert same["data_digest"]["rows"] == record["data_digest"]["rows"]
    one, two = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two
    file = HubData(hub="set/train.jsonl", split="train[:3]", completion="question")
    texts = training_texts(lora(data=file), folder, folder)
    assert [(text.prompt, text.answer) for text in texts.trained] == [("", f"say {word} is") for word in "abc"]


@pytest.mark.usefixtures("datasets_cache")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"completion": "repli"}, r"set has no column 'repli', it has question, reply, number"),
        ({"split": "test"}, r"set, split 'test': Unknown split \"test\"\. Should be one of \['train'\]"),
        ({"config": "other"}, r"set, config 'other': .*not found\. Available: \['default'\]"),
        (
            {"hub": "nobody/nothing"},
            r"expected a data set on the hub or a folder of data files in .*, found none at 'nobody/nothing'",
        ),
        ({"completion": "number"}, r"set train row 0: expected a text in 'number', found int"),
    ],
)
def test_data_sets_that_do_not_fit_are_named(changes: dict[str, str], message: str, tmp_path: Path) -> None:
    folder = hub_data(tmp_path)
    source = HubData(**{"hub": "set", "prompt": "question", "completion": "reply", **changes})
    with pytest.raises(WorkbenchError, match=message) as raised:
        training_texts(lora(data=source), folder, folder)
    assert raised.value.exit_code == 2
