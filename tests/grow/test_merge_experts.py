"""Experts that are merged into those that remain: groups, weights, matched neurons, and what the merged expert computes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from worlds.mixtures import EXPERTS, configs, live, random_tokens, rows_of, save_mixture, write_lines
from worlds.project import Project
from worlds.tiny import tensors_of

from workbench.errors import WorkbenchError
from workbench.grow.mixtures.merging import grouped
from workbench.grow.mixtures.usage import usage
from workbench.models.texts import TextRow
from workbench.run.compose import compose
from workbench.run.plan import plan

MERGE = "steps: [{grow: prune_experts, to: %d, average: frequency, calibration: texts.jsonl%s}]\n"


@pytest.fixture
def texts(project: Project) -> Project:
    """Return a project with texts.jsonl."""
    write_lines(project.path / "texts.jsonl")
    return project


def edited(base: Path, out: Path, change: Callable[[dict[str, torch.Tensor]], None], **fields: int) -> Path:
    """Return a copy of a model with changed tensors and fields of config.json."""
    from safetensors.torch import save_file

    shutil.copytree(base, out)
    tensors = {name: tensor.clone() for name, tensor in tensors_of(base).items()}
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, out / "model.safetensors", {"format": "pt"})
    config = json.loads((out / "config.json").read_text("utf-8")) | fields
    (out / "config.json").write_text(json.dumps(config), "utf-8")
    return out


def twins(tensors: dict[str, torch.Tensor]) -> None:
    """Make expert 4 a copy of expert 1 with its neurons in another order, and with nearly the same row of the router.

    Its logit is the larger one where it is positive, so that tokens select both.
    """
    order = torch.randperm(24, generator=torch.Generator().manual_seed(2))
    for name in list(tensors):
        if name.endswith(("gate.weight", "router.layer.weight")) and tensors[name].shape[0] == EXPERTS:
            tensors[name][4] = tensors[name][1] * (1 + 1e-5)
            tensors[name][[0, 2, 3, 5]] *= 2
        elif name.endswith("input_linear.weight"):
            tensors[name][4] = torch.cat([half[order] for half in tensors[name][1].chunk(2)])
        elif name.endswith("output_linear.weight"):
            tensors[name][4] = tensors[name][1][:, order]
        elif ".experts.4." in name:
            source = tensors[name.replace(".experts.4.", ".experts.1.")]
            tensors[name] = source[:, order] if name.endswith(("w2.weight", "down_proj.weight")) else source[order]


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "granitemoe"])
def test_a_permuted_twin_is_merged_into_the_same_function(family: str, texts: Project, tmp_path: Path) -> None:
    """Logits stay with one expert per token: both twins are selected, and their average has the neurons of the first."""
    base = edited(save_mixture(family, tmp_path / "whole"), tmp_path / "twins", twins, num_experts_per_tok=1)
    document = texts.run(f"base: {base}\n{MERGE % (5, '')}")
    record = document["steps"][0]
    for groups, shares in zip(record["groups"], record["usage"], strict=True):
        assert sorted(next(group for group in groups if len(group) > 1)) == [1, 4]
        assert min(shares[1], shares[4]) > 0, "tokens select both twins"
    before, after, tokens = live(base), live(document["model"]), random_tokens()
    with torch.no_grad():
        expected, found = before(tokens).logits, after(tokens).logits
    assert float((expected - found).abs().max()) <= 1e-4 * float(expected.abs().max())
    assert record["check"]["reloaded"]


def test_weights_groups_and_order_by_hand(texts: Project, tmp_path: Path) -> None:
    """A random mixture from six experts to two: everything that the step writes, computed in float64 from the live model."""
    from scipy.optimize import linear_sum_assignment

    base = save_mixture("mixtral", tmp_path / "whole")
    record = compose(texts.resolve(f"base: {base}\n{MERGE % (2, '')}"), torch.device("cpu")).records()[0]
    new, old = texts.tensors(f"base: {base}\n{MERGE % (2, '')}"), tensors_of(base)
    model, rows = live(base), rows_of(texts.path / "texts.jsonl")
    shares = usage(model, [TextRow(row, 0) for row in rows], torch.device("cpu")).shares
    logits: dict[int, list[torch.Tensor]] = {0: [], 1: []}
    for layer, module in enumerate(model.model.layers):
        weight = old[f"model.layers.{layer}.block_sparse_moe.gate.weight"]
        module.mlp.gate.register_forward_pre_hook(
            lambda _m, args, layer=layer, weight=weight: logits[layer].append(args[0].reshape(-1, 32) @ weight.T)
        )
    with torch.no_grad():
        for row in rows:
            model(torch.tensor([row]))
    assert any(len(group) > 2 for groups in record["groups"] for group in groups)
    for layer, groups in enumerate(record["groups"]):
        units = torch.nn.functional.normalize(torch.cat(logits[layer]).double(), dim=0)
        similar = units.T @ units
        kept = [group[0] for group in groups]
        assert kept == sorted(shares[layer].argsort(descending=True)[:2].tolist())
        at = f"model.layers.{layer}.block_sparse_moe"
        for number, group in enumerate(groups):
            first = {w: old[f"{at}.experts.{group[0]}.{w}.weight"].double() for w in ("w1", "w2", "w3")}
            total = sum(float(shares[layer][e]) for e in group)
            mean = {w: torch.zeros_like(m) for w, m in first.items()}
            for expert in group:
                assert expert in kept or similar[expert, group[0]] == similar[expert, kept].max()
                own = {w: old[f"{at}.experts.{expert}.{w}.weight"].double() for w in first}
                products = first["w1"] @ own["w1"].T + first["w3"] @ own["w3"].T + first["w2"].T @ own["w2"]
                order = linear_sum_assignment(-products.numpy())[1]
                for w, matrix in own.items():
                    mean[w] += float(shares[layer][expert]) / total * (matrix[:, order] if w == "w2" else matrix[order])
            for w, matrix in mean.items():
                assert torch.allclose(new[f"{at}.experts.{number}.{w}.weight"].double(), matrix, atol=1e-6)
            gate = sum(float(shares[layer][e]) / total * old[f"{at}.gate.weight"][e].double() for e in group)
            assert torch.allclose(new[f"{at}.gate.weight"][number].double(), gate, atol=1e-6)


def test_bias_of_the_selection_is_averaged(texts: Project, tmp_path: Path) -> None:
    """ernie4_5_moe has one number for each expert, as a row: [1, experts]."""
    base = save_mixture("ernie4_5_moe", tmp_path / "whole")
    text = f"base: {base}\n{MERGE % (3, '')}"
    new, old = texts.tensors(text), tensors_of(base)
    record = compose(texts.resolve(text), torch.device("cpu")).records()[0]
    name = "model.layers.0.mlp.moe_statics.e_score_correction_bias"
    shares = record["usage"][0]
    for number, group in enumerate(record["groups"][0]):
        mean = sum(shares[e] * old[name][0, e] for e in group) / sum(shares[e] for e in group)
        assert float(new[name][0, number]) == pytest.approx(float(mean), abs=1e-4)
    assert new[name].shape == (1, 3)


def test_the_measurement_is_kept(texts: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second run reads the merged experts from the cache. Without `average`, the key is another one."""
    base = save_mixture("mixtral", tmp_path / "whole")
    text = f"base: {base}\n{MERGE % (3, '')}"
    first = texts.tensors(text)
    monkeypatch.setattr("workbench.grow.prune_experts.usage", lambda *_: pytest.fail("counted again"))
    again = texts.tensors(text)
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert texts.resolve(text).keys != texts.resolve(text.replace("average: frequency, ", "")).keys


def test_groups() -> None:
    similarity = torch.tensor([[1.0, 0.1, 0.9, 0.2], [0.1, 1.0, 0.3, 0.8], [0.9, 0.3, 1.0, 0.0], [0.2, 0.8, 0.0, 1.0]])
    assert grouped([0, 1], similarity) == [[0, 2], [1, 3]]
    assert grouped([2, 3], similarity) == [[2, 0], [3, 1]]


@pytest.mark.parametrize("family", ["gpt_oss", "jetmoe"])
def test_experts_that_cannot_be_matched(family: str, texts: Project, tmp_path: Path) -> None:
    """gpt_oss interleaves the rows of two matrices, and jetmoe has experts in its attention; both can be removed."""
    assert family in configs()
    base = save_mixture(family, tmp_path / "whole")
    with pytest.raises(WorkbenchError, match=f"`average` does not know which rows .* are neurons .model_type {family}") as caught:
        plan(texts.resolve(f"base: {base}\n{MERGE % (3, '')}"), texts.path / "runs")
    assert caught.value.hint == "Leave `average` out: the experts are then removed."


@pytest.mark.parametrize(
    "fields",
    [
        "drop: [1], average: frequency",
        "keep: [[0, 1], [0, 1]], average: frequency",
        "to: 2, average: mean, calibration: texts.jsonl",
    ],
)
def test_bad_fields(fields: str, texts: Project) -> None:
    with pytest.raises(WorkbenchError) as caught:
        plan(texts.resolve(f"steps: [{{grow: prune_experts, {fields}}}]\n"), texts.path / "runs")
    said = json.dumps([str(caught.value), *map(str, getattr(caught.value, "problems", ()))])
    assert "average" in said
    assert "calibration" in said or "frequency" in said
