"""`brick extract` on bases as published, with experts, encoders and layers that PEFT saves whole: PEFT's own load and merge is the fine-tune."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import save_file

from worlds.family import build, error_of
from worlds.family_walk import _words
from worlds.project import CPU
from worlds.published_bases import Base, as_published
from worlds.published_pairs import cells, entries, live, noisy, saved
from worlds.tiny import tensors_of

from workbench.adapters.approximate import AdaptedWeights, Policy
from workbench.adapters.bind import bind
from workbench.adapters.export import write_adapter
from workbench.adapters.live import JoinedSource
from workbench.adapters.lora import Spot
from workbench.adapters.read import Adapter
from workbench.bricks.brick import Brick
from workbench.bricks.fitting import fitted
from workbench.ground.errors import WorkbenchError
from workbench.models.layout import Model
from workbench.run.device import Work
from workbench.run.loading import adapter_hints
from workbench.upkeep.extract import Extraction, extract
from workbench.weights.checkpoint import Checkpoint
from workbench.weights.lowrank import Factors
from workbench.weights.specs import BLOCK_ELEMENTS, load

KNOWN = entries()
FAMILIES = {
    "qwen3_moe": "experts.gate_up_proj",
    "qwen2_moe": "shared_expert.gate_proj.weight",  # PEFT takes the module's name for that of an expert
    "mixtral": "experts.down_proj",
    "deepseek_v3": "shared_experts.up_proj.weight",
    "gpt_oss": "experts.gate_up_proj_bias",
    "llama4": "experts.gate_up_proj",
    "granitemoe": None,
    "qwen3_next": "experts.gate_up_proj",
    "jamba": "experts.down_proj",
    "qwen2_5_vl": None,
    "qwen3_vl_moe": "experts.down_proj",
    "gemma3": None,
    "llava": None,
    "qwen3_omni": "experts.gate_up_proj",
}
"""Family -> end of a parameter that its adapter must name, or None."""


def tuned_on(name: str, folder: Path) -> tuple[Base, Any]:
    """Return a base as published, and its fine-tune, saved in one/."""
    if name not in KNOWN:
        pytest.skip("the families as published are not beside the checkout")
    base = as_published(name, KNOWN[name], folder)
    model = noisy(live(base.kind, base.trained)[0], 1)
    saved(model, folder / "one")
    return base, model


def taken(folder: Path, rank: int | None, out: str = "made", **policy: Any) -> Extraction:
    """Extract an adapter of one/."""
    options = Policy(rank, dense="approximate", **policy)
    return extract("one", "base", folder / out, options, Work(CPU, 1), project=folder)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava", "qwen3_omni", "llama4", "qwen3_moe"])
def test_the_printed_call_loads_the_adapter_whole(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """AutoModelForCausalLM refuses the first three bases, and of Llama 4 it loads a part, in which PEFT would miss the adapter's keys."""
    import peft
    import transformers

    tuned_on(name, tmp_path)
    taken(tmp_path, 2)
    monkeypatch.chdir(tmp_path)
    (line,) = adapter_hints("base", "made", "base")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        loaded = eval(
            line.removeprefix("load:   "),
            {name: getattr(transformers, name) for name in dir(transformers) if name.startswith("AutoModelFor")}
            | {"PeftModel": peft.PeftModel},
        )
    assert loaded.get_model_status().available_adapters == ["default"]


@pytest.mark.parametrize("name", FAMILIES)
def test_peft_loads_what_was_extracted(name: str, tmp_path: Path) -> None:
    from peft import PeftModel

    base, tuned = tuned_on(name, tmp_path / "project")
    record = taken(tmp_path / "project", 4096)
    assert record.error < 1e-5
    made = tmp_path / "project" / "made"
    merged = PeftModel.from_pretrained(live(base.kind, base.trained)[0], made).merge_and_unload().state_dict()
    for key, tensor in tuned.state_dict().items():
        if tensor.is_floating_point():
            assert error_of(merged[key], tensor) < 1e-5, key
    config = json.loads((made / "adapter_config.json").read_text("utf-8"))
    parameters = config["target_parameters"] or []
    wanted = FAMILIES[name]
    assert wanted is None or any(parameter.endswith(wanted) for parameter in parameters), parameters


@pytest.mark.parametrize("name", ["mixtral", "qwen3_vl_moe", "gpt_oss", "granitemoe"])
def test_every_expert_has_its_best_rank_and_what_is_scored_is_what_is_written(name: str, tmp_path: Path) -> None:
    """Eckart-Young for every expert of a stack; `AdaptedWeights`, which `output: {form: adapter}` scores, is the base with the adapter."""
    base, tuned = tuned_on(name, tmp_path / "project")
    record = taken(tmp_path / "project", 8)
    start, after = live(base.kind, base.trained)[0].state_dict(), tuned.state_dict()
    checkpoint = Checkpoint(tmp_path / "project/base", "base")
    model = Model(checkpoint, checkpoint.config)
    brick = Brick("one", "checkpoint", tmp_path / "project/one")
    adapted = AdaptedWeights(Model(fitted(brick, model), model.config), model, Policy(8, dense="approximate"))
    stacks = {
        unit: place.name for unit, place in adapted.live.places.items() if len(place.shape) == 3 and "experts" in place.name
    }
    assert len(stacks) == 2 * model.layout.depth
    for unit, key in stacks.items():
        values = torch.linalg.svdvals((after[key] - start[key]).double())
        best = values[:, 8:].square().sum().sqrt() / values.square().sum().sqrt()
        assert record.tensors[unit].rank == 8
        assert record.tensors[unit].error == pytest.approx(float(best), abs=1e-5)
    bound = bind(Adapter(tmp_path / "project/made", "made"), checkpoint.specs, model)
    for key in checkpoint.specs:
        source, spec = bound.updated(checkpoint, key, checkpoint.open(key, CPU), CPU), checkpoint.specs[key]
        scored, written = load(adapted, key, torch.float32).view(spec.rows, spec.cols), torch.empty(spec.rows, spec.cols)
        for first, last in spec.blocks(BLOCK_ELEMENTS):
            source.read(first, last, written[first:last])
        torch.testing.assert_close(scored, written, rtol=0, atol=2e-6)


def test_experts_of_other_ranks_fill_the_stack(tmp_path: Path) -> None:
    """One expert moves by rank one, one not at all: the stack has the largest rank that the error asks for."""
    base, _ = tuned_on("mixtral", tmp_path / "project")
    start, draw = tensors_of(base.trained), torch.Generator().manual_seed(5)
    first = next(key for key in start if ".experts.0.w2." in key)
    second = first.replace(".experts.0.", ".experts.1.")
    moved = {first: rank_of(start[first], 1, draw), second: rank_of(start[second], 3, draw)}
    save_file({**start, **moved}, tmp_path / "project/one/model.safetensors", metadata={"format": "pt"})
    record = taken(tmp_path / "project", None, error=0.05)
    ((unit, part),) = record.tensors.items()
    assert unit.endswith("layers.0.mlp.experts.down_proj")
    assert part.rank == 3
    assert part.error < 0.05
    assert record.whole == []
    assert record.plain is False


def test_ranks_of_their_own_are_those_that_peft_loads(tmp_path: Path) -> None:
    """Padding to one rank would more than double the file, so `rank_pattern` names modules and parameters."""
    from peft import PeftModel

    folder, draw = tmp_path / "project", torch.Generator().manual_seed(6)
    base, _ = tuned_on("qwen2_moe", folder)
    start = tensors_of(base.trained)
    ranks = {"layers.0.mlp.experts.0.down_proj": 1, "layers.1.self_attn.q_proj": 20, "layers.1.mlp.shared_expert.up_proj": 2}
    moved = {
        key: rank_of(t, rank, draw) for key, t in start.items() for end, rank in ranks.items() if key.endswith(f"{end}.weight")
    }
    assert len(moved) == 3
    save_file({**start, **moved}, folder / "one/model.safetensors", metadata={"format": "pt"})
    record = taken(folder, None, error=1e-3)
    assert sorted(part.rank for part in record.tensors.values()) == [1, 2, 20]
    pattern = json.loads((folder / "made/adapter_config.json").read_text("utf-8"))["rank_pattern"]
    assert {key.partition("layers.")[2]: rank for key, rank in pattern.items()} == {
        "0.mlp.experts.down_proj": 1,
        "1.mlp.shared_expert.up_proj.weight": 2,
    }
    merged = PeftModel.from_pretrained(live(base.kind, base.trained)[0], folder / "made").merge_and_unload().state_dict()
    for key, tensor in live(base.kind, folder / "one")[0].state_dict().items():
        assert error_of(merged[key], tensor) < 2e-3, key


def rank_of(tensor: torch.Tensor, rank: int, draw: torch.Generator) -> torch.Tensor:
    """Return a tensor that moved by a matrix of a rank."""
    left, right = (torch.randn(*shape, generator=draw) for shape in ((tensor.shape[0], rank), (rank, tensor.shape[1])))
    return tensor.float() + left @ right


def test_parameters_that_peft_cannot_save_alone(tmp_path: Path) -> None:
    """Sinks of gpt-oss lie in the attention module: it is saved whole if they move, and factored if they do not or are dropped."""
    folder = tmp_path / "project"
    base, _ = tuned_on("gpt_oss", folder)
    record = taken(folder, 4)
    attention = {key for key in record.whole if ".self_attn." in key}
    assert {key.rpartition("self_attn.")[2] for key in attention} >= {"sinks", "q_proj.weight", "o_proj.bias"}
    dropped = taken(folder, 4, rest="drop", out="dropped")
    assert {key for key in dropped.tensors if key.endswith("q_proj.weight")}
    assert any(key.endswith("sinks") for key in dropped.dropped)
    with pytest.raises(WorkbenchError, match="differs from the base and is not the weight of a linear layer"):
        taken(folder, 4, rest="refuse", out="refused")
    start, tuned = tensors_of(base.trained), tensors_of(folder / "one")
    still = {key: start[key] if key.endswith("sinks") else tensor for key, tensor in tuned.items()}
    save_file(still, folder / "one/model.safetensors", metadata={"format": "pt"})
    assert not any(key.endswith("q_proj.weight") for key in taken(folder, 4, out="still").whole)


@pytest.mark.skipif("qwen3_omni" not in KNOWN, reason="the families as published are not beside the checkout")
def test_an_omni_model_takes_its_thinker_saved_alone_and_a_lora_on_it(tmp_path: Path) -> None:
    found = cells("qwen3_omni", KNOWN["qwen3_omni"], tmp_path / "project")
    assert {pair: found[pair].status for pair in ("lora", "text", "extract")} == dict.fromkeys(
        ("lora", "text", "extract"), "exact"
    )
    assert "Thinker" in found["lora"].said
    assert "Thinker" in found["text"].said


def test_a_tensor_that_the_live_model_splits(tmp_path: Path) -> None:
    """HRM's file joins gate and up, which are two layers: one moves by rank two, the other is dense and saved whole."""
    folder = tmp_path / "project"
    family = build("hrm_text", "HrmTextForCausalLM", folder, {})
    start, draw = tensors_of(folder / "base"), torch.Generator().manual_seed(3)
    joined = next(key for key in start if key.endswith("mlp.gate_up_proj.weight"))
    half = start[joined].shape[0] // 2
    dense = start[joined][half:] + torch.randn(half, start[joined].shape[1], generator=draw)
    moved = torch.cat([rank_of(start[joined][:half], 2, draw), dense])
    shutil.copytree(folder / "base", folder / "one")
    save_file({**start, joined: moved}, folder / "one/model.safetensors", metadata={"format": "pt"})
    checkpoint, tuned = (Checkpoint(folder / name, name) for name in ("base", "one"))
    adapted = AdaptedWeights(Model(tuned, tuned.config), Model(checkpoint, checkpoint.config), Policy(None, dense="whole"))
    gate, up = adapted.live.units[joined]
    assert (gate.rpartition("mlp.")[2], up.rpartition("mlp.")[2]) == ("gate_proj.weight", "up_proj.weight")
    assert (adapted.part(gate, CPU).kind, adapted.part(up, CPU).kind) == ("lora", "whole")
    torch.testing.assert_close(load(adapted, joined, torch.float32), moved, rtol=0, atol=1e-5)
    assert torch.equal(load(adapted.before, up, torch.float32), start[joined][half:])
    record = taken(folder, 64)
    assert set(record.tensors) == {gate, up}
    model = family.kind.from_pretrained(folder / "base")
    from peft import PeftModel

    merged = PeftModel.from_pretrained(model, folder / "made").merge_and_unload().state_dict()
    assert error_of(merged[gate], moved[:half]) < 1e-5
    assert error_of(merged[up], moved[half:]) < 1e-5


def test_parts_of_columns_and_transposes_are_read_as_one(tmp_path: Path) -> None:
    """A stack of two experts: one is in some columns of a file's tensor, one is stored transposed; rows are read in any pieces."""
    first, second = torch.arange(24.0).view(4, 6), torch.arange(100.0, 112.0).view(3, 4)
    save_file({"a": first, "b": second}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text("{}", "utf-8")
    spots = (
        Spot("a", 0, 3, 0, (0, 4), (0, 3), swap=False),
        Spot("b", 0, 0, 1, (0, 4), (0, 3), swap=True),
    )
    source = JoinedSource(Checkpoint(tmp_path, "x"), (2, 4, 3), spots, CPU)
    wanted = torch.cat([first[:, 3:], second.T])
    for start, stop in ((0, 8), (2, 7), (5, 6)):
        out = torch.empty(stop - start, 3)
        source.read(start, stop, out)
        assert torch.equal(out, wanted[start:stop])


@pytest.mark.parametrize("name", ["mixtral", "qwen3_omni"])
def test_recipes_write_such_adapters_too(name: str, tmp_path: Path) -> None:
    from peft import PeftModel

    base, tuned = tuned_on(name, tmp_path / "project")
    recipe = "bricks: {one: {checkpoint: one}}\nsteps: [{merge: task_arithmetic, bricks: {one: 1.0}}]\n"
    with patch("transformers.AutoTokenizer.from_pretrained", _words):
        document = base.project.run(recipe + "output: {form: adapter, rank: 256, dtype: float32}\n")
    merged = PeftModel.from_pretrained(live(base.kind, base.trained)[0], document["adapter"]).merge_and_unload().state_dict()
    for key, tensor in tuned.state_dict().items():
        if tensor.is_floating_point():
            assert error_of(merged[key], tensor) < 1e-5, key


def test_an_update_of_shared_experts_is_one_in_peft(tmp_path: Path) -> None:
    """As `target_modules`, PEFT takes the layer for experts, finds no keys of theirs and changes nothing."""
    from peft import PeftModel

    base, _ = tuned_on("deepseek_v3", tmp_path)
    model = live(base.kind, base.trained)[0]
    name = next(n for n, _ in model.named_parameters() if n.endswith("shared_experts.down_proj.weight"))
    before = model.state_dict()[name].clone()
    draw = torch.Generator().manual_seed(0)
    update = Factors(torch.randn(before.shape[0], 2, generator=draw), torch.randn(2, before.shape[1], generator=draw))
    write_adapter(tmp_path / "edit", {name: update}, "base", mixture=True)
    merged = PeftModel.from_pretrained(model, tmp_path / "edit").merge_and_unload().state_dict()
    torch.testing.assert_close(merged[name], before + update.left @ update.right, atol=1e-5, rtol=0)
