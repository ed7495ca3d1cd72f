"""VeRA, BOFT, HRA, FourierFT, RandLoRA and VB-LoRA beside each other in one merge, and files of theirs that do not fit. One adapter of each kind alone is in
`test_adapter_flavours.py`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from worlds.flavours import Flavour, reference, save_base, save_flavour
from worlds.project import CPU, Project
from worlds.tiny import edit_json, tensors_of

from workbench.adapters.bind import bind
from workbench.adapters.read import CONFIG, WEIGHTS, Adapter
from workbench.ground.errors import WorkbenchError
from workbench.models.layout import Model
from workbench.run.plan import plan
from workbench.weights.checkpoint import Checkpoint, read_config

TARGETS = {"target_modules": ["q_proj", "down_proj"]}
KINDS = {
    "vera": ("VeraConfig", {}),
    "boft": ("BOFTConfig", {"boft_block_size": 4}),
    "hra": ("HRAConfig", {}),
    "fourierft": ("FourierFTConfig", {"n_frequency": 40, "scaling": 30.0}),
    "randlora": ("RandLoraConfig", {}),
    "vblora": ("VBLoRAConfig", {"num_vectors": 9, "vector_length": 8, "save_only_topk_weights": True}),
    "lora": ("LoraConfig", {}),
}
WEIGHTED = {name: 0.9 - 0.25 * i for i, name in enumerate(KINDS)}
Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama and an adapter of each kind. Not to be changed by a test."""
    place = tmp_path_factory.mktemp("kinds")
    save_base(place / "base", "llama")
    for name, (kind, fields) in KINDS.items():
        save_flavour(Flavour("llama", {**TARGETS, **fields}, peft=kind), place / "base", place / name)
    return place


@pytest.mark.filterwarnings("ignore")
def test_all_kinds_in_one_merge(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The base plus the weighted differences of PEFT's merges; no PEFT model is built for it."""
    project = Project.of(tmp_path, folder)
    base = tensors_of(folder / "base")
    expected = {name: tensor.double() for name, tensor in base.items()}
    for brick, weight in WEIGHTED.items():
        merged = reference(folder / "base", folder / brick).merge_and_unload().state_dict()
        for name, tensor in base.items():
            expected[name] = expected[name] + weight * (merged[name].double() - tensor.double())
    monkeypatch.setattr("peft.get_peft_model", lambda *_: pytest.fail("a PEFT model"))
    names = json.dumps({name: {"adapter": name} for name in WEIGHTED})
    found = project.tensors(f"bricks: {names}\nsteps: [{{merge: task_arithmetic, bricks: {json.dumps(WEIGHTED)}}}]\n")
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name].double(), tensor, atol=2e-6, rtol=0, msg=name)
    assert sum(not torch.equal(found[name], base[name]) for name in base) == 8


def test_ties_of_dense_kinds(folder: Path, tmp_path: Path) -> None:
    """A method that reads every delta twice gets the same numbers twice."""
    project = Project.of(tmp_path, folder)
    bricks = "bricks: {vera: {adapter: vera}, hra: {adapter: hra}, fourierft: {adapter: fourierft}}\n"
    one, two = (project.tensors(f"{bricks}steps: [{{merge: ties, density: 0.3}}]\n") for _ in range(2))
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


@pytest.mark.filterwarnings("ignore")
def test_projections_are_drawn_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import peft

    flavour = Flavour("llama", {**TARGETS, "save_projection": False}, peft="VeraConfig")
    adapter = save_flavour(flavour, folder / "base", tmp_path / "adapter")
    drawn: list[Any] = []
    make = peft.get_peft_model
    monkeypatch.setattr("peft.get_peft_model", lambda *args: drawn.append(args) or make(*args))
    base = Model(Checkpoint(folder / "base", "base"), read_config(folder / "base", "base"))
    bound = bind(Adapter(adapter, "x"), base.weights.specs, base)
    assert len([bound.open_delta(name, CPU) for name in bound.places]) == 8
    assert len(drawn) == 1


def test_the_plan_counts_the_delta_that_is_held(folder: Path, tmp_path: Path) -> None:
    project = Project.of(tmp_path, folder)
    recipe = "bricks: {{one: {{adapter: {}}}}}\nsteps: [{{merge: task_arithmetic}}]\n"
    peaks = {
        name: plan(project.resolve(recipe.format(name)), project.path / "runs", threads=1).peak_bytes
        for name in ("fourierft", "hra")
    }
    sizes = {name: 24 * max(t.numel() for t in tensors_of(folder / name).values()) for name in peaks}
    assert peaks["fourierft"] - sizes["fourierft"] - (peaks["hra"] - sizes["hra"]) == 8 * 4 * 32 * 48


Change = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]


def without(*keys: str) -> Change:
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if key not in keys}


def having(key: str, tensor: torch.Tensor) -> Change:
    return lambda tensors: {**tensors, key: tensor}


SPOILED: dict[str, tuple[str, dict[str, Any], Change, str]] = {
    "no projection": (
        "vera",
        {},
        without("base_model.vera_A"),
        r"the adapter's modules share vera_A, which the file does not hold",
    ),
    "no bank": (
        "vblora",
        {},
        without("base_model.vblora_vector_bank"),
        r"share vblora_vector_bank, which the file does not hold",
    ),
    "a projection that is said not to be there": (
        "vera",
        {"save_projection": False},
        without(),
        r"the file holds vera_A, but its configuration says",
    ),
    "another rank": ("vera", {"r": 5}, without(), r"vera_lambda_d of model\.layers\.0\S* is \[6\]; expected \[5\]"),
    "another rank of the projection": (
        "vera",
        {},
        having("base_model.vera_B", torch.ones(32, 4)),
        r"vera_B of \S* is \[32, 4\]; expected \[32, 6\]",
    ),
    "a projection that is too small": (
        "vera",
        {},
        having("base_model.vera_A", torch.ones(6, 31)),
        r"vera_A of \S* is \[6, 31\]; expected \[6, (32|48)\]",
    ),
    "half of a pair": ("vera", {}, without(f"{Q}.vera_lambda_d"), r"q_proj has vera_lambda_b, but no vera_lambda_d"),
    "another base": (
        "vera",
        {},
        having(f"{Q}.vera_lambda_b", torch.ones(31)),
        r"vera_lambda_b of model\.layers\.0\.self_attn\.q_proj is \[31\]; expected \[32\]",
    ),
    "a flag": ("vera", {"save_projection": "no"}, without(), r"save_projection"),
    "a key": ("vera", {"projection_prng_key": "7"}, without(), r"projection_prng_key"),
    "a copy that differs": (
        "randlora",
        {},
        having(f"{Q}.randlora_A", torch.ones(5, 1, 32)),
        r"q_proj\.randlora_A differs from base_model\.randlora_A",
    ),
    "another number of bases": ("randlora", {"r": 6}, without(), r"randlora_lambda of \S* is \[5, 7\]; expected \[6, 6\]"),
    "indices outside the bank": (
        "vblora",
        {},
        having(f"{Q}.vblora_logits_A_topk_indices", torch.full((3, 4, 2), 9, dtype=torch.uint8)),
        r"holds 9; the bank has 9 vectors",
    ),
    "vectors that do not divide": (
        "vblora",
        {},
        having("base_model.vblora_vector_bank", torch.ones(9, 7)),
        r"vectors of 7 numbers do not divide",
    ),
    "more choices": (
        "vblora",
        {"topk": 3},
        without(),
        r"vblora_logits_A_topk_indices of \S* is \[3, \d, 2\]; expected \[3, \d, 3\]",
    ),
    "no choice": ("vblora", {"topk": 0}, without(), r"topk"),
    "a vector of zeros": (
        "hra",
        {},
        having(f"{Q}.hra_u", torch.eye(32)[:, :3] * torch.tensor([1.0, 0.0, 1.0])),
        r"column 1 of \S*q_proj\.hra_u is zero",
    ),
    "another width": ("hra", {}, having(f"{Q}.hra_u", torch.ones(31, 3)), r"q_proj\.hra_u is \[31, 3\]; expected \[32, r\]"),
    "two factors": (
        "boft",
        {},
        having(f"{Q}.boft_R", torch.zeros(2, 8, 4, 4)),
        r"q_proj\.boft_R has 2 butterfly factors; expected 1",
    ),
    "other blocks": (
        "boft",
        {},
        having(f"{Q}.boft_R", torch.zeros(1, 7, 4, 4)),
        r"boft_R is \[1, 7, 4, 4\]; expected \[1, blocks, b, b\] with blocks · b = 32",
    ),
    "no scale": ("boft", {}, having(f"{Q}.boft_s", torch.ones(30, 1)), r"boft_s is \[30, 1\]; expected \[32, 1\]"),
    "too many frequencies": (
        "fourierft",
        {},
        having(f"{Q}.fourierft_spectrum", torch.ones(1025)),
        r"is \[1025\]; expected \[1024\]",
    ),
    "no number": (
        "fourierft",
        {},
        having(f"{Q}.fourierft_spectrum", torch.full((40,), float("nan"))),
        r"fourierft_spectrum holds nan at \[0\]",
    ),
    "no scaling": ("fourierft", {"scaling": "much"}, without(), r"scaling"),
    "a key of another kind": ("hra", {}, having(f"{Q}.boft_s", torch.ones(32, 1)), r"boft_s does not belong to its peft_type"),
    "a shared tensor of another kind": (
        "hra",
        {},
        having("base_model.vera_A", torch.ones(3, 32)),
        r"adapter key base_model\.vera_A",
    ),
}


@pytest.mark.parametrize("name", SPOILED)
def test_files_that_do_not_fit(name: str, folder: Path, tmp_path: Path) -> None:
    kind, fields, change, message = SPOILED[name]
    place = Path(shutil.copytree(folder / kind, tmp_path / "adapter"))
    edit_json(place / CONFIG, **fields)
    save_file({key: tensor.contiguous() for key, tensor in change(tensors_of(place)).items()}, place / WEIGHTS)
    base = Model(Checkpoint(folder / "base", "base"), read_config(folder / "base", "base"))
    with pytest.raises(WorkbenchError, match=message) as caught:
        bound = bind(Adapter(place, "brick 'x'"), base.weights.specs, base)
        _ = [bound.open_delta(disk, CPU) for disk in bound.places]
    assert "brick 'x'" in caught.value.message
    assert caught.value.hint


def test_rotations_of_conv1d_are_refused(folder: Path, tmp_path: Path) -> None:
    """PEFT has none; a square weight would be rotated from the wrong side."""
    base = save_base(tmp_path / "base", "gpt2")
    place = Path(shutil.copytree(folder / "hra", tmp_path / "adapter"))
    save_file({"base_model.model.transformer.h.0.attn.c_proj.hra_u": torch.ones(32, 3)}, place / WEIGHTS)
    model = Model(Checkpoint(base, "base"), read_config(base, "base"))
    with pytest.raises(WorkbenchError, match=r"c_proj\.weight is no nn\.Linear weight, and PEFT applies HRA to those only"):
        bind(Adapter(place, "brick 'x'"), model.weights.specs, model)
