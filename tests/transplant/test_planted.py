"""A permuted copy of a model: its units are found again, and the carried adapter computes what the original does."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from worlds.project import CPU
from worlds.tiny import live, save_finetuned

from workbench.ground.errors import WorkbenchError
from workbench.transplant.inputs import Wanted
from workbench.transplant.transplant import Transplant, transplant


def logits(model: Path, adapter: Path | None) -> torch.Tensor:
    """Logits of random tokens, with PEFT."""
    from peft import PeftModel

    tokens = torch.randint(2, 60, (4, 20), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return (PeftModel.from_pretrained(live(model), adapter).eval() if adapter else live(model))(tokens).logits


def carried(world: Any, to: str, out: Path, by: str, **more: Any) -> Transplant:
    folder = world.folder
    wanted = Wanted(folder / "lora", str(folder / to), str(folder / "base"), by, texts=folder / "texts.jsonl", **more)
    return transplant(wanted, out, project=folder, device=CPU)


def test_a_planted_permutation_is_recovered_exactly(planted_world: Any, tmp_path: Path) -> None:
    """At 5 % of noise on every weight, every unit of every module is matched with its own, sign included."""
    from safetensors.torch import load_file

    folder, planted = planted_world.folder, planted_world.planted
    report = carried(planted_world, "noisy", tmp_path / "out", "assign")
    old, new = (load_file(place / "adapter_model.safetensors") for place in (folder / "lora", tmp_path / "out"))
    assert len(new) == len(old) == 2 * report.modules == 56
    for name, tensor in new.items():
        neurons, module, factor = planted.neurons[int(name.split(".layers.")[1][0])], name.split(".")[-3], name.split(".")[-2]
        expected = old[name] * (2.0 if factor == "lora_A" else 1.0)  # alpha / rank is part of A
        if factor == "lora_A" and module != "o_proj":
            expected = (neurons if module == "down_proj" else planted.hidden).columns(expected)
        elif factor == "lora_B" and module == "gate_proj":
            expected = expected[neurons.order]
        elif factor == "lora_B" and module in ("up_proj", "o_proj", "down_proj"):
            expected = (neurons if module == "up_proj" else planted.hidden).rows(expected)
        assert torch.equal(tensor, expected), name
    # the same adapter on the copy without noise computes what the original computes
    difference = (logits(folder / "permuted", tmp_path / "out") - logits(folder / "base", folder / "lora")).abs().max()
    assert difference <= 1e-4
    assert report.match.matched > 0.9
    assert all(row.under < 0.01 for row in report.layers)


@pytest.mark.parametrize("by", ["assign", "ridge"])
def test_on_a_copy_the_adapter_computes_the_same(by: str, planted_world: Any, tmp_path: Path) -> None:
    folder = planted_world.folder
    report = carried(planted_world, "permuted", tmp_path / "out", by)
    expected, found = logits(folder / "base", folder / "lora"), logits(folder / "permuted", tmp_path / "out")
    if by == "assign":
        assert (found - expected).abs().max() <= 1e-4
    assert (found - expected).norm() < 0.1 * (logits(folder / "base", None) - expected).norm()
    assert report.loss.after == pytest.approx(report.loss.source_with_brick, abs=1e-5 if by == "assign" else 0.05)
    assert report.loss.before == pytest.approx(report.loss.source, abs=1e-5)
    assert report.match.matched > 0.97


@pytest.mark.parametrize("by", ["copy", "assign", "ridge"])
def test_unrelated_models_are_refused(by: str, planted_world: Any, tmp_path: Path) -> None:
    with pytest.raises(WorkbenchError) as error:
        carried(planted_world, "unrelated", tmp_path / "out", by)
    matched, chance = map(float, re.findall(r"0\.\d{3}", error.value.message)[:2])
    assert abs(matched - chance) < 0.05
    assert "match no better than by chance" in error.value.message
    assert "--force" in str(error.value.hint)
    assert not (tmp_path / "out").exists()


def test_random_pairs_of_positions_would_not_refuse_them(planted_world: Any) -> None:
    """Unrelated models read the same tokens, so their units correlate more than on positions that are paired at random."""
    from workbench.models.prompts import load_tokenizer
    from workbench.models.texts import read_texts
    from workbench.transplant.readings import matched, record, ridge

    folder = planted_world.folder
    tokenizer = load_tokenizer(folder / "base")
    rows = [tokenizer(text.answer)["input_ids"] for text in read_texts(folder / "texts.jsonl", "texts")]
    name, chosen = "model.layers.0.self_attn.q_proj", [list(range(1, len(row))) for row in rows]
    start, goal = (record(live(folder / model), [name], rows, chosen).inputs[name] for model in ("base", "unrelated"))
    mixed = start[torch.randperm(len(start), generator=torch.Generator().manual_seed(0))]
    cut = len(start) * 4 // 5
    real, random = (matched(ridge(s[:cut], goal[:cut], centered=False), s[cut:], goal[cut:]).mean() for s in (start, mixed))
    assert real > 0.3
    assert random.abs() < 0.1


def test_a_forced_adapter_says_so(planted_world: Any, tmp_path: Path) -> None:
    report = carried(planted_world, "unrelated", tmp_path / "out", "copy", force=True)
    assert report.forced
    assert not report.match.above
    assert "forced: true" in (tmp_path / "out" / "brick.yaml").read_text("utf-8")


def test_a_released_copy_takes_the_delta_as_it_is(planted_world: Any, tmp_path: Path) -> None:
    """`copy` to a model with noise writes the same product."""
    from safetensors.torch import load_file

    folder = planted_world.folder
    save_finetuned(folder / "base", tmp_path / "release", seed=3, scale=0.01)
    wanted = Wanted(folder / "lora", str(tmp_path / "release"), str(folder / "base"))
    report = transplant(wanted, tmp_path / "out", project=folder, device=CPU)
    assert (report.by, report.match, report.layer_rule) == ("copy", None, "same")
    old, new = (load_file(place / "adapter_model.safetensors") for place in (folder / "lora", tmp_path / "out"))
    for name in old:
        if "lora_A" in name:
            other = name.replace("lora_A", "lora_B")
            torch.testing.assert_close(new[other] @ new[name], 2.0 * old[other] @ old[name])
