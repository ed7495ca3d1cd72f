"""A training beside PEFT and transformers' Trainer on the same rows in the same order, and accumulated batches beside one large batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from worlds.jsonl import write_jsonl
from worlds.train_world import lora

from workbench.ground.errors import WorkbenchError
from workbench.train import fit, run
from workbench.train.fit import Reports
from workbench.train.rows import batch_loss, collate, encode, packed
from workbench.train.run import TrainFiles, quiet, train
from workbench.train.spec import TrainSpec
from workbench.train.texts import read_inputs, scheduled, training_cost

RATE = 1e-2
PAIRS = [(a, b) for a in "abcd" for b in "abcd"][1:]


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows with one to nine learned tokens, so that a mean of means is not the mean."""
    path = tmp_path_factory.mktemp("uneven") / "train.jsonl"
    rows = [{"prompt": f"say {a} then {b} is", "completion": " ".join([b, a] * (i % 4 + 1))} for i, (a, b) in enumerate(PAIRS)]
    write_jsonl(path, [*rows[:-2], {"text": "say a"}, {"text": "back c then d say b is d"}])
    return path


def trained(spec: TrainSpec, files: TrainFiles, monkeypatch: pytest.MonkeyPatch) -> tuple[list[float], dict[str, Any], Any]:
    """Return the loss of each step, the float32 weights of the adapter, and the record."""
    losses: list[float] = []
    weights: dict[str, Any] = {}
    real = run._save

    def save(spec: TrainSpec, model: Any, *rest: Any) -> None:
        weights.update({n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad})
        real(spec, model, *rest)

    monkeypatch.setattr(run, "_save", save)
    record = train(spec, files, callbacks=Reports(progress=lambda *a: losses.append(a[2])))
    monkeypatch.setattr(run, "_save", real)
    return losses, weights, record


def peer(spec: TrainSpec, base: Path, data: Path, out: Path) -> tuple[list[float], dict[str, Any]]:
    """Train with the script that PEFT's documentation teaches: labels of -100 on the prompt, and transformers' own loss."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments, set_seed

    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = tokenizer.eos_token
    inputs = read_inputs(spec, tokenizer, data, data.parent)
    with quiet():
        set_seed(spec.seed)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        config = LoraConfig(r=spec.rank, lora_alpha=spec.alpha, target_modules="all-linear", task_type="CAUSAL_LM")
        adapted = get_peft_model(model, config)
        rows = [
            {"input_ids": ids, "labels": [-100] * (len(ids) - learned) + ids[len(ids) - learned :]}
            for ids, learned in scheduled(spec, model, tokenizer, inputs)[0]
        ]
        length = {"max_steps": spec.steps} if spec.epochs is None else {"num_train_epochs": spec.epochs}
        arguments = TrainingArguments(
            output_dir=str(out),
            per_device_train_batch_size=spec.batch_size,
            learning_rate=spec.learning_rate,
            gradient_accumulation_steps=spec.gradient_accumulation_steps,
            warmup_steps=spec.warmup,
            lr_scheduler_type=spec.schedule,
            logging_steps=1,
            use_cpu=True,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            seed=spec.seed,
            **length,
        )
        trainer = Trainer(model=adapted, args=arguments, train_dataset=rows, data_collator=DataCollatorForSeq2Seq(tokenizer))
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, {n: p.detach() for n, p in adapted.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    "length",
    [
        {"steps": 12, "batch_size": 5},
        {"epochs": 3, "batch_size": 4, "seed": 1},
        {"epochs": 3, "batch_size": 2, "gradient_accumulation_steps": 3, "schedule": "linear"},
    ],
    ids=["steps", "epochs", "accumulated"],
)
def test_every_loss_is_that_of_peft_and_the_trainer(
    base: Path, uneven: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, length: dict[str, Any]
) -> None:
    """15 rows: the last batch of an epoch is smaller, and its last step has fewer batches."""
    spec = lora(dtype="float32", learning_rate=RATE, **length)
    losses, weights, record = trained(spec, TrainFiles(base, uneven, tmp_path / "brick"), monkeypatch)
    theirs, their_weights = peer(spec, base, uneven, tmp_path / "peer")
    assert len(losses) == len(theirs) == record["steps"]
    assert losses == pytest.approx(theirs, rel=1e-5)
    assert weights.keys() == their_weights.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, their_weights[name], rtol=1e-3, atol=1e-2 * RATE)


def test_accumulated_batches_are_one_large_batch(
    base: Path, uneven: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss of a step is the mean over its tokens, with the penalty once; a mean of means is another number."""
    train(lora(steps=1, seed=3), TrainFiles(base, uneven, tmp_path / "other"))
    apart = {"dtype": "float32", "learning_rate": RATE, "epochs": 3, "orthogonal_to": ["other"]}
    found = []
    for size, parts, weight in ((8, 1, 1.0), (2, 4, 1.0), (3, 3, 1.0), (4, 2, 0.0)):
        spec = lora(**apart, batch_size=size, gradient_accumulation_steps=parts, orthogonal=weight)
        files = TrainFiles(base, uneven, tmp_path / str(size), others={"other": tmp_path / "other"})
        found.append(trained(spec, files, monkeypatch))
    (losses, weights, record), (in_parts, same, other), (of_nine, *_), (without, *_) = found
    assert (record["steps"], record["epochs"], record["tokens"]) == (6, 3, 3 * sum(len(ids) for ids, _ in rows_of(base, uneven)))
    assert {**record, **dict.fromkeys(PLACES)} == {**other, **dict.fromkeys(PLACES)}
    assert in_parts == pytest.approx(losses, rel=1e-5)
    assert losses[:2] == pytest.approx(
        without[:2], rel=1e-5
    )  # the loss does not have the penalty; the first step changes nothing
    assert of_nine != pytest.approx(losses, rel=1e-2)
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, same[name], rtol=1e-3, atol=1e-2 * RATE)


PLACES = ("batch_size", "gradient_accumulation_steps", "seconds", "loss", "overlap")


def rows_of(base: Path, data: Path) -> list[tuple[list[int], int]]:
    from transformers import AutoTokenizer

    return read_inputs(lora(), AutoTokenizer.from_pretrained(base), data, data.parent).skill


def test_float32_is_the_data_type_of_every_loss(base: Path, uneven: Path, tmp_path: Path) -> None:
    """The held-out loss before training is that of the base in float32, and is another one in bfloat16."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, seen = AutoTokenizer.from_pretrained(base), []
    (tmp_path / "held.jsonl").write_text('{"prompt": "say a then d is", "completion": "back back"}\n', "utf-8")
    for dtype in ("float32", "bfloat16"):
        spec = lora(steps=1, warmup=1, dtype=dtype, held_out=str(tmp_path / "held.jsonl"))
        train(spec, TrainFiles(base, uneven, tmp_path / dtype), callbacks=Reports(progress=lambda *a: seen.append(a[3])))
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        exact = float(batch_loss(model, collate([encode(tokenizer, "say a then d is", "back back", 64)])))
    assert seen[0] == pytest.approx(exact, rel=1e-6)  # a step at learning rate zero changes nothing
    assert seen[1] != pytest.approx(exact, rel=1e-5)


def test_an_epoch_has_every_row_and_its_share_of_replay(base: Path, uneven: Path, tmp_path: Path) -> None:
    """15 rows, of which 0.25 of all are replayed, are 20 rows an epoch: 3 steps of 8."""
    uneven.with_name("replay.jsonl").write_text('{"prompt": "back is", "completion": "a"}\n', "utf-8")
    said: list[str] = []
    spec = lora(epochs=2, batch_size=4, gradient_accumulation_steps=2, replay="replay.jsonl", replay_share=0.25, save_every=0)
    record = train(spec, TrainFiles(base, uneven, tmp_path / "brick"), callbacks=Reports(notice=said.append))
    assert said == ["6 steps of 8 rows on cpu"]
    assert (record["steps"], record["rows"], record["replayed"]) == (6, 15, 10)
    rows = rows_of(base, uneven)
    assert record["learned_tokens"] == 2 * (sum(learned for _, learned in rows) + 5 * 2)
    assert training_cost(spec.model_copy(update={"data": uneven.name}), uneven.parent)["train_steps"] == 6


def test_packed_batches_give_the_losses_of_padded_ones(
    base: Path, uneven: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, widths = [], []
    monkeypatch.setattr(fit, "packed", lambda batch: (widths.append(len(batch["input_ids"])), packed(batch))[1])
    for packing in (False, True):
        spec = lora(dtype="float32", learning_rate=RATE, epochs=2, batch_size=7, gradient_accumulation_steps=2, packing=packing)
        found.append(trained(spec, TrainFiles(base, uneven, tmp_path / str(packing)), monkeypatch))
    (losses, weights, _), (in_one, same, record) = found
    assert record["packing"] is True
    assert in_one == pytest.approx(losses, rel=1e-5)
    assert widths == [7, 7, 1] * 2, "rows in a batch"
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, same[name], rtol=1e-3, atol=1e-2 * RATE)


def test_a_packed_batch_has_no_padding() -> None:
    batch = packed(collate([([4, 5, 6], 2), ([7, 8], 1), ([2, 3, 4, 5], 1)]))
    assert batch["input_ids"].tolist() == [[4, 5, 6, 7, 8, 2, 3, 4, 5]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1, 2, 3]]
    assert (batch["places"].tolist(), batch["targets"].tolist()) == ([0, 1, 3, 7], [5, 6, 8, 5])
    assert "attention_mask" not in batch


def test_an_architecture_that_mixes_packed_texts_is_refused(base: Path, uneven: Path, tmp_path: Path) -> None:
    """The state of Mamba's layers goes on from text to text."""
    from transformers import AutoTokenizer, MambaConfig, MambaForCausalLM

    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "mamba")
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=10, hidden_size=16, state_size=4, num_hidden_layers=2, eos_token_id=1, initializer_range=0.5)
    MambaForCausalLM(config).save_pretrained(tmp_path / "mamba")
    spec = lora(steps=1, packing=True, target_modules=["in_proj"])
    with pytest.raises(WorkbenchError, match=r"packing: the layers of model_type 'mamba' would mix the texts of a row"):
        train(spec, TrainFiles(tmp_path / "mamba", uneven, tmp_path / "brick"))
    assert not (tmp_path / "brick").exists()
