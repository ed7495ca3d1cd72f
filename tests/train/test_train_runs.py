"""Trainings that are watched, interrupted, kept apart from other bricks, or run on a model in memory; `brick train` from flags."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from worlds.local_tasks import lay_out_tasks
from worlds.train_world import lora

from workbench.bricks.card import read_card
from workbench.cli.app import app
from workbench.ground.errors import WorkbenchError
from workbench.models.texts import read_texts
from workbench.train.fit import HeldOut, Reports
from workbench.train.rows import encode
from workbench.train.run import TrainFiles, train
from workbench.train.texts import split, training_texts


@pytest.fixture(scope="module")
def other(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A brick that was trained before."""
    out = tmp_path_factory.mktemp("other") / "other"
    train(lora(steps=10, batch_size=4, seed=3), TrainFiles(base, data, out))
    return out


def weights(out: Path) -> bytes:
    file = out / "adapter_model.safetensors"
    return (file if file.is_file() else out / "model.safetensors").read_bytes()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([[2, 3, 4, 5]])).logits


# Held-out rows


def test_a_share_is_the_same_rows_in_any_order(data: Path) -> None:
    texts = read_texts(data, "train.jsonl")
    texts += [type(text)(text.prompt, "a", text.place) for text in texts[:4]]
    trained, held = split(texts, 0.3)
    assert {t.prompt for t in trained}.isdisjoint({t.prompt for t in held})
    assert 1 <= len({t.prompt for t in held}) <= 10
    assert len(trained) + len(held) == len(texts)
    again = split(texts[::-1], 0.3)
    assert (again[0][::-1], again[1][::-1]) == (trained, held)
    assert set(split(texts[:9], 0.3)[1]) <= set(held)  # other rows do not move a row
    assert len(split(texts[:2], 1e-9)[1]) >= 1
    with pytest.raises(WorkbenchError, match=r"a share of 0\.999 of 16 different prompts leaves none to train on"):
        split(texts, 0.999)


def test_held_out_loss_is_measured_and_never_trained_on(base: Path, data: Path, tmp_path: Path) -> None:
    seen: list[Any] = []
    spec = lora(steps=12, batch_size=4, held_out=0.25, evaluate_every=5)
    record = train(spec, TrainFiles(base, data, tmp_path / "watched"), callbacks=Reports(progress=lambda *a: seen.append(a)))
    held = record["held_out_loss"]
    assert record["rows"] + held["rows"] == 16
    assert record["steps_taken"] == 12
    assert held["best"] <= held["after"] == round(seen[-1][3], 4)
    assert held["best_step"] in (5, 10, 12)
    assert len({loss for *_, loss in seen}) == 4  # before training, after steps 5, 10 and 12
    assert seen[0][3] == seen[3][3] != seen[4][3]
    assert round(seen[0][3], 4) == held["before"]
    # The rows that are left, trained on without a look at the others, give the same bytes.
    texts = training_texts(spec, data, data.parent)
    rest = tmp_path / "rest.jsonl"
    rest.write_text("".join(json.dumps({"prompt": t.prompt, "completion": t.answer}) + "\n" for t in texts.trained), "utf-8")
    blind = train(lora(steps=12, batch_size=4), TrainFiles(base, rest, tmp_path / "blind"))
    assert weights(tmp_path / "blind") == weights(tmp_path / "watched")
    assert blind["data_digest"]["rows"] == record["data_digest"]["rows"]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_patience_keeps_the_best_weights(base: Path, data: Path, tmp_path: Path, method: str) -> None:
    """Held-out rows that contradict the training rows: their loss falls, then rises."""
    held = tmp_path / "held.jsonl"
    held.write_text(
        "".join(json.dumps({"prompt": f"say {w} then a is", "completion": f"{w} {w}"}) + "\n" for w in "abcd"), "utf-8"
    )
    rate = 2e-2 if method == "lora" else 5e-3
    changes = {"method": method, "learning_rate": rate, "batch_size": 8, "schedule": "constant", "warmup": 0, "evaluate_every": 2}
    said: list[str] = []
    rows = tmp_path / "train.jsonl"
    rows.write_text("".join(line for line in data.read_text("utf-8").splitlines(True) if '"a a"' not in line), "utf-8")
    spec = lora(steps=60, held_out=str(held), patience=3, **changes)
    record = train(spec, TrainFiles(base, rows, tmp_path / "stopped"), callbacks=Reports(notice=said.append))
    best, taken = record["held_out_loss"]["best_step"], record["steps_taken"]
    assert 0 < best < taken == best + 6 < 60
    assert record["held_out_loss"]["after"] == record["held_out_loss"]["best"]
    assert said[-1] == f"stopped after step {taken}: the held-out loss has not improved since step {best}"
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(base))
    source = tmp_path / "stopped"
    if method == "lora":
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(str(base), dtype=torch.bfloat16), str(source))
    else:
        model = AutoModelForCausalLM.from_pretrained(str(source))
    pairs = [encode(tokenizer, text.prompt, text.answer, 128) for text in read_texts(held, "held")]
    measured = HeldOut(pairs, 8, 2, None).measure(model, 0)
    assert measured == pytest.approx(record["held_out_loss"]["best"], abs=0.05)


def test_held_out_rows_that_are_trained_on_are_refused(base: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "held.jsonl").write_text(data.read_text("utf-8").splitlines()[2] + "\n", "utf-8")
    with pytest.raises(
        WorkbenchError, match=r"held\.jsonl:1: this held-out row is also a training row \(1 of 1 held-out rows are\)"
    ):
        train(lora(held_out="held.jsonl"), TrainFiles(base, data, tmp_path / "brick", folder=tmp_path))


# Interrupted trainings


class Stop:
    """Interrupts after a step, as Ctrl-C does."""

    def __init__(self, at: int) -> None:
        self.at = at
        self.steps: list[int] = []

    def __call__(self, step: int, *_: Any) -> None:
        self.steps.append(step)
        if step == self.at:
            raise KeyboardInterrupt


@pytest.mark.parametrize("changes", [
    {"dropout": 0.1, "replay": "replay.jsonl"},
    {"method": "full", "learning_rate": 5e-3},
    {"epochs": 4, "batch_size": 3, "gradient_accumulation_steps": 2, "dropout": 0.1},
    {"held_out": 0.25, "evaluate_every": 3, "patience": 2, "schedule": "constant", "learning_rate": 0.1, "seed": 2},
], ids=["lora", "full", "epochs", "watched"])  # fmt: skip
def test_interrupted_training_gives_the_same_bytes(base: Path, data: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    data.with_name("replay.jsonl").write_text('{"prompt": "back is"}\n{"prompt": "d then"}\n', "utf-8")
    spec = lora(**{**({} if "epochs" in changes else {"steps": 12}), "batch_size": 4, "save_every": 4, **changes})
    whole = train(spec, TrainFiles(base, data, tmp_path / "whole"))
    out, said, stop = tmp_path / "brick", [], Stop(at=6)
    with pytest.raises(KeyboardInterrupt):
        train(spec, TrainFiles(base, data, out), callbacks=Reports(progress=stop))
    assert [path.name for path in (out / ".training").glob("checkpoint-*")] == ["checkpoint-4"]
    lost = shutil.copytree(out / ".training" / "checkpoint-4", out / ".training" / "checkpoint-6")  # a save that has lost a file
    sorted(lost.glob("*.safetensors"))[-1].unlink()
    (out / ".training" / "checkpoint-7").mkdir()  # and one that was cut short
    again = Stop(at=-1)
    record = train(spec, TrainFiles(base, data, out), callbacks=Reports(progress=again, notice=said.append))
    assert said[0] == "resuming an interrupted training after step 4"
    assert again.steps[0] == 5
    assert weights(out) == weights(tmp_path / "whole")
    assert not (out / ".training").exists()
    times = {"seconds"}
    assert {k: v for k, v in record.items() if k not in times} == {k: v for k, v in whole.items() if k not in times}


def test_saves_of_other_settings_or_rows_are_discarded(base: Path, data: Path, tmp_path: Path) -> None:
    rows = tmp_path / "train.jsonl"
    shutil.copy(data, rows)
    spec = lora(steps=8, batch_size=4, save_every=3)
    for change in ("seed", "rows", "base", "none"):
        out = tmp_path / change
        shutil.copy(data, rows)
        with pytest.raises(KeyboardInterrupt):
            train(spec, TrainFiles(base, rows, out), callbacks=Reports(progress=Stop(at=5)))
        changed, on = spec, base
        if change == "seed":
            changed = spec.model_copy(update={"seed": 1})
        elif change == "rows":
            rows.write_text(rows.read_text("utf-8").replace("b a", "a a"), "utf-8")
        elif change == "base":
            from transformers import AutoModelForCausalLM

            on = tmp_path / "other-base"
            shutil.copytree(base, on)
            model = AutoModelForCausalLM.from_pretrained(str(base))
            model.model.norm.weight.data[0] += 1
            model.save_pretrained(on)
        said: list[str] = []
        stop = Stop(at=-1)
        train(changed, TrainFiles(on, rows, out), callbacks=Reports(progress=stop, notice=said.append))
        assert stop.steps[0] == (4 if change == "none" else 1), change
        assert ("discarded" in said[0]) == (change != "none"), change
        assert not (out / ".training").exists()


def test_nothing_is_saved_where_it_is_switched_off(base: Path, data: Path, tmp_path: Path) -> None:
    spec = lora(steps=8, batch_size=4, save_every=0)
    with pytest.raises(KeyboardInterrupt):
        train(spec, TrainFiles(base, data, tmp_path / "brick"), callbacks=Reports(progress=Stop(at=5)))
    assert not (tmp_path / "brick").exists()


# Orthogonal to other bricks


def test_orthogonality_lowers_the_overlap(base: Path, data: Path, other: Path, tmp_path: Path) -> None:
    overlaps, losses = {}, {}
    for lam in (0.0, 20.0):
        spec = lora(steps=40, orthogonal_to=["other"], orthogonal=lam)
        record = train(spec, TrainFiles(base, data, tmp_path / str(lam), others={"other": other}))
        overlaps[lam], losses[lam] = record["overlap"]["other"], record["loss"]
        assert record["orthogonal_to"] == ["other"]
    assert overlaps[0.0]["before"] == overlaps[20.0]["before"] > 0.05
    assert overlaps[20.0]["after"] < 0.1 * overlaps[0.0]["after"]
    assert losses[20.0] < 1.0  # without the penalty
    train(lora(steps=40), TrainFiles(base, data, tmp_path / "plain"))
    assert weights(tmp_path / "plain") == weights(tmp_path / "0.0")


def test_penalty_and_overlap_are_those_of_the_paper(base: Path, other: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    from workbench.train.penalties import Orthogonal

    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(str(base)), LoraConfig(r=3, target_modules=["q_proj", "down_proj"])
    )
    found = Orthogonal({"other": other}, model, torch.device("cpu"))
    theirs = load_file(other / "adapter_model.safetensors")
    squares, overlaps = [], []
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            a, b = theirs[name.replace(".default", "")].double(), parameter.detach().double()
            product = a @ b.T
            squares.append(float((product**2).sum()))
            overlaps.append(float(product.norm() / a.norm() / b.norm()))
    assert len(squares) == 4
    assert found.penalty().item() == pytest.approx(sum(squares), rel=1e-4)
    assert found.overlap()["other"] == pytest.approx(sum(overlaps) / 4, rel=1e-4)


def test_bricks_that_cannot_be_kept_apart_are_named(base: Path, data: Path, other: Path, tmp_path: Path) -> None:
    def run(path: Path, **changes: Any) -> None:
        spec = lora(steps=2, orthogonal_to=["x"], **changes)
        train(spec, TrainFiles(base, data, tmp_path / "brick", others={"x": path}))

    with pytest.raises(WorkbenchError, match=r"orthogonal_to: brick 'x': expected a LoRA adapter, found no adapter_config\.json"):
        run(base)
    half = tmp_path / "half"
    train(lora(steps=2, target_modules=["q_proj"]), TrainFiles(base, data, half))
    with pytest.raises(WorkbenchError, match="brick 'x' shares no module with the new adapter"):
        run(half, target_modules=["down_proj"])
    narrow = tmp_path / "narrow"
    shutil.copytree(half, narrow)
    from safetensors.torch import load_file, save_file

    tensors = {
        n: t[:, :16].contiguous() if "lora_A" in n else t for n, t in load_file(half / "adapter_model.safetensors").items()
    }
    save_file(tensors, narrow / "adapter_model.safetensors")
    with pytest.raises(WorkbenchError, match=r"brick 'x': A of .*q_proj is \[4, 16\], expected \[rank, 32\]"):
        run(narrow)


# A model in memory


def test_a_model_in_memory_is_given_back_as_it_was(base: Path, data: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    train(lora(steps=3), TrainFiles(base, data, tmp_path / "disk"))
    model = AutoModelForCausalLM.from_pretrained(str(base), dtype=torch.bfloat16, attn_implementation="eager")
    before, names, cache = logits(model), [n for n, _ in model.named_parameters()], model.config.use_cache
    train(lora(steps=3), TrainFiles(base, data, tmp_path / "memory"), model=model)
    assert weights(tmp_path / "memory") == weights(tmp_path / "disk")
    with pytest.raises(KeyboardInterrupt):
        train(lora(steps=3), TrainFiles(base, data, tmp_path / "cut"), model=model, callbacks=Reports(progress=Stop(at=2)))
    assert torch.equal(logits(model), before)
    assert logits(model).dtype == torch.bfloat16
    assert [n for n, _ in model.named_parameters()] == names
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert (model.training, model.config.use_cache) == (False, cache)
    assert not hasattr(model, "peft_config")


def test_full_trains_the_model_in_memory(base: Path, data: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(base), dtype=torch.bfloat16)
    train(lora(steps=3, method="full", learning_rate=5e-3), TrainFiles(base, data, tmp_path), model=model)
    assert model.dtype == torch.bfloat16
    assert torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(str(tmp_path))))


# brick train


@pytest.fixture
def project(base: Path, data: Path, tmp_path: Path, cwd: Path) -> Path:
    (tmp_path / "recipes").mkdir()
    shutil.copytree(base, tmp_path / "models" / "base")
    shutil.copy(data, tmp_path / "rows.jsonl")
    return tmp_path


def call(*args: str) -> Any:
    return CliRunner().invoke(app, ["brick", "train", *args, "--device", "cpu"])


def test_flags_make_a_brick(project: Path) -> None:
    flags = ["--base", "models/base", "--data", "rows.jsonl", "--steps", "4", "--rank", "2"]
    first = call("one", *flags)
    assert first.exit_code == 0, first.output
    result = call("two", *flags, "--held-out", "0.25", "--orthogonal-to", "one")
    assert result.exit_code == 0, result.output
    assert "held out" in result.output
    settings = yaml.safe_load((project / "bricks" / "two" / "train.yaml").read_text("utf-8"))
    assert settings == {
        "base": "models/base", "data": "../../rows.jsonl", "steps": 4, "rank": 2, "held_out": 0.25, "orthogonal_to": ["one"],
    }  # fmt: skip
    card = read_card(project / "bricks" / "two")
    assert set(card.training["overlap"]) == {"one"}
    assert card.training["held_out_loss"]["rows"] >= 1
    assert card.routing is not None
    assert (card.routing.prompts, card.routing.source, card.routing.layer) == (16, "../../rows.jsonl", 1)
    assert (project / "bricks" / "two" / card.routing.file).is_file()
    config = json.loads((project / "bricks" / "two" / "adapter_config.json").read_text("utf-8"))
    assert config["base_model_name_or_path"] == "models/base"
    assert call("two", *flags, "--held-out", "0.25", "--orthogonal-to", "one").exit_code == 0  # says the same
    lay_out_tasks(project / "evals" / "tasks")
    with (project / "bricks" / "two" / "train.yaml").open("a") as stream:
        stream.write("task: pick\n")
    again = call("bricks/two")
    assert again.exit_code == 0, again.output
    (score,) = read_card(project / "bricks" / "two").scores
    assert (score.task, score.metric, score.n) == ("pick", "acc", 24)
    assert f"two: pick acc {100 * score.value:.1f} [{100 * score.low:.1f}, {100 * score.high:.1f}], n = 24, base " in again.output
    assert "pick acc" not in call("bricks/two", "--no-score").output


def test_bad_flags_write_nothing(project: Path) -> None:
    rows = ["--base", "models/base", "--data", "rows.jsonl"]
    (project / "bricks" / "old").mkdir(parents=True)
    (project / "bricks" / "old" / "train.yaml").write_text("base: models/base\n", "utf-8")

    def error(*args: str) -> str:
        result = call(*args)
        assert isinstance(result.exception, WorkbenchError), result.output
        assert result.exception.exit_code == 2
        return result.exception.message

    assert "bricks/old/train.yaml exists already, with other settings than the flags" in error("old", *rows)
    assert "found --steps without --data" in error("old", "--steps", "3")
    assert "found 2 bricks" in error("a", "b", *rows)
    assert "--data: no such file: absent.jsonl" in error("new", "--data", "absent.jsonl")
    assert "held_out: expected a share between 0 and 1" in error("new", *rows, "--held-out", "2")
    assert "no brick 'absent'" in error("new", *rows, "--orthogonal-to", "absent")
    assert "a brick's name must consist of" in error("New Brick", *rows)
    (project / "silent.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}\n', "utf-8")
    for flags in (("--data", "silent.jsonl"), ("--data", "rows.jsonl", "--held-out", "silent.jsonl")):
        result = call("new", "--base", "models/base", *flags)
        assert "silent.jsonl:1: the conversation has no answer" in str(result.exception)
    assert not (project / "bricks" / "new").exists()
