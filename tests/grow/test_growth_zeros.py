"""Growth that starts at zero on purpose, growth that could never learn, which layers `depth` copies, and what moves with layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from worlds.growing import logits_of
from worlds.project import Project
from worlds.tiny import tensors_of

from workbench.ground.errors import WorkbenchError
from workbench.grow.expansion.layers import reordered
from workbench.grow.expansion.preserve import same_logits
from workbench.recipe.methods import methods

TOKENS = torch.randint(2, 60, (2, 20), generator=torch.Generator().manual_seed(1))


# -- growth that starts at zero

LLAMA_PRO = """\
slices:
  - sources: [{model: base, layer_range: [0, 2]}]
  - sources:
      - model: base
        layer_range: [1, 2]
        parameters:
          scale: [{filter: o_proj, value: 0.0}, {filter: down_proj, value: 0.0}, {value: 1.0}]
  - sources: [{model: base, layer_range: [2, 4]}]
merge_method: passthrough
dtype: float32
"""


def imported(project: Project, text: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The recipe that `recipe import` makes of a mergekit file."""
    from workbench.exchange.mergekit import import_recipe

    monkeypatch.chdir(project.path)
    (project.path / "pro.yml").write_text(text, "utf-8")
    return import_recipe(project.path / "pro.yml").text


@pytest.mark.part("exchange")
def test_llama_pro_as_mergekit_writes_it_runs(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """The seven tensors in front of the zeros have no gradient at first; after one step of the zeros all nine have."""
    document = project.run(imported(project, LLAMA_PRO, monkeypatch), "pro.yaml")
    check = document["steps"][0]["check"]
    assert check["gradient"] == {"now": 2, "after_one_step": 9}
    assert sorted(name.split("layers.2.")[1] for name in check["at_first_without"]) == [
        "input_layernorm.weight", "mlp.gate_proj.weight", "mlp.up_proj.weight", "post_attention_layernorm.weight",
        "self_attn.k_proj.weight", "self_attn.q_proj.weight", "self_attn.v_proj.weight"]  # fmt: skip
    assert (logits_of(document["model"], TOKENS) - logits_of(project.path / "base", TOKENS)).abs().max() == 0
    card = (Path(document["model"]) / "README.md").read_text("utf-8")
    assert "7 of the new tensors (" in card
    assert "have no gradient until the zeros" in card


@pytest.mark.part("exchange")
@pytest.mark.parametrize(
    ("filters", "dead"),
    [("o_proj v_proj", 5), ("down_proj up_proj", 4), ("o_proj down_proj input_layernorm post_attention_layernorm", 9)],
)
def test_growth_that_can_never_learn_is_still_caught(
    filters: str, dead: int, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both factors of a product are zero: neither ever gets a gradient."""
    rules = "".join(f"{{filter: {name}, value: 0.0}}, " for name in filters.split())
    text = LLAMA_PRO.replace("{filter: o_proj, value: 0.0}, {filter: down_proj, value: 0.0}, ", rules)
    with pytest.raises(
        WorkbenchError, match=rf"{dead} of 9 tensors with additions have no gradient .*even after one gradient step"
    ) as caught:
        project.run(imported(project, text, monkeypatch), "pro.yaml")
    assert caught.value.exit_code == 3


# -- which layers `depth` copies


@pytest.mark.parametrize(
    ("layers", "place", "copied"),
    [
        (4, {"blocks": 1}, [3]), (4, {"blocks": 2}, [1, 3]), (4, {"blocks": 3}, [0, 1, 3]), (4, {"blocks": 4}, [0, 1, 2, 3]),
        (5, {"blocks": 2}, [1, 4]), (8, {"blocks": 3}, [1, 4, 7]), (32, {"blocks": 8}, [3, 7, 11, 15, 19, 23, 27, 31]),
        (8, {"after": [0, -1]}, [0, 7]), (8, {"after": [5, 2]}, [2, 5]),
    ],
)  # fmt: skip
def test_which_layers_depth_copies(layers: int, place: dict[str, Any], copied: list[int]) -> None:
    """The last layer of each of as many groups, as LLaMA Pro spaces them (32 layers, 8 blocks: behind every fourth)."""
    assert methods()["grow:depth"].model_validate({"grow": "depth", **place}).copied(layers) == copied


def test_a_copy_stands_behind_its_original(project: Project) -> None:
    """By content, in the file: layer for layer, with what writes to the residual stream at zero."""
    document = project.run("steps: [{grow: depth, blocks: 2, check: off}]\n")
    old, new = tensors_of(project.path / "base"), tensors_of(Path(document["model"]))
    assert (document["steps"][0]["copied_layers"], document["steps"][0]["new_layers"]) == ([1, 3], [2, 5])
    for place, source in enumerate([0, 1, 1, 2, 3, 3]):
        for leaf in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj", "input_layernorm"):
            found, expected = new[f"model.layers.{place}.{leaf}.weight"], old[f"model.layers.{source}.{leaf}.weight"]
            zero = place in (2, 5) and leaf.endswith(("o_proj", "down_proj"))
            assert torch.equal(found, torch.zeros_like(expected) if zero else expected), (place, leaf)


# -- what moves with the layers, and what a comparison refuses


def test_settings_of_single_layers_move_with_them() -> None:
    """By number, one letter a layer, and mixtures that are all layers; a mixture of some layers by number is refused."""
    config = {
        "num_hidden_layers": 3,
        "layer_settings": {"0": "a", "2": "c"},
        "hybrid_override_pattern": "M-*",
        "layer_types": ["x", "y", "z"],
    }
    grown = reordered({**config, "moe_layers": [0, 1, 2]}, 3, [0, 2, 2, 1], "stack")
    assert grown["num_hidden_layers"] == 4
    assert grown["layer_settings"] == {"0": "a", "1": "c", "2": "c"}
    assert grown["hybrid_override_pattern"] == "M**-"
    assert grown["layer_types"] == ["x", "z", "z", "y"]
    assert grown["moe_layers"] is None
    ends = {"moe_layer_start_index": 0, "moe_layer_end_index": 2, "moe_layer_interval": 1}
    assert reordered({**config, **ends}, 3, [0, 1, 2, 2], "stack")["moe_layer_end_index"] == -1
    with pytest.raises(WorkbenchError, match="refers to layers by number"):
        reordered({**config, **ends, "moe_layer_end_index": 1}, 3, [0, 1, 2, 2], "stack")


def test_logits_are_compared_relative_to_the_largest() -> None:
    """NaN is no agreement, a generated token that differs is none either, and rows of new tokens are left out."""
    old = torch.tensor([[[4.0, -1.0, 0.5]]])
    assert same_logits(old, old + 3e-6, 1e-6, "grow")["max_logit_difference"] == pytest.approx(3e-6, rel=0.2)
    more = torch.cat([old, torch.full((1, 1, 1), 9.0)], -1)
    found = same_logits(old, more, 0.0, "grow", (3,))
    assert found["max_logit_difference"] == 0.0
    assert found["new_token_probability"] == pytest.approx(float(more.softmax(-1)[0, 0, 3]))
    for new, agrees in ((old + 5e-6, True), (torch.full_like(old, torch.nan), True), (old, False), (old[..., :2], True)):
        with pytest.raises(WorkbenchError, match=r"computes something else|has 2 logits, the model before growth 3") as caught:
            same_logits(old, new, 1e-6, "grow", agrees=agrees)
        assert caught.value.exit_code == 3


def test_what_is_drawn_differs_from_tensor_to_tensor_and_from_seed_to_seed(project: Project) -> None:
    """The recipe's seed and the tensor's name decide it; the same recipe draws the same."""
    step = "steps: [{grow: width, neurons: 60, check: off}]\n"
    drawn = {seed: project.tensors(f"{step}seed: {seed}\n") for seed in (0, 1)}
    name = "model.layers.{}.mlp.up_proj.weight"
    added = [drawn[seed][name.format(layer)][48:] for seed in (0, 1) for layer in (0, 1)]
    assert all(not torch.equal(one, other) for i, one in enumerate(added) for other in added[:i])
    assert torch.equal(project.tensors(f"{step}seed: 1\n")[name.format(1)][48:], added[3])
