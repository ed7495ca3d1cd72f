"""Prunings that are refused before any model is loaded, and what pruning says about itself."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from worlds.commands import call
from worlds.growing import save_family
from worlds.project import Project
from worlds.texts import save_other, write_rows
from worlds.tiny import save_model

from workbench.ground.errors import WorkbenchError
from workbench.grow.expansion.records import removal_line
from workbench.run.plan import plan


@pytest.fixture
def texts(project: Project) -> Project:
    """A project with texts.jsonl."""
    write_rows(project.path / "texts.jsonl", 12)
    return project


REFUSED: list[tuple[str, str]] = [
    ("layers: [4]", r"grow prune: layer 4 does not exist; the model has layers 0\.\.3"),
    ("layers: [-5]", r"grow prune: layer -5 does not exist; the model has layers 0\.\.3"),
    ("layers: [3, -1]", "grow prune: `layers` names layer 3 twice"),
    ("layers: [0, 1, 2, 3]", "grow prune: `layers` names all 4 layers; at least one must remain"),
    ("layers: 4, calibration: texts.jsonl", "grow prune: `layers: 4` removes all 4 layers; at least one must remain"),
    ("layers: 0.95, calibration: texts.jsonl", "grow prune: `layers: 0.95` removes all 4 layers"),
    ("layers: 0.1, calibration: texts.jsonl", "grow prune: `layers: 0.1` removes none of 4 layers"),
    ("layers: 0, calibration: texts.jsonl", "expected 1 or more layers to remove, found 0"),
    ("layers: 0.0, calibration: texts.jsonl", "expected a share between 0 and 1, a number of layers, or a list; found 0.0"),
    ("layers: 1.0, calibration: texts.jsonl", "expected a share between 0 and 1, a number of layers, or a list; found 1.0"),
    ("layers: -2, calibration: texts.jsonl", "expected 1 or more layers to remove, found -2"),
    ("layers: []", "expected at least one layer to remove, found an empty list"),
    ("layers: [1], by: influence", "by: influence chooses a number or share of layers, and `layers` names them"),
    ("layers: 1", "importance is measured on texts; expected a JSONL file"),
    ("neurons: 0.25", "importance is measured on texts; expected a JSONL file"),
    ("layers: [1], calibration: texts.jsonl", "a list of layers is not measured, so the texts are not used"),
    ("layers: 1, calibration: text.jsonl", "text.jsonl does not exist"),
    ("neurons: 0.25, by: influence, calibration: texts.jsonl", "by: influence chooses layers, and `layers` is not set"),
    ("neurons: 0, calibration: texts.jsonl", "greater than 0"),
    ("heads: 1.0, calibration: texts.jsonl", "less than 1"),
    ("neurons: 0.001, calibration: texts.jsonl", "model_type llama: `neurons: 0.001` removes none of 48 neurons"),
    ("heads: 0.2, calibration: texts.jsonl", "model_type llama: `heads: 0.2` removes none of 2 key-value heads"),
    ("heads: 0.9, calibration: texts.jsonl", "model_type llama: `heads: 0.9` removes all 2 key-value heads"),
    ("check: off", "expected at least one of `layers: 8`, `neurons: 0.25`, `heads: 0.25` and `hidden: 0.25`"),
    (
        "layers: [1], train: {data: texts.jsonl, parameters: new_only}",
        "steps.0.train.parameters: expected 'all', found 'new_only'",
    ),
    ("layers: [1], train: {data: texts.jsonl, balance: 0.1}", "train: `balance` needs routers, but the step adds none"),
    ("layers: [1], train: {data: none.jsonl}", "none.jsonl does not exist"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED)
def test_bad_input(fields: str, message: str, texts: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error before any model is loaded, with exit code 2 or 1."""
    monkeypatch.setattr("workbench.run.kinds.grow.live_model", lambda *_: pytest.fail("loaded a model"))
    with pytest.raises(WorkbenchError) as caught:
        plan(texts.resolve(f"steps: [{{grow: prune, {fields}}}]\n"), texts.path / "runs")
    error: Any = caught.value
    said = json.dumps([str(error), error.message, *[str(problem) for problem in getattr(error, "problems", ())]])
    assert re.search(message, said), said


def test_architectures_that_are_refused(texts: Project, dense_of: Callable[[str], Path], tmp_path: Path) -> None:
    """By name, before a model is loaded; their layers can go."""
    mixture = save_other(tmp_path / "mixture", "mixtral")
    for base, fields, message in (
        (mixture, "neurons: 0.25", "model_type mixtral: layer 0: expected one feed-forward down-projection, found 0"),
        (dense_of("bloom"), "neurons: 0.5", "model_type bloom: config.json has no field for the number of neurons"),
        (dense_of("olmo2"), "heads: 0.5", "model_type olmo2: model.layers.0.self_attn.._norm.weight normalizes over all heads"),
    ):
        with pytest.raises(WorkbenchError, match=message) as caught:
            plan(
                texts.resolve(f"base: {base}\nsteps: [{{grow: prune, {fields}, calibration: texts.jsonl}}]\n"),
                texts.path / "runs",
            )
        assert caught.value.exit_code == 2
        assert any(
            part in str(caught.value.hint) for part in ("Prune `layers` instead.", "state space", "Report this architecture")
        )
    found = texts.tensors(f"base: {mixture}\nsteps: [{{grow: prune, layers: 1, by: perplexity, calibration: texts.jsonl}}]\n")
    assert {int(name.split(".")[2]) for name in found if ".layers." in name} == {0}


@pytest.mark.parametrize(
    ("family", "experts"),
    [
        ("mixtral", "block_sparse_moe.experts.0.w1.weight"),
        ("granitemoe", "block_sparse_moe.input_linear.weight"),
        ("hunyuan_v1_moe", "mlp.experts.0.down_proj.weight"),
    ],
)
def test_experts_are_named(family: str, experts: str, texts: Project, tmp_path: Path) -> None:
    """Pruned neurons need a dense layer; the message names a tensor of the experts."""
    base = save_family(family, tmp_path / family)
    step = "{grow: prune, neurons: 0.25, calibration: texts.jsonl}"
    with pytest.raises(WorkbenchError, match=r"found 0 \(none\); the layer is a mixture of experts \(model.layers.0." + experts):
        plan(texts.resolve(f"base: {base}\nsteps: [{step}]\n"), texts.path / "runs")


def test_activations_that_are_no_numbers_are_an_error(texts: Project) -> None:
    """Weights are finite, and the products of two of them are not."""
    base = save_model(texts.path / "huge")
    tensors = load_file(base / "model.safetensors")
    for name in ("gate_proj", "up_proj"):
        tensors[f"model.layers.1.mlp.{name}.weight"][3] = 1e25
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(WorkbenchError, match="the neurons of layer 1 are NaN or infinite on the texts"):
        texts.run("base: huge\nsteps: [{grow: prune, neurons: 0.25, calibration: texts.jsonl}]\n")


def test_an_adapter_cannot_be_smaller(project: Project) -> None:
    with pytest.raises(WorkbenchError, match="grow-prune removes tensors, but an adapter can only update tensors of the base"):
        plan(project.resolve("steps: [{grow: prune, layers: [1]}]\noutput: {form: adapter}\n"), project.path / "runs")


def test_a_model_of_one_layer(texts: Project, tmp_path: Path) -> None:
    base = save_model(tmp_path / "one", layers=1)
    with pytest.raises(WorkbenchError, match="`layers: 1` removes all 1 layers; at least one must remain") as caught:
        plan(texts.resolve(f"base: {base}\nsteps: [{{grow: prune, layers: 1, calibration: texts.jsonl}}]\n"), texts.path / "runs")
    assert caught.value.hint == "This model cannot lose any."


def test_words_of_a_record() -> None:
    sizes = {"parameters": [134_500_000, 4_000], "bytes": [269_000_000, 8_000]}
    influence = {"by": "influence", "influence": [1.0, 0.02, 0.5, 0.01, 0.03, 0.6]}
    record = {"grow": "prune", "layers": [6, 3], "gone_layers": [1, 3, 4], "importance": influence, **sizes}
    assert removal_line(record) == (
        "6 -> 3 layers, removed 1, 3-4 (influence 0.01 to 0.03, the others 0.5 to 1); 134.5 million -> 4,000 parameters, "
        "269 MB -> 8.0 kB"
    )
    greedy = {"by": "perplexity", "removed": [3, 1], "losses": [2.0, 2.25, 2.5], "heads_kept_strength": [0.8, 0.95]}
    record = {"grow": "prune", "layers": [6, 4], "gone_layers": [1, 3], "key_value_heads": [3, 2], "importance": greedy, **sizes}
    assert removal_line(record) == (
        "6 -> 4 layers, removed 1, 3 (in the order 3, 1; loss 2 -> 2.5); 3 -> 2 key-value heads with 80 to 95 % of their importance; "
        "134.5 million -> 4,000 parameters, 269 MB -> 8.0 kB"
    )
    listed = {"grow": "prune", "layers": [6, 5], "gone_layers": [5], **sizes}
    assert str(removal_line(listed)).startswith("6 -> 5 layers, removed 5; 134.5 million")
    assert removal_line({"grow": "stack", **sizes}) is None


def test_plan_run_and_card(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project.path)
    write_rows(project.path / "texts.jsonl", 6)
    project.write("steps: [{grow: prune, layers: 1, neurons: 0.25, calibration: texts.jsonl}]\n")
    sizes = "4 -> 3 layers; 48 -> 36 neurons a layer; "
    planned = call("plan", "recipes/test.yaml")
    assert f"grow-prune: {sizes}" in planned.output
    done = call("run", "recipes/test.yaml")
    assert "grow-prune: 4 -> 3 layers, removed " in done.output
    card = next((project.path / "runs").glob("*/model/README.md")).read_text("utf-8")
    assert "- `grow-prune`: 4 -> 3 layers, removed " in card
    assert "(influence " in card
    assert "shorter ones keep their other elements" in card


def test_the_plan_of_a_wider_model(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its row has numbers of neurons, where those of edits have a set."""
    monkeypatch.chdir(project.path)
    project.write("steps: [{grow: width, neurons: 64}]\n")
    assert "check full" in call("plan", "recipes/test.yaml").output
