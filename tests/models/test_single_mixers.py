"""Nemotron-H: a layer is one mixer, and config.json names the kind of each layer instead of their number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, NemotronHConfig, NemotronHForCausalLM

from worlds.jsonl import write_jsonl
from worlds.project import CPU, Project
from worlds.tiny import save_tokenizer, tensors_of

from workbench.ground.errors import WorkbenchError
from workbench.grow.expansion.layers import reordered
from workbench.models.architecture import model_depth
from workbench.models.layout import Layout

KINDS = ["linear_attention", "mlp", "full_attention", "mlp"]


@pytest.fixture(scope="module")
def nemotron(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("nemotron")
    config = NemotronHConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, layers_block_type=KINDS, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, mamba_num_heads=4, mamba_head_dim=16, ssm_state_size=8, n_groups=1, chunk_size=16, eos_token_id=1,
        bos_token_id=None, pad_token_id=None, initializer_range=0.2)  # fmt: skip
    for seed, name in enumerate(("base", "tuned")):
        torch.manual_seed(seed)
        NemotronHForCausalLM(config).save_pretrained(place / name)
        save_tokenizer(place / name)
    return place


@pytest.fixture
def mixers(nemotron: Path, tmp_path: Path) -> Project:
    (tmp_path / "recipes").mkdir()
    for name in ("base", "tuned"):
        (tmp_path / name).symlink_to(nemotron / name)
    facts = [{"prompt": "{subject} is", "subject": f"w{i} of w{i + 9}", "target": "w3"} for i in range(3)]
    write_jsonl(tmp_path / "facts.jsonl", facts)
    (tmp_path / "text.txt").write_text(
        "\n\n".join(" ".join(f"w{(7 * i + j) % 60}" for j in range(40)) for i in range(30)), "utf-8"
    )
    return Project(tmp_path)


@pytest.mark.parametrize(
    ("config", "depth"),
    [
        ({"layers_block_type": KINDS}, 4),
        ({"n_layers": 6}, 6),
        ({"llm_config": {"layers_block_type": KINDS}}, 4),
        ({"llm_config": {"num_hidden_layers": 5}, "vision_config": {"num_hidden_layers": 9}}, 5),
        ({"text_config": {"n_layers": 3}}, 3),
        ({"hidden_size": 3}, 0),
    ],
)
def test_depth(config: dict[str, Any], depth: int) -> None:
    assert model_depth(config) == depth


def test_layers_move_and_schedules_follow(mixers: Project) -> None:
    assert reordered({"n_layers": 4}, 4, [0, 1, 1], "stack") == {"n_layers": 3}
    assert reordered({"llm_config": {"n_layers": 4}}, 4, [3, 0], "stack") == {"llm_config": {"n_layers": 2}}
    config = {"layers_block_type": KINDS, "hybrid_override_pattern": "M-*-"}
    moved = {"layers_block_type": ["full_attention", "linear_attention", "mlp"], "hybrid_override_pattern": "*M-"}
    assert reordered(config, 4, [2, 0, 3], "stack") == moved
    base, tuned = (tensors_of(mixers.path / name) for name in ("base", "tuned"))
    document = mixers.run("bricks: {tuned: tuned}\nsteps: [{merge: task_arithmetic, lambda: {first: 0.0, last: 0.9}}]\n")
    merged = tensors_of(Path(document["model"]))
    for layer, lam in enumerate((0.0, 0.3, 0.6, 0.9)):
        for name in (n for n in base if n.startswith(f"backbone.layers.{layer}.")):
            torch.testing.assert_close(merged[name], base[name] + lam * (tuned[name] - base[name]))


def test_layers_are_copied_and_kinds_are_known(mixers: Project) -> None:
    """Copies whose output projection is zero, whatever their mixer: the function stays, and `run` checks it on logits."""
    document = mixers.run("steps: [{grow: depth, blocks: 4}]\n")
    config = json.loads((Path(document["model"]) / "config.json").read_text("utf-8"))
    assert config["layers_block_type"] == [kind for kind in KINDS for _ in range(2)]
    tokens = torch.arange(2, 12)[None]
    before, after = (
        AutoModelForCausalLM.from_pretrained(p).eval()(tokens).logits for p in (mixers.path / "base", document["model"])
    )
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)
    layout = mixers.resolve("steps: []\n").base.layout
    assert list(layout.edited()) == [1, 3]
    assert layout.mlp_out(3) == "backbone.layers.3.mixer.down_proj.weight"
    assert layout.attention_out(2) == "backbone.layers.2.mixer.o_proj.weight"
    assert layout.residual_writers(0) == ["backbone.layers.0.mixer.out_proj.weight"]
    assert isinstance(layout, Layout)
    from workbench.run.compose import compose

    with pytest.raises(WorkbenchError, match="layer 2 has no feed-forward part to edit") as caught:
        compose(mixers.resolve(f"steps: [{{{EDIT}, layers: [2], position: subject_last}}]\n"), CPU)
    assert caught.value.hint == "Choose from the layers that have one: 1, 3."


EDIT = "edit: memit, facts: facts.jsonl, statistics: text.txt, tokens_per_input: 4, contexts: 0, steps: 60"


@pytest.mark.parametrize(("layers", "written"), [("[1]", {1}), ("[3]", {3}), ("[1, 3]", {1, 3})])
def test_feed_forward_layers_are_edited(mixers: Project, layers: str, written: set[int]) -> None:
    document = mixers.run(f"steps: [{{{EDIT}, layers: {layers}, position: prompt_last}}]\n")
    base, edited = tensors_of(mixers.path / "base"), tensors_of(Path(document["model"]))
    changed = {name for name in base if not torch.equal(base[name], edited[name])}
    assert changed == {f"backbone.layers.{layer}.mixer.down_proj.weight" for layer in written}


@pytest.mark.parametrize(("edit", "layers"), [("finetune, epochs: 1, min_efficacy: 0", {1}), ("ultraedit, min_efficacy: 0", {3})])
def test_layers_that_a_method_chooses(mixers: Project, edit: str, layers: set[int]) -> None:
    document = mixers.run(f"steps: [{{edit: {edit}, facts: facts.jsonl}}]\n")
    base, edited = tensors_of(mixers.path / "base"), tensors_of(Path(document["model"]))
    changed = {name for name in base if not torch.equal(base[name], edited[name])}
    assert changed == {f"backbone.layers.{layer}.mixer.down_proj.weight" for layer in layers}
