"""Split: all experts compute what the dense model does; some of them compute what the dense model does with the other neurons off."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from worlds.mixtures import live, save_mixture, write_lines
from worlds.project import CPU, Project
from worlds.tiny import edit_json, tensors_of

from workbench.activations.feedforward import feed_forward_layers
from workbench.activations.partition import LayerPartition, Partition
from workbench.activations.selectors import Linear, selecting
from workbench.activations.sites import find_sites
from workbench.ground.errors import WorkbenchError
from workbench.run.compose import compose

WHOLE = [
    ("mistral", "mixtral"),
    ("qwen2", "qwen2_moe"),
    ("qwen2 whole", "glm4_moe"),
    ("qwen3", "qwen3_moe"),
    ("olmo2", "flex_olmo"),
    ("granite", "granitemoe"),
    ("ernie4_5", "ernie4_5_moe"),
]
TOKENS = torch.randint(2, 60, (2, 30), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def world(project: Project, dense_of: Callable[[str], Path]) -> Callable[[str], Path]:
    """Family -> its dense model; "qwen2 whole" is qwen2 without its sliding window. `texts.jsonl` has calibration texts."""
    write_lines(project.path / "texts.jsonl", lines=40)

    def get(family: str) -> Path:
        if family != "qwen2 whole":
            return dense_of(family)
        out = project.path / "qwen2-whole"
        shutil.copytree(dense_of("qwen2"), out, dirs_exist_ok=True)
        edit_json(out / "config.json", use_sliding_window=False, sliding_window=None, layer_types=["full_attention"] * 3)
        return out

    return get


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        made: torch.Tensor = model(TOKENS).logits
    return made


def recipe(base: Path, **fields: Any) -> str:
    step = {"grow": "split_ffn", "experts": 6, **fields}
    return f"base: {base}\nsteps: [{yaml.safe_dump(step, default_flow_style=True, width=10_000).strip()}]\n"


@pytest.mark.parametrize(("family", "target"), WHOLE)
def test_all_experts_compute_the_same(family: str, target: str, project: Project, world: Callable[[str], Path]) -> None:
    """Checked by `run`, with the reload by transformers; and once more on what it wrote. No texts are needed."""
    document = project.run(recipe(world(family), top_k=6, into=target))
    check = document["steps"][0]["check"]
    assert check["same_generation"]
    assert check["reloaded"]
    grown = live(document["model"])
    assert grown.config.model_type == target
    before = logits(live(world(family)))
    assert float((before - logits(grown)).abs().max()) <= 1e-5 * max(1.0, float(before.abs().max()))


@pytest.mark.parametrize("shared", [0, 2])
def test_experts_have_the_old_neurons(shared: int, project: Project, world: Callable[[str], Path]) -> None:
    """Rows and columns are the dense ones bit for bit, each once; without a factor in the architecture, columns are times top_k."""
    document = project.run(recipe(world("llama"), top_k=4, method="kmeans", shared=shared, calibration="texts.jsonl"))
    old, new = tensors_of(world("llama")), tensors_of(Path(document["model"]))
    dense = [old[f"model.layers.1.mlp.{part}_proj.weight"] for part in ("gate", "up", "down")]
    if shared:
        names = ["shared_experts", *(f"experts.{e}" for e in range(4))]
        parts = [[new[f"model.layers.1.mlp.{n}.{p}_proj.weight"] for n in names] for p in ("gate", "up", "down")]
    else:
        parts = [[new[f"model.layers.1.block_sparse_moe.experts.{e}.{w}.weight"] for e in range(6)] for w in ("w1", "w3", "w2")]
    gate, up, down = (torch.cat(of, int(i == 2)) for i, of in enumerate(parts))
    order = [int((dense[0] == row).all(1).nonzero()) for row in gate]
    assert sorted(order) == list(range(48))
    assert torch.equal(up, dense[1][order])
    assert torch.equal(down, dense[2][:, order] * (1 if shared else 4))
    kept = document["steps"][0]["check"]["kept"]
    assert kept["with_additions"] >= 2 * 3 * 4, "old rows are compared in the files"


def partition_of(model: Any, shared: list[int], beside: int) -> tuple[Partition, Linear]:
    """The partition and the router of a glm4_moe model, from its own weights: the shared module's experts come first."""
    layers, rows = {}, []
    for number, layer in enumerate(model.model.layers):
        size = layer.mlp.experts.gate_up_proj.shape[1] // 2
        experts = torch.arange(size * (beside + len(layer.mlp.experts.gate_up_proj))).reshape(-1, size)
        layers[number] = LayerPartition(experts, shared[number])
        own = layer.mlp.gate.weight.detach()
        rows.append(torch.cat([torch.zeros(beside, own.shape[1]), own]))
    return Partition("", layers), Linear("centroid", tuple(rows))


@pytest.mark.parametrize(
    "fields",
    [
        {"method": "cmoe", "top_k": 4},
        {"method": "kmeans", "shared": 1, "top_k": 3, "router": "ridge"},
    ],
)
def test_some_experts_are_the_dense_model_without_the_others(
    fields: dict[str, Any], project: Project, world: Callable[[str], Path]
) -> None:
    """Against the dense model with its neurons in the order of the experts, of which only the selected ones add to the output.

    The weights of the selected experts differ by at most a thousandth, and the choice is the same but for near ties, which float32 does
    not tell apart behind the sigmoid.
    """
    document = project.run(recipe(world("llama"), calibration="texts.jsonl", **fields))
    step, grown = document["steps"][0], live(document["model"])
    shared = step["split"]["shared"]
    beside = {"cmoe": 2, "kmeans": 1}[fields["method"]]
    assert shared == [beside] * 3
    assert step["split"]["captured"]["router"] <= step["split"]["captured"]["oracle"]
    dense = live(world("llama"))
    with torch.no_grad():
        for layer, mixed in zip(dense.model.layers, grown.model.layers, strict=True):
            fused, out, fixed = mixed.mlp.experts.gate_up_proj, mixed.mlp.experts.down_proj, mixed.mlp.shared_experts
            gates, ups = fused.chunk(2, dim=1)
            layer.mlp.gate_proj.weight.copy_(torch.cat([fixed.gate_proj.weight, gates.flatten(0, 1)]))
            layer.mlp.up_proj.weight.copy_(torch.cat([fixed.up_proj.weight, ups.flatten(0, 1)]))
            layer.mlp.down_proj.weight.copy_(torch.cat([fixed.down_proj.weight, *out], 1))
    unchanged = logits(live(world("llama")))
    torch.testing.assert_close(logits(dense), unchanged, atol=1e-4, rtol=1e-5)  # the same neurons in another order
    layers = feed_forward_layers(dense, find_sites(dense, 3, CPU))
    partition, router = partition_of(grown, shared, beside)
    count = fields.get("top_k", 4)
    with selecting(dense, layers, partition, router, count):
        expected = logits(dense)
    largest = float(expected.abs().max())
    assert float((expected - unchanged).abs().max()) > 0.02 * largest
    differs = (logits(grown) - expected).abs().amax(-1) / largest
    assert float(differs.median()) < 1e-3
    assert int((differs > 3e-3).sum()) <= 3, f"more than near ties: {differs.flatten().sort().values[-9:].tolist()}"


def test_a_measured_split_is_kept(project: Project, world: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    text = recipe(world("llama"), top_k=4, method="cmoe", calibration="texts.jsonl")
    first = project.tensors(text)
    monkeypatch.setattr("workbench.grow.mixtures.split.divide", lambda *_, **__: pytest.fail("divided again"))
    again = project.tensors(text)
    assert all(torch.equal(again[name], tensor) for name, tensor in first.items())


def test_routers_can_be_trained(project: Project, world: Callable[[str], Path]) -> None:
    """Only the routers are new, so training changes nothing else."""
    text = recipe(world("llama"), top_k=3, calibration="texts.jsonl", check="tensors")
    plain = project.tensors(text)
    trained = project.tensors(text.replace("}]", ", train: {data: texts.jsonl, steps: 3, parameters: routers}}]"))
    changed = {name for name, tensor in trained.items() if not torch.equal(tensor, plain[name])}
    assert changed == {f"model.layers.{n}.block_sparse_moe.gate.weight" for n in range(3)}


def test_bricks_after_a_split_are_refused(project: Project) -> None:
    text = "bricks: {one: bricks/one}\nsteps: [{grow: split_ffn, experts: 6, top_k: 6}, {merge: task_arithmetic}]\n"
    with pytest.raises(WorkbenchError, match="whose shape step grow-split_ffn has changed") as error:
        compose(project.resolve(text), CPU)
    assert error.value.exit_code == 2
    before = text.replace(
        "[{grow: split_ffn, experts: 6, top_k: 6}, {merge: task_arithmetic}]",
        "[{merge: task_arithmetic}, {grow: split_ffn, experts: 6, top_k: 6}]",
    )
    compose(project.resolve(before), CPU)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"experts": 5, "top_k": 5}, "layer 0 has 48 neurons, which 5 experts do not divide into equal parts"),
        ({"experts": 12, "top_k": 12}, "12 experts have 4 neurons each, and .* multiple of 8"),
        ({}, "top_k"),
        ({"top_k": 7}, "expected top_k of at most 6, the number of experts; found 7"),
        ({"top_k": 4}, "a router that selects experts needs `calibration`"),
        ({"top_k": 6, "method": "cmoe"}, "`method: cmoe` needs `calibration`"),
        ({"top_k": 6, "shared": 1}, "`shared` needs `calibration`"),
        ({"top_k": 4, "shared": 4, "calibration": "texts.jsonl"}, "expected fewer shared experts than the 4"),
        ({"top_k": 4, "calibration": "text.jsonl"}, "text.jsonl does not exist"),
        ({"top_k": 6, "into": "olmoe"}, "llama cannot become olmoe without changing its function"),
        (
            {"top_k": 4, "method": "cmoe", "calibration": "texts.jsonl", "into": "mixtral"},
            "mixtral has no experts that serve every",
        ),
        ({"top_k": 6, "shared": 5, "calibration": "texts.jsonl"}, "leaves 1 expert to the router"),
    ],
)
def test_bad_steps(fields: dict[str, Any], message: str, project: Project, world: Callable[[str], Path]) -> None:
    with pytest.raises(WorkbenchError, match=message) as error:
        compose(project.resolve(recipe(world("llama"), **fields)), CPU)
    assert error.value.exit_code == 2


def test_models_that_cannot_be_split(project: Project, world: Callable[[str], Path]) -> None:
    mixture = save_mixture("mixtral", project.path / "mixtral")
    cases = [
        (recipe(mixture, top_k=6), "model_type mixtral is a mixture of experts already"),
        (recipe(world("gpt2"), top_k=6), "model_type gpt2 has no mixture-of-experts counterpart"),
        (recipe(world("mistral"), top_k=4, shared=1, calibration="texts.jsonl"), "glm4_moe has no sliding window"),
        (recipe(world("olmo2"), top_k=4, shared=1, calibration="texts.jsonl"), "flex_olmo has no experts that serve every token"),
    ]
    for text, message in cases:
        with pytest.raises(WorkbenchError, match=message):
            compose(project.resolve(text), CPU)
