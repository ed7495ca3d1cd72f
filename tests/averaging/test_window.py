"""Training runs as bricks: which checkpoints are averaged, with which weights, and what the average is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from worlds.project import Project
from worlds.tiny import save_adapter, save_finetuned
from worlds.trainers import state

from workbench.averaging.checkpoints import checkpoints_of, gaps
from workbench.averaging.window import weights_of
from workbench.ground.errors import WorkbenchError
from workbench.steps.fields import BrickRef, Window

STEPS = (100, 200, 300, 400)


@pytest.fixture(scope="module")
def out(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What transformers' Trainer leaves of two runs: full/checkpoint-N and lora/checkpoint-N, with pickles of the optimizer."""
    top = tmp_path_factory.mktemp("out")
    for i, step in enumerate(STEPS):
        state(save_finetuned(llama, top / f"full/checkpoint-{step}", seed=10 + i), step)
        state(save_adapter(llama, top / f"lora/checkpoint-{step}", seed=20 + i, r=2 + i % 2, lora_alpha=4), step)
    return top


@pytest.fixture
def run(project: Project, out: Path) -> Project:
    """A project with both runs."""
    shutil.copytree(out, project.path / "out")
    return project


@pytest.mark.parametrize(
    ("decay", "expected"),
    [
        ("linear", [0.25, 0.25, 0.25, 0.25]),
        ("1-sqrt", [0.5, 0.5**0.5 - 0.5, 0.75**0.5 - 0.5**0.5, 1 - 0.75**0.5]),
        ("sqrt", [1 - 0.75**0.5, 0.75**0.5 - 0.5**0.5, 0.5**0.5 - 0.5, 0.5]),
        ("cosine", [0.5 - 0.5**0.5 / 2, 0.5**0.5 / 2, 0.5**0.5 / 2, 0.5 - 0.5**0.5 / 2]),
    ],
)
def test_weights_are_the_differences_of_the_decay(decay: str, expected: list[float]) -> None:
    """The figures of linear and 1-sqrt are those of Megatron-LM's tools/checkpoint/weighted_merge.py (linear, minus-sqrt) for four checkpoints."""
    assert weights_of(4, Window.model_validate({"decay": decay})) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("window", [{"decay": "cosine"}, {"decay": "1-sqrt"}, {"decay": "sqrt"}, {"decay": "linear"}])
def test_the_average_is_where_a_run_with_that_decay_ends(window: dict[str, str]) -> None:
    """Updates of 12 steps between checkpoints, each multiplied by the decay at its checkpoint: WSM, equation 6."""
    updates, n = torch.randn(12, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), 13
    run = torch.cat([torch.zeros(1, 5, dtype=torch.float64), updates.cumsum(0)])
    shape = {
        "linear": lambda x: 1 - x,
        "cosine": lambda x: (1 + torch.cos(torch.pi * x)) / 2,
        "sqrt": lambda x: (1 - x).sqrt(),
        "1-sqrt": lambda x: 1 - x.sqrt(),
    }[window["decay"]]
    decayed = (shape(torch.arange(1, n, dtype=torch.float64) / n)[:, None] * updates).sum(0)
    average = torch.tensor(weights_of(n, Window.model_validate(window)), dtype=torch.float64) @ run
    torch.testing.assert_close(average, decayed, rtol=0, atol=1e-12)


def test_ema_is_the_recursion_from_the_first_checkpoint() -> None:
    values = [3.0, -1.0, 2.0, 5.0]
    kept = values[0]
    for value in values[1:]:
        kept = 0.8 * kept + 0.2 * value
    weights = weights_of(4, Window(ema=0.8))
    assert sum(w * v for w, v in zip(weights, values, strict=True)) == pytest.approx(kept, abs=1e-12)
    assert sum(weights) == pytest.approx(1, abs=1e-12)
    assert weights_of(1, Window(ema=0.8)) == [1.0]


def test_checkpoints_average_in_the_order_of_their_steps(run: Project) -> None:
    """checkpoint-1000 comes after checkpoint-400, although its name sorts first. The last weight of 1-sqrt is the smallest."""
    full = run.path / "out/full"
    (full / "checkpoint-100").rename(full / "checkpoint-1000")
    got = run.tensors("bricks: {run: {checkpoints: out/full, last: 3, decay: 1-sqrt}}\nsteps: [{merge: task_arithmetic}]\n")
    weights = weights_of(3, Window(decay="1-sqrt"))
    loaded = [load_file(full / f"checkpoint-{step}/model.safetensors") for step in (300, 400, 1000)]
    for name, tensor in got.items():
        expected = sum(w * one[name].double() for w, one in zip(weights, loaded, strict=True))
        torch.testing.assert_close(tensor.double(), expected, rtol=0, atol=1e-6)
    assert weights[0] > weights[1] > weights[2]


def test_a_window_of_one_is_the_checkpoint_bit_for_bit(run: Project) -> None:
    got = run.tensors("bricks: {run: {checkpoints: out/full, last: 1}}\nsteps: [{merge: linear}]\n", None)
    for name, tensor in load_file(run.path / "out/full/checkpoint-400/model.safetensors").items():
        assert torch.equal(got[name], tensor), name


def test_adapters_of_unequal_rank_average_to_an_adapter(run: Project) -> None:
    """Deltas are averaged, not factors: ranks 2, 3, 2, 3 add up to 10."""
    text = (
        "bricks: {run: {checkpoints: out/lora, ema: 0.5}}\nsteps: [{merge: task_arithmetic}]\noutput: {form: adapter, rank: 10}\n"
    )
    folder = Path(run.run(text)["adapter"])
    made, config = load_file(folder / "adapter_model.safetensors"), json.loads((folder / "adapter_config.json").read_text())
    weights = weights_of(4, Window(ema=0.5))

    def delta(tensors: dict[str, torch.Tensor], module: str, scale: float) -> torch.Tensor:
        return scale * tensors[f"{module}.lora_B.weight"].double() @ tensors[f"{module}.lora_A.weight"].double()

    modules = {name.removesuffix(".lora_A.weight") for name in made if name.endswith(".lora_A.weight")}
    assert modules
    for module in modules:
        expected = sum(
            w * delta(load_file(run.path / f"out/lora/checkpoint-{step}/adapter_model.safetensors"), module, 4 / (2 + i % 2))
            for i, (step, w) in enumerate(zip(STEPS, weights, strict=True))
        )
        rank = made[f"{module}.lora_A.weight"].shape[0]
        assert rank == 10
        torch.testing.assert_close(delta(made, module, config["lora_alpha"] / config["r"]), expected, rtol=0, atol=1e-6)


def test_plan_says_which_checkpoints_and_what_is_missing_between_them(run: Project) -> None:
    shutil.rmtree(run.path / "out/full/checkpoint-300")
    state(save_finetuned(run.path / "base", run.path / "out/full/checkpoint-500", seed=3), 500)
    resolved = run.resolve("bricks: {run: {checkpoints: out/full, from: 100, to: 500}}\nsteps: [{merge: average}]\n")
    said = [line for line in resolved.warnings if "'run'" in line]
    assert "average of 4 of 4 checkpoints in out/full, steps 100, 200, 400, 500" in said[0]
    assert said[0].endswith("equal weights")
    assert "missing between steps 200 and 400" in said[1]
    assert gaps([100, 200, 300]) == []
    assert gaps([5]) == []


def test_another_window_is_another_configuration(run: Project) -> None:
    keys = set()
    for window in ("", ", last: 4", ", last: 3", ", decay: cosine", ", decay: 1-sqrt", ", ema: 0.9", ", every: 200"):
        text = f"bricks: {{run: {{checkpoints: out/full{window}}}}}\nsteps: [{{merge: task_arithmetic}}]\n"
        keys.add(run.resolve(text).key)
    assert len(keys) == 6  # all four checkpoints are the last four


@pytest.mark.parametrize("lora", [False, True])
def test_what_transformers_trainer_saves(project: Project, lora: bool) -> None:
    """Four saves of a training of ten steps, with optimizer and scheduler; the last step is saved at the end, off the rhythm."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    model = AutoModelForCausalLM.from_pretrained(project.path / "base", dtype=torch.float32)
    if lora:
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    rows = [{"input_ids": [1 + i, 2, 3, 4], "labels": [1 + i, 2, 3, 4]} for i in range(10)]
    out = project.path / "out"
    settings = TrainingArguments(str(out), max_steps=10, save_steps=3, learning_rate=1e-2, lr_scheduler_type="constant", use_cpu=True, report_to=[])  # fmt: skip
    Trainer(model, settings, train_dataset=rows).train()  # type: ignore[arg-type]
    name = "adapter_model" if lora else "model"
    resolved = project.resolve("bricks: {run: {checkpoints: out}}\nsteps: [{merge: task_arithmetic}]\n")
    said = [line for line in resolved.warnings if "brick 'run'" in line]
    assert "average of 4 of 4 checkpoints in out, steps 3, 6, 9, 10" in said[0]
    assert len(said) == 1
    got = project.tensors("bricks: {run: {checkpoints: out, last: 3}}\nsteps: [{merge: task_arithmetic}]\n")
    saved = [load_file(out / f"checkpoint-{step}/{name}.safetensors") for step in (6, 9, 10)]
    base, key = load_file(project.path / "base/model.safetensors"), "model.layers.1.self_attn.q_proj"
    if lora:
        deltas = [
            one[f"base_model.model.{key}.lora_B.weight"].double() @ one[f"base_model.model.{key}.lora_A.weight"].double()
            for one in saved
        ]
        expected = base[f"{key}.weight"].double() + 4 * sum(deltas) / 3  # alpha 8 / rank 2
    else:
        expected = sum(one[f"{key}.weight"].double() for one in saved) / 3
    torch.testing.assert_close(got[f"{key}.weight"].double(), expected, rtol=0, atol=1e-6)
    assert (got[f"{key}.weight"] - base[f"{key}.weight"]).abs().max() > 1e-4


def rename(folder: str, to: str) -> Callable[[Path], object]:
    return lambda out: (out / folder).rename(out / to)


def emptied(file: str) -> Callable[[Path], object]:
    return lambda out: (out / file).write_bytes(b"")


def index(out: Path) -> None:
    """A sharded checkpoint whose second shard is not written yet."""
    place = out / "full/checkpoint-400"
    tensors = load_file(place / "model.safetensors")
    (place / "model.safetensors").unlink()
    save_file(dict(list(tensors.items())[:3]), place / "model-00001-of-00002.safetensors")
    shards = {name: f"model-0000{1 + (i > 2)}-of-00002.safetensors" for i, name in enumerate(tensors)}
    (place / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))


BAD: list[tuple[str, Callable[[Path], object] | None, str]] = [
    ("checkpoints: out/none", None, "no such directory: out/none"),
    ("checkpoints: bricks", None, "bricks has no checkpoints of a training run"),
    ("checkpoints: out/full/checkpoint-100", None, "has no checkpoints of a training run"),
    ("checkpoints: out/full, last: 5", None, "last: 5, but 4 checkpoints are in the window; there are steps 100, 200, 300, 400"),
    ("checkpoints: out/full, from: 500", None, "no checkpoint is in the window; there are steps 100, 200, 300, 400"),
    ("checkpoints: out/full, from: 300, to: 200", None, "no checkpoint is in the window"),
    ("checkpoints: out/full, every: 150, to: 200", None, "no checkpoint is in the window"),
    ("checkpoints: out/full, last: 0", None, "greater than or equal to 1"),
    ("checkpoints: out/full, last: true", None, "last"),
    ("checkpoints: out/full, decay: exponential", None, "'linear', 'cosine', 'sqrt' or '1-sqrt'"),
    ("checkpoints: out/full, ema: 1", None, "less than 1"),
    ("checkpoints: out/full, ema: 0.9, decay: cosine", None, "`decay` and `ema` both give the weights"),
    ("checkpoint: bricks/full, last: 2", None, "last: is for the checkpoints of a training run, found checkpoint"),
    ("adapter: bricks/one, from: 2", None, "from: is for the checkpoints of a training run, found adapter"),
    ("checkpoints: out/full, part: language", None, "part: language is for a multimodal checkpoint, found checkpoints"),
    ("checkpoints: out/full, recipe: a.yaml", None, "expected exactly one of"),
    ("checkpoints: out/full", emptied("full/checkpoint-400/model.safetensors"), "checkpoint-400 is unfinished: model.safetensors is missing or empty"),
    ("checkpoints: out/full", lambda out: (out / "full/checkpoint-200/trainer_state.json").unlink(), "checkpoint-200 is unfinished: trainer_state.json"),
    ("checkpoints: out/full", index, "checkpoint-400 is unfinished: model-00002-of-00002.safetensors"),
    ("checkpoints: out/lora", lambda out: (out / "lora/checkpoint-300/adapter_model.safetensors").unlink(), "checkpoint-300 is unfinished: adapter_model"),
    ("checkpoints: out/full", rename("full/checkpoint-100", "full/step_400"), "has step 400 twice: checkpoint-400, step_400"),
    ("checkpoints: out/full", rename("full/checkpoint-100", "full/epoch_1"), "has folders of epochs and of steps"),
    ("checkpoints: out/full", rename("lora/checkpoint-100", "full/checkpoint-500"), "checkpoint-100 is a checkpoint and checkpoint-500 an adapter"),
]  # fmt: skip


@pytest.mark.parametrize(("ref", "change", "message"), BAD, ids=[message[:40] for *_, message in BAD])
def test_bad_windows_are_refused_before_any_work(
    run: Project, ref: str, change: Callable[[Path], object] | None, message: str
) -> None:
    if change:
        change(run.path / "out")
    with pytest.raises(WorkbenchError) as caught:
        run.resolve(f"bricks: {{run: {{{ref}}}}}\nsteps: [{{merge: average}}]\n")
    assert message in f"{caught.value.message} {caught.value.hint}"


def test_a_checkpoint_of_another_model_is_refused_by_its_step(run: Project, vocabularies: Path) -> None:
    shutil.rmtree(run.path / "out/full/checkpoint-300")
    shutil.copytree(vocabularies / "other", run.path / "out/full/checkpoint-300")
    (run.path / "out/full/checkpoint-300/trainer_state.json").write_text("{}")
    with pytest.raises(WorkbenchError, match="step-300"):
        run.resolve("bricks: {run: {checkpoints: out/full}}\nsteps: [{merge: average}]\n")


@pytest.mark.parametrize(
    "names",
    [
        ("checkpoint-2", "checkpoint-10"),  # transformers, TRL, axolotl, LLaMA-Factory
        ("epoch_2", "epoch_10"),  # torchtune
        ("step2-unsharded", "step10-unsharded"),  # OLMo
        ("step-000002", "step-000010"),  # litgpt
        ("iter_0000002", "iter_0000010"),  # exports of Megatron-Bridge
        ("global_step_2", "global_step_10"),  # verl
    ],
)
def test_folders_as_trainers_name_them(names: tuple[str, str], tmp_path: Path) -> None:
    for name in (*names, "runs", "checkpoint-best", "logs-5"):
        (tmp_path / name).mkdir()
    assert [(one.step, one.name) for one in checkpoints_of(tmp_path, "out")] == [(2, names[0]), (10, names[1])]


def test_a_reference_is_written_as_it_was_read() -> None:
    data = {"checkpoints": "out", "last": 3, "from": 100, "decay": "cosine", "any_base": True}
    assert BrickRef.model_validate(data).data() == data
    assert BrickRef.model_validate({"checkpoint": "x"}).data() == {"checkpoint": "x"}
