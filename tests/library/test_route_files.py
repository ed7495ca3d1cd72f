"""Files of a routed configuration for servers: plain LoRA of one rank that PEFT loads with the same logits, and a manifest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from worlds.project import Project
from worlds.routed_models import RANKS, ids, peft_of, save_ranks, write_calibration
from worlds.tiny import edit_json, tensors_of

from workbench.errors import UsageError, WorkbenchError
from workbench.library.route_files import write_served

TEXT = "w1 w2 w3 w44 is of w5"


@pytest.fixture
def configuration(project: Project) -> Path:
    """A routed configuration of ranks 4, 8 (rsLoRA) and 16 (one module less)."""
    write_calibration(project.path)
    save_ranks(project.path / "base", project.path / "ranks")
    bricks = ", ".join(f"{name}: ranks/{name}" for name in RANKS)
    step = "{route: text, calibration: 'calibration/{brick}.jsonl', samples: 12, bricks: {one: {description: first}, two: {}, three: {}}}"
    return Path(project.run(f"bricks: {{{bricks}}}\nsteps: [{step}]\n")["directory"])


def logits(base: Path, places: dict[str, Path]) -> dict[str, torch.Tensor]:
    """Brick -> logits under PEFT."""
    model = peft_of(base, places)
    found = {}
    with torch.no_grad():
        for name in places:
            model.set_adapter(name)
            found[name] = model(ids(TEXT)).logits
    return found


def test_peft_loads_each_adapter_with_the_same_logits(configuration: Path, project: Project) -> None:
    """Each directory holds its own rank, which no pattern changes, and its scaling is 1."""
    out = project.path / "served"
    manifest = write_served(configuration, out, served_base="my-base")
    base = project.path / "base"
    before = logits(base, {name: configuration / "adapters" / name for name in RANKS})
    after = logits(base, {name: out / "adapters" / name for name in RANKS})
    for name in RANKS:
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=1e-5)
        config = json.loads((out / "adapters" / name / "adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (16, 16, False)
        assert not {"rank_pattern", "alpha_pattern", "modules_to_save"} & set(config)
        assert config["base_model_name_or_path"] == "my-base"
        tensors = tensors_of(out / "adapters" / name)
        assert {t.shape[0 if "lora_A" in key else 1] for key, t in tensors.items()} == {16}
    assert not torch.allclose(before["one"], before["two"], atol=1e-3)
    assert (manifest["base"], manifest["rank"]) == ("my-base", 16)
    assert json.loads((out / "manifest.json").read_text()) == manifest


def test_the_manifest_names_router_and_bricks(configuration: Path, project: Project) -> None:
    """Router files are copies, and the base has the recipe's name unless the caller gives another."""
    out = project.path / "served"
    manifest = write_served(configuration, out, rank=32)
    assert sorted(path.name for path in out.iterdir()) == ["adapters", "manifest.json", "router.safetensors", "routing.json"]
    for name in ("routing.json", "router.safetensors"):
        assert (out / name).read_bytes() == (configuration / name).read_bytes()
    assert manifest["base"] == "base"
    assert manifest["rank"] == 32
    assert [(row["name"], row.get("description"), row["adapter"]) for row in manifest["bricks"]] == [
        ("one", "first", "adapters/one"),
        ("two", None, "adapters/two"),
        ("three", None, "adapters/three"),
    ]
    record = json.loads((configuration / "routing.json").read_text())
    assert manifest["router"]["threshold"] == record["threshold"]
    assert manifest["router"]["method"] == "text"


def test_layers_to_transform_become_full_names(configuration: Path, project: Project) -> None:
    """A list of short names would select more modules than the brick has."""
    from workbench.adapters.read import Adapter
    from workbench.library.route_files import _targets

    place = configuration / "adapters" / "three"
    modules = ["model.layers.1.self_attn.q_proj"]
    assert _targets(Adapter(place, "three"), modules) != modules
    edit_json(place / "adapter_config.json", layers_to_transform=[1])
    assert _targets(Adapter(place, "three"), modules) == modules


@pytest.mark.parametrize(
    ("options", "change", "message"),
    [
        ({"rank": 8}, "", "brick 'three' has rank 16, expected at most 8"),
        ({}, "exists", "served exists already"),
        ({}, "brick", "brick 'two' is not the one that the router was fitted on"),
        ({}, "model", "the bricks act on the checkpoint in"),
        ({}, "router", "has no router"),
    ],
)
def test_what_cannot_be_served_is_refused(
    options: dict[str, Any], change: str, message: str, configuration: Path, project: Project
) -> None:
    """Nothing is written."""
    out = project.path / "served"
    if change == "exists":
        out.mkdir()
    elif change == "brick":
        edit_json(configuration / "adapters" / "two" / "adapter_config.json", lora_alpha=99)
    elif change == "model":
        (configuration / "model").symlink_to(project.path / "base")
    elif change == "router":
        (configuration / "routing.json").unlink()
    with pytest.raises(WorkbenchError, match=message) as caught:
        write_served(configuration, out, **options)
    assert change or isinstance(caught.value, UsageError)
    assert not out.exists() or change == "exists"
