"""`eval`, `compare` and `report` on models that no recipe makes: directories, run directories, hub ids."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from worlds.commands import call, document, refused
from worlds.hub_server import CommandLine, HubServer
from worlds.project import Project
from worlds.suites import MEAN, lay_out_models
from worlds.tiny import edit_json, save_finetuned

from workbench.scores.store import Configuration


@pytest.fixture
def world(project: Project, cwd: Path) -> Project:
    """A project with 60 items in 20 clusters, a recipe, and two models beside it."""
    return lay_out_models(project)


def test_models_alone_are_compared_with_the_first(world: Project) -> None:
    scored = document("eval", "models/Tuned-A", "models/Tuned-B", "--suite", "mini")
    assert [c["name"] for c in scored["configurations"]] == ["Tuned-A", "Tuned-B"]
    assert scored["configurations"][0]["digest"] != scored["configurations"][1]["digest"]
    found = json.loads(call("compare", "models/Tuned-A", "models/Tuned-B", "--suite", "mini", "--json", code=(0, 3)).stdout)
    assert found["baseline"] == "Tuned-A"
    assert [r["configuration"] for r in found["rows"]] == ["Tuned-B"]
    other = ("compare", "models/Tuned-A", "models/Tuned-B", "--suite", "mini", "--json", "--baseline")
    for name in ("Tuned-B", "models/Tuned-B"):
        turned = json.loads(call(*other, name, code=(0, 3)).stdout)
        assert turned["baseline"] == "Tuned-B"
        assert turned["rows"][0]["diff"] == -found["rows"][0]["diff"]
    call("report", "models/Tuned-A", "models/Tuned-B", "--suite", "mini")
    shown = json.loads(Path("reports/report.json").read_text("utf-8"))
    assert [(c["name"], c["role"], c["parents"], c["recipe"]) for c in shown["configurations"]] == [
        ("Tuned-A", "configuration", [], None),
        ("Tuned-B", "configuration", [], None),
    ]


def test_a_model_beside_a_recipe_is_compared_with_it_or_with_the_base(world: Project) -> None:
    scored = document("eval", "mean", "models/Tuned-A")
    assert [c["name"] for c in scored["configurations"]] == ["base", "one", "two", "average", "mean", "Tuned-A"]
    found = json.loads(call("compare", "mean", "models/Tuned-A", "--json", code=(0, 3)).stdout)
    assert found["baseline"] == "mean"
    assert {r["configuration"] for r in found["rows"]} == {"Tuned-A"}
    assert found["recommendation"]["baseline"] == "base"
    assert {c["configuration"] for c in found["recommendation"]["candidates"]} == {"mean", "Tuned-A", "one", "two"}
    turned = json.loads(call("compare", "models/Tuned-A", "mean", "--json", code=(0, 3)).stdout)
    assert turned["baseline"] == "Tuned-A"
    assert [r["diff"] for r in turned["rows"]] == [-r["diff"] for r in found["rows"]]
    whole = json.loads(call("compare", "mean", "models/Tuned-A", "--baseline", "base", "--json", code=(0, 3)).stdout)
    assert whole["baseline"] == "base"
    assert {"mean", "Tuned-A"} <= {r["configuration"] for r in whole["rows"]}
    assert whole["recommendation"] == found["recommendation"]


def test_equal_weights_are_scored_once(
    world: Project, score_once: Callable[[Project, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recipe, its written checkpoint and its run directory are one configuration; so are the base and its directory."""
    score_once(world, "mean")
    scored = document("eval", "mean")
    ran = document("run", "recipes/mean.yaml")

    def never(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("scored before")

    monkeypatch.setattr("workbench.run.materialize.materialize", never)
    of_recipe = {c["name"]: c for c in scored["configurations"]}
    for place in (ran["model"], ran["run"]):
        (again,) = document("eval", place, "--suite", "mini")["configurations"]
        assert again["name"] == Path(ran["run"]).name
        assert again["digest"] == of_recipe["mean"]["digest"]
        assert again["weights"] == of_recipe["mean"]["weights"] == ran["configuration"]
        assert again["tasks"] == of_recipe["mean"]["tasks"]
    (base,) = document("eval", "base", "--suite", "mini")["configurations"]
    assert base["digest"] == of_recipe["base"]["digest"]


def test_configuration_facts(world: Project) -> None:
    from safetensors.torch import load_file

    project = world
    project.write(MEAN.replace("steps: [", "steps: [{grow: depth, blocks: 1}, "), "grown.yaml")
    document("eval", "mean", "grown", "models/Tuned-A")
    kept = [
        json.loads(p.read_text("utf-8"))["configuration"] for p in Path("runs/scores").glob("*/*.json") if p.name != "plan.json"
    ]
    facts = {c["name"]: (c["parameters"], c["bytes"], c["bricks"]) for c in kept}
    tensors = load_file("base/model.safetensors").values()
    numel, nbytes = sum(t.numel() for t in tensors), sum(t.numel() * t.element_size() for t in tensors)
    adapters = {n: Path(f"bricks/{n}/adapter_model.safetensors").stat().st_size for n in ("one", "two")}
    assert facts["Tuned-A"] == facts["base"] == (numel, nbytes, {})
    assert facts["one"] == (numel, nbytes, {"one": adapters["one"]})
    ran = document("run", "recipes/grown.yaml")
    output = json.loads((Path(ran["run"]) / "run.json").read_text("utf-8"))["output"]
    assert facts["grown"] == (output["parameters"], output["bytes"], adapters)
    assert output["parameters"] > numel


def test_scores_stored_without_facts_are_read(world: Project) -> None:
    document("eval", "models/Tuned-A", "--suite", "mini")
    (file,) = (p for p in Path("runs/scores").glob("*/*.json") if p.name != "plan.json")
    old = json.loads(file.read_text("utf-8"))
    for key in ("parameters", "bytes", "bricks"):
        del old["configuration"][key]
    file.write_text(json.dumps(old))
    call("compare", "models/Tuned-A", "--suite", "mini")
    assert hash(Configuration("a" * 32, "a", bricks={"x": 1})) == hash(Configuration("a" * 32, "a"))


def test_bad_models(world: Project) -> None:
    """Everything is refused before any work."""
    models = world.path / "models"
    shutil.copytree(models / "Tuned-A", models / "pickled")
    (models / "pickled" / "model.safetensors").rename(models / "pickled" / "pytorch_model.bin")
    shutil.copytree(models / "Tuned-A", models / "quantised")
    edit_json(models / "quantised" / "config.json", quantization_config={"quant_method": "gptq"})
    (models / "empty").mkdir()
    shutil.copytree(models / "Tuned-A", models / "newer")
    edit_json(models / "newer" / "config.json", model_type="lama")
    shutil.copytree(models / "Tuned-A", models / "mute", ignore=shutil.ignore_patterns("tokenizer*"))
    save_finetuned(world.path / "base", models / "wide", seed=6, dtype=torch.float32)
    shutil.copytree(models / "Tuned-A", models / "again" / "Tuned-A")
    shutil.copy(models / "Tuned-B" / "model.safetensors", models / "again" / "Tuned-A" / "model.safetensors")

    cases: dict[tuple[str, ...], tuple[str, str]] = {
        ("bricks/one",): (r"model bricks/one: expected a complete model, found a PEFT adapter", r"--brick one=bricks/one"),
        ("models/pickled",): (r"model models/pickled: .* has pickle files only", r"save_pretrained"),
        ("models/quantised",): (r"model models/quantised: quantized weights \(gptq\)", r""),
        ("models/empty",): (r"model models/empty: has no checkpoint", r"model directory, a hub id"),
        ("models/Tuned-A", "models/newer"): (r"model models/newer: config.json: transformers cannot read model_type lama", r"newer version of transformers"),
        ("models/Tuned-A", "models/mute"): (r"no tokenizer found in .*models/mute", r"Copy tokenizer.json"),
        ("models/mute",): (r"no tokenizer found in .*models/mute", r"Copy tokenizer.json"),
        ("maen",): (r"'maen': expected a recipe, a model directory or a hub id .*Did you mean 'mean'", r"scores ls"),
        ("recipes/maen.yaml",): (r"recipes/maen.yaml: no such file", r"mean.yaml"),
        ("org/nowhere",): (r"model org/nowhere: org/nowhere is neither a local directory nor complete in the hub cache", r"HF_HUB_OFFLINE"),
        ("models/Tuned-A", "models/wide"): (r"the configurations have different output dtypes \(bfloat16: Tuned-A, float32: wide\)", r"recipe with the model as base"),
        ("models/Tuned-A", "models/again/Tuned-A"): (r"two different configurations are called 'Tuned-A'", r"Rename"),
    }  # fmt: skip
    for names, (message, hint) in cases.items():
        error = refused("eval", *names, "--suite", "mini")
        assert re.search(message, error.message), error.message
        assert re.search(hint, error.hint or ""), error.hint
    error = refused("eval", "models/Tuned-A")
    assert error.message == "no suite to score"
    assert error.hint == "Give --suite NAME. Suites here: mini."
    assert "--set overrides recipe fields" in refused("eval", "models/Tuned-A", "--suite", "mini", "--set", "seed=1").message
    error = refused("eval", "models/Tuned-A", "models/Tuned-B", "--suite", "mini", "--baseline", "Tuned-C")
    assert error.message.startswith("--baseline Tuned-C: not one of the scored configurations. Did you mean 'Tuned-")
    error = refused("compare", "models/Tuned-A", "models/Tuned-B", "--suite", "mini")
    assert error.message == "not scored yet on mini: Tuned-A, Tuned-B"
    assert error.hint == "workbench eval models/Tuned-A models/Tuned-B --suite mini"
    assert not (world.path / "runs").exists()


def test_chat_templates_count_where_they_are_used(world: Project) -> None:
    suite = world.path / "evals" / "suites" / "mini.yaml"
    template = world.path / "models" / "Tuned-B" / "chat_template.jinja"
    template.write_text("{% for m in messages %}<{{ m['content'] }}>{% endfor %}")
    document("eval", "models/Tuned-A", "models/Tuned-B", "--suite", "mini")
    suite.write_text(suite.read_text() + "chat_template: true\n")
    error = refused("eval", "models/Tuned-A", "models/Tuned-B", "--suite", "mini")
    assert (
        "suite 'mini' uses the chat template, but the tokenizers of Tuned-A and Tuned-B differ in their chat templates"
        in error.message
    )


def test_a_second_look_at_more_items_is_counted(world: Project) -> None:
    """The second look errs as often as the first; `looks` in the suite shares the level among them."""
    models = ("models/Tuned-A", "models/Tuned-B", "--suite", "mini")
    call("eval", *models, "--limit", "9", code=(0, 3))
    said = " ".join(call("eval", *models, code=(0, 3)).stderr.split())
    assert "this is look 2 at these configurations, which were scored before on 9 of " in said
    assert "2 looks at 0.05 each err in up to 0.1. Set `looks: 2` in the suite to keep 0.05 over all of them." in said
    assert "this is look" not in call("eval", *models, "--limit", "9", code=(0, 3)).stderr, (
        "scores of more items are no earlier look"
    )
    suite = world.path / "evals" / "suites" / "mini.yaml"
    suite.write_text(suite.read_text() + "looks: 2\n")
    assert "this is look" not in call("eval", *models, code=(0, 3)).stderr
    assert "step-down max-T at 0.025" in " ".join(call("compare", *models, code=(0, 3)).stderr.split())


def test_a_hub_id_is_fetched_and_scored(world: Project, tmp_path_factory: pytest.TempPathFactory) -> None:
    with HubServer() as server:
        server.repositories |= {"Org/Tuned-A": world.path / "models" / "Tuned-A", "org/lora": world.path / "bricks" / "one"}
        command = CommandLine(server.url, tmp_path_factory.mktemp("home"))
        try:
            code, out, err = command(world.path, "eval", "Org/Tuned-A@main", "models/Tuned-B", "--suite", "mini", "--json")
            assert code == 0, err
            server.forget()
            lora = command(world.path, "eval", "org/lora", "--suite", "mini")
        finally:
            command.close()
    scored = json.loads(out)["configurations"]
    assert [c["name"] for c in scored] == ["Tuned-A", "Tuned-B"]
    local = document("eval", "models/Tuned-A", "--suite", "mini")["configurations"][0]
    assert scored[0] == local
    assert lora[0] == 1
    assert "model org/lora: expected a complete model, found a PEFT adapter" in lora[2]
    adapter = world.path / "bricks" / "one" / "adapter_model.safetensors"
    assert server.sent["org/lora/adapter_model.safetensors"] < adapter.stat().st_size, "refused from headers"
