"""Routed configurations on disk: saved whole, opened alike in another process, keyed by what decides them, refused where they do not fit."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from worlds.commands import call, refused
from worlds.jsonl import write_jsonl
from worlds.project import CPU, Project
from worlds.routed_models import domain_prompts, ids, write_calibration
from worlds.tiny import edit_json, save_adapter, save_model, tensors_of, unseal

import workbench
from workbench.ground.errors import WorkbenchError
from workbench.ground.manifest import MANIFEST
from workbench.route.text import Text
from workbench.run.materialize import configuration_digest, materialize, swap
from workbench.run.plan import plan

BRICKS = "bricks: {one: bricks/one, two: bricks/two, three: bricks/three}\n"
# The built-in requests, which the tiny model's vocabulary lacks, would set a low threshold.
STEP = "{route: text, calibration: 'calibration/{brick}.jsonl', samples: 12, threshold: 0.4}"
ROUTED = f"{BRICKS}steps: [{STEP}]\n"


@pytest.fixture
def routed(project: Project) -> Project:
    """The project with calibration prompts of three bricks."""
    write_calibration(project.path)
    return project


def prompts() -> dict[str, str]:
    """Brick -> a prompt of its domain that is no calibration prompt; the base -> words of no domain."""
    found = {name: domain_prompts(name, 1, start=30)[0] for name in ("one", "two", "three")}
    return {**found, "base": "is of w55 w56 w57 is of w58 w59"}


def logits(model: Any) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return {name: model(ids(text)).logits for name, text in prompts().items()}


def chosen(model: Any) -> dict[str, str]:
    decided = model.routing.decide([ids(text)[0].tolist() for text in prompts().values()])
    return dict(zip(prompts(), map(model.routing.label, decided.weights), strict=True))


def test_a_configuration_is_that_of_its_recipe(routed: Project) -> None:
    """run, the configuration in memory and load agree in digest and bits; the base is named, not copied."""
    document = routed.run(ROUTED)
    place = Path(document["directory"])
    assert sorted(p.name for p in place.iterdir()) == [
        "README.md",
        "adapters",
        "configuration.json",
        "router.safetensors",
        "routing.json",
        MANIFEST,
    ]
    assert sorted(p.name for p in (place / "adapters" / "two").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    resolved = routed.resolve(ROUTED)
    assert configuration_digest(resolved, CPU)[0] == document["configuration"]
    live, loaded = materialize(resolved, CPU), workbench.load(document["run"], device="cpu")
    assert chosen(live) == chosen(loaded) == {name: name for name in prompts()}
    expected = logits(live)
    for name, found in logits(workbench.load(place, device="cpu")).items():
        assert torch.equal(found, expected[name]), name
    plain = logits(workbench.load(routed.path / "base", device="cpu"))
    assert {name for name in expected if torch.equal(expected[name], plain[name])} == {"base"}
    record = json.loads((place / "routing.json").read_text())
    assert [(row["name"], row["ranks"]) for row in record["bricks"]] == [("one", [8]), ("two", [4]), ("three", [4])]
    assert [len(row["prompts"]) for row in record["calibration"]] == [12, 12, 12]
    (step,) = document["steps"]
    assert step["route"] == "text"
    assert step["router"] == record["record"]


def test_a_new_process_gives_the_same_logits(routed: Project) -> None:
    """Forward and generate, from the directory alone. It takes some seconds because it starts Python and imports transformers."""
    place = Path(routed.run(ROUTED)["directory"])
    moved = shutil.copytree(place, routed.path / "elsewhere")
    model = workbench.load(place, device="cpu")
    code = (
        "import sys, torch, workbench\n"
        "from safetensors.torch import load_file, save_file\n"
        "model, rows = workbench.load(sys.argv[1], device='cpu'), load_file(sys.argv[2])\n"
        "with torch.no_grad():\n"
        "    found = {f'{n}/logits': model(r).logits.clone() for n, r in rows.items()}\n"
        "for n, r in rows.items():\n"
        "    found[f'{n}/made'] = model.generate(r, max_new_tokens=6, do_sample=False, pad_token_id=0)\n"
        "save_file(found, sys.argv[3])\n"
    )
    rows = {name: ids(text) for name, text in prompts().items()}
    save_file(rows, routed.path / "rows.safetensors")
    places = [str(moved), *(str(routed.path / f"{name}.safetensors") for name in ("rows", "found"))]
    subprocess.run([sys.executable, "-c", code, *places], check=True, capture_output=True, cwd=routed.path)
    found = tensors_of(routed.path)
    expected = logits(model)
    for name, row in rows.items():
        assert torch.equal(found[f"{name}/logits"], expected[name]), name
        made = model.generate(row, max_new_tokens=6, do_sample=False, pad_token_id=0)
        assert found[f"{name}/made"].tolist() == made.tolist()


def test_after_other_steps(routed: Project) -> None:
    """The checkpoint of the steps before stands beside the router and loads by itself as the same model without it."""
    text = f"{BRICKS[:-2]}, full: bricks/full}}\nsteps: [{{merge: linear, bricks: {{full: 0.5}}}}, {STEP[:-1]}, bricks: {{one: {{}}, three: {{}}}}}}]\n"
    document = routed.run(text)
    place = Path(document["directory"])
    model = workbench.load(place, device="cpu")
    merged = routed.run("bricks: {full: bricks/full}\nsteps: [{merge: linear, bricks: {full: 0.5}}]\n", "merged.yaml")
    assert (place / "model" / "model.safetensors").read_bytes() == (Path(merged["model"]) / "model.safetensors").read_bytes()
    plain = workbench.load(merged["model"], device="cpu")
    row = ids(prompts()["base"])
    with torch.no_grad():
        assert torch.equal(model(row).logits, plain(row).logits)
        assert not torch.equal(model(ids(prompts()["three"])).logits, plain(ids(prompts()["three"])).logits)
    assert model.routing.bricks == ("one", "three")
    assert document["configuration"] == configuration_digest(routed.resolve(text), CPU)[0]


def test_what_decides_the_result_is_in_the_key(routed: Project) -> None:
    keys = {routed.resolve(ROUTED).key}
    assert routed.resolve(ROUTED).key in keys
    listed = ROUTED.replace("samples: 12", "samples: 12, bricks: {one: {}, two: {}, three: {}}")
    assert routed.resolve(listed).key in keys
    for changed in (
        ROUTED.replace("samples: 12", "samples: 11"),
        ROUTED.replace("samples: 12", "samples: 12, abstain: 0.1"),
        ROUTED.replace("two: bricks/two", "two: bricks/one"),
        listed.replace("one: {}", "one: {description: adds}"),
        "seed: 1\n" + ROUTED,
    ):
        key = routed.resolve(changed).key
        assert key not in keys, changed
        keys.add(key)
    write_jsonl(
        routed.path / "calibration" / "two.jsonl", [{"prompt": text} for text in [*domain_prompts("two", 11), "w20 w21 w22"]]
    )
    assert routed.resolve(ROUTED).key not in keys


def test_a_fitted_router_is_not_fitted_again(routed: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = plan(routed.resolve(ROUTED), routed.path / "runs")
    assert planned.cached == []
    assert planned.steps[0].cost == {"prompts": 36}
    routed.run(ROUTED)
    monkeypatch.setattr(Text, "fit", lambda *_: pytest.fail("the router is fitted again"))
    assert "route-text" in plan(routed.resolve(ROUTED), routed.path / "runs").cached
    assert chosen(materialize(routed.resolve(ROUTED), CPU)) == {name: name for name in prompts()}
    with pytest.raises(pytest.fail.Exception):
        materialize(routed.resolve(ROUTED.replace("samples: 12", "samples: 11")), CPU)


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        (
            ROUTED.replace("two: bricks/two", "two: bricks/full"),
            "brick 'two' is a checkpoint, but a router chooses among adapters of one base",
            "workbench brick extract",
        ),
        (
            ROUTED.replace("two: bricks/two", "two: dora"),
            "brick 'two' has DoRA on model.layers.0.mlp.down_proj, but step 'route-text' needs plain LoRA on linear layers",
            "workbench brick bake dora -o bricks/two-full",
        ),
        (
            ROUTED.replace("two: bricks/two", "two: whole"),
            "has a whole tensor for model.layers.0.input_layernorm.weight (modules_to_save or bias)",
            "workbench brick extract bricks/two-full --base BASE -o bricks/two-lora",
        ),
        (ROUTED.replace("two: bricks/two", "two: other"), "brick 'two'", ""),
        (
            ROUTED.replace("steps: [", "steps: [").replace("]\n", ", {grow: depth, blocks: 1}]\n"),
            "no step can follow `route: text`",
            "",
        ),
        (ROUTED.replace("calibration/{brick}", "none/{brick}"), "none/one.jsonl does not exist", ""),
        (f"{BRICKS}steps: [{{route: text}}]\n", "expected `calibration`, a JSONL file of prompts, for every brick", ""),
        (ROUTED + "output: {form: checkpoint}\n", "ends in `route: text`, but a checkpoint cannot hold a router", ""),
        (ROUTED + "output: {form: adapter}\n", "an adapter cannot hold a router", ""),
        (
            "bricks: {one: bricks/one}\nsteps: [" + STEP + "]\n",
            "expected 2 or more bricks to choose among, found 'one' alone",
            "",
        ),
        (ROUTED.replace("samples: 12", "mix: 2"), "mix: no longer a field", ""),
    ],
)
def test_recipe_errors(text: str, message: str, hint: str, routed: Project, llama: Path) -> None:
    """Nothing is computed before these are found."""
    if "dora" in text:
        save_adapter(llama, routed.path / "dora", seed=5, use_dora=True)
    if "whole" in text:
        file = save_adapter(llama, routed.path / "whole", seed=5, modules_to_save=["norm"]) / "adapter_model.safetensors"
        save_file({name: t + 1 if "norm" in name else t for name, t in tensors_of(file.parent).items()}, file)
    if "two: other" in text:
        other = save_model(routed.path / "other-base", "llama_untied", seed=9, layers=2)
        edit_json(other / "config.json", hidden_size=32)
        save_adapter(other, routed.path / "other", seed=6, target_modules=["lm_head"])
        shutil.copyfile(routed.path / "other-base" / "tokenizer.json", routed.path / "other" / "tokenizer.json")
    with pytest.raises(WorkbenchError) as caught:
        routed.resolve(text)
    assert message in caught.value.message
    assert hint in str(caught.value.hint)
    assert caught.value.exit_code in (1, 2)
    assert not (routed.path / ".workbench").exists() or not list((routed.path / ".workbench").glob("**/routers"))


def test_growth_before_the_router_is_refused_before_any_work(routed: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Text, "fit", lambda *_: pytest.fail("the router is fitted"))
    with pytest.raises(WorkbenchError, match="a step before it changes the layers of the base"):
        routed.run(f"{BRICKS}steps: [{{grow: depth, blocks: 1, check: off}}, {STEP}]\n")


def test_a_router_is_no_brick_and_no_weights(routed: Project) -> None:
    routed.write(ROUTED, "inner.yaml")
    with pytest.raises(WorkbenchError, match="ends in `route: text`, but a router does not change weights and cannot be merged"):
        routed.resolve("bricks: {m: {recipe: recipes/inner.yaml}}\nsteps: [{merge: average}]\n")
    model = materialize(routed.resolve("steps: []\n"), CPU)
    with (
        pytest.raises(WorkbenchError, match="exchanges only weights, but this configuration has a router"),
        swap(model, routed.resolve(ROUTED)),
    ):
        pass


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("other router", r"router\.safetensors: tensor '\w+' is not the one that routing\.json was written with"),
        ("other brick", r"brick 'two' is not the one that the router was fitted on"),
        ("scaling", r"brick 'two' is not the one that the router was fitted on"),
        ("no brick", r"no adapter_config\.json in .*adapters/two"),
        ("order", r"the router chooses among one, two, three, but the bricks are two, one, three"),
        ("damaged", r"routing\.json is missing or not a JSON object"),
        ("format", r"has format 7, this version reads format 1"),
        (
            "version",
            r"the router was fitted by version 0 of 'text', and this is version 2, whose confidences and threshold differ",
        ),
        ("method", r"routing\.json: its method no longer exists: unknown route method 'gate'"),
        ("base", r"the weights or config.json of its base own have changed"),
        ("tokenizer", r"the tokenizer of its base own has changed since the router was made"),
    ],
)
def test_files_that_do_not_belong_together_are_refused(change: str, message: str, routed: Project) -> None:
    shutil.copytree((routed.path / "base").resolve(), routed.path / "own")
    place = Path(routed.run("base: own\n" + ROUTED)["directory"])
    copy = shutil.copytree(place, routed.path / "copy")
    unseal(copy)
    if change == "other router":
        other = Path(routed.run(ROUTED.replace("samples: 12", "samples: 8"), "other.yaml")["directory"])
        shutil.copyfile(other / "router.safetensors", copy / "router.safetensors")
    elif change == "other brick":
        name = "adapter_model.safetensors"
        shutil.copyfile(copy / "adapters" / "three" / name, copy / "adapters" / "two" / name)
    elif change == "scaling":
        edit_json(copy / "adapters" / "two" / "adapter_config.json", lora_alpha=99)
    elif change == "no brick":
        shutil.rmtree(copy / "adapters" / "two")
    elif change == "order":
        rows = json.loads((copy / "routing.json").read_text())["bricks"]
        edit_json(copy / "routing.json", bricks=[rows[1], rows[0], rows[2]])
    elif change == "damaged":
        (copy / "routing.json").write_bytes((place / "routing.json").read_bytes()[:-9])
    elif change == "format":
        edit_json(copy / "routing.json", format=7)
    elif change == "tokenizer":
        edit_json(routed.path / "own" / "tokenizer.json", normalizer={"type": "Lowercase"})
    elif change == "version":
        edit_json(copy / "routing.json", method_version=0)
    elif change == "method":
        edit_json(copy / "routing.json", method="gate")
    else:
        save_model(routed.path / "own", seed=77)
    with pytest.raises(WorkbenchError, match=message):
        workbench.load(copy, device="cpu")


def test_the_commands(routed: Project, cwd: Path) -> None:
    """run, its hints, runs verify and show, -o, and a configuration that is changed afterwards."""
    routed.write(ROUTED, "three.yaml")
    assert "route-text" in call("plan", "recipes/three.yaml").stdout
    result = call("run", "recipes/three.yaml", "--device", "cpu", "-o", "mine")
    assert 'load:   workbench.load("mine")' in result.stderr
    assert "workbench route explain mine TEXT" in result.stderr
    assert chosen(workbench.load("mine", device="cpu")) == {name: name for name in prompts()}
    card = Path("mine/README.md").read_text()
    assert "| `three` |" in card
    run = next(Path("runs").glob("three-*")).name
    assert f"{run}: all 15 files are as written" in call("runs", "verify", run).stderr
    shown = call("runs", "show", run).stdout
    assert "right on held-out templates: plain 100.0 %" in shown
    config = Path("runs") / run / "configuration" / "adapters" / "one" / "adapter_config.json"
    edit_json(config, lora_alpha=99)
    error = refused("runs", "verify", run)
    assert "adapters/one/adapter_config.json: expected" in error.message
    assert error.exit_code == 3


def test_bricks_that_cannot_act_beside_the_weights_are_found_before_the_fit(
    routed: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A module that is no linear layer in the live model, though the brick fits the base's tensors."""
    import workbench.run.kinds.route as kind

    monkeypatch.setattr(Text, "fit", lambda *_: pytest.fail("the router is fitted"))
    real = kind.linear_factors
    monkeypatch.setattr(
        kind, "linear_factors", lambda adapter: {**real(adapter), "model.norm": next(iter(real(adapter).values()))}
    )
    with pytest.raises(WorkbenchError, match=r"model\.norm is a LlamaRMSNorm, expected a linear layer"):
        routed.run(ROUTED)
