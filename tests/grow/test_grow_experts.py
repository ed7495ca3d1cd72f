"""Experts: a dense model as a mixture that computes the same, and bricks as experts behind a router that finds them."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from worlds.mixtures import live
from worlds.project import CPU, Project
from worlds.tiny import WORDS, tensors_of

from workbench.ground.errors import WorkbenchError
from workbench.run.compose import compose

PAIRS = [("mistral", "mixtral"), ("qwen2", "qwen2_moe"), ("qwen3", "qwen3_moe"), ("olmo2", "flex_olmo"), ("llama", "granitemoe"),
         ("ernie4_5", "ernie4_5_moe")]  # fmt: skip


@pytest.mark.parametrize(("family", "target"), PAIRS)
def test_copies_compute_the_same(family: str, target: str, project: Project, dense_of: Callable[[str], Path]) -> None:
    """Checked by `run`, cached generation included, and once more on what it wrote; then with experts that differ."""
    head = f"base: {dense_of(family)}\n"
    document = project.run(f"{head}steps: [{{grow: experts, experts: 4, into: {target}}}]\n")
    assert document["steps"][0]["check"]["same_generation"]
    grown = live(document["model"])
    assert grown.config.model_type == target
    tokens = torch.randint(2, 60, (2, 30), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = live(dense_of(family))(tokens).logits
        assert float((before - grown(tokens).logits).abs().max()) <= 1e-5 * max(1.0, float(before.abs().max()))
        drawn = project.run(
            f"{head}steps: [{{grow: experts, experts: 4, into: {target}, redraw: 0.5, check: off}}]\n", "drawn.yaml"
        )
        assert float((before - live(drawn["model"])(tokens).logits).abs().max()) > 1e-3


def test_redrawn_neurons(project: Project, dense_of: Callable[[str], Path]) -> None:
    """Half of an expert's neurons are others, the same ones in its three matrices, with the old spread; experts differ."""
    base = tensors_of(dense_of("llama"))
    grown = project.tensors(f"base: {dense_of('llama')}\nsteps: [{{grow: experts, experts: 3, redraw: 0.5}}]\n")
    old = {"w1": "gate", "w3": "up", "w2": "down"}
    changed = {}
    for expert in range(3):
        for part, dense in old.items():
            new, before = (
                grown[f"model.layers.1.block_sparse_moe.experts.{expert}.{part}.weight"],
                base[f"model.layers.1.mlp.{dense}_proj.weight"],
            )
            differs = (new != before).any(0 if part == "w2" else 1)
            changed[expert, part] = differs.nonzero().flatten().tolist()
            if expert:
                drawn = new[:, differs] if part == "w2" else new[differs]
                assert float(drawn.std()) == pytest.approx(float(before.std()), rel=0.15)
    assert changed[0, "w1"] == changed[0, "w2"] == []
    assert len(changed[1, "w1"]) == 24
    assert changed[1, "w1"] == changed[1, "w2"] == changed[1, "w3"] != changed[2, "w1"]


# -- bricks as experts


@pytest.fixture
def mixed(project: Project) -> Project:
    """Texts of disjoint words for two bricks and for the anchor."""
    draw = random.Random(0)
    for i, name in enumerate(("one", "two", "anchor")):
        words = WORDS[2 + 6 * i : 8 + 6 * i]
        lines = [json.dumps({"text": " ".join(draw.choices(words, k=12))}) for _ in range(60)]
        (project.path / f"{name}.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    return project


BRICKS = "bricks: {one: bricks/one, two: bricks/two}\n"
MIX = "{grow: experts, bricks: {one: {weight: 0.5, calibration: one.jsonl}, two: {calibration: two.jsonl}}, calibration: anchor.jsonl, gate: ridge, top_k: 1}"


def test_bricks_become_experts(mixed: Project) -> None:
    """An expert is the base's layer with a brick's weighted delta; the rest is what the steps before have made."""
    grown = mixed.tensors(f"{BRICKS}steps: [{MIX}]\n")
    base = mixed.tensors("name: plain\n")
    one = mixed.tensors(BRICKS + "steps: [{merge: task_arithmetic, bricks: {one: 0.5}}]\n")
    two = mixed.tensors(BRICKS + "steps: [{merge: task_arithmetic, bricks: {two: 1}}]\n")
    name = "model.layers.2.mlp.down_proj.weight"
    for number, expected in enumerate((base, one, two)):
        assert torch.equal(grown[f"model.layers.2.block_sparse_moe.experts.{number}.w2.weight"], expected[name])
    assert not torch.equal(one[name], base[name])
    query = "model.layers.2.self_attn.q_proj.weight"
    assert torch.equal(grown[query], base[query])
    mean = "{merge: average, where: {exclude: ['*.mlp.*']}}"
    after = mixed.tensors(f"{BRICKS}steps: [{mean}, {MIX}]\n")
    averaged = mixed.tensors(BRICKS + "steps: [{merge: average}]\n")
    assert torch.equal(after[query], averaged[query])
    assert torch.equal(after["model.layers.2.block_sparse_moe.experts.1.w2.weight"], one[name])


def test_the_router_finds_the_expert(mixed: Project) -> None:
    """On an expert's texts the mixture computes what that expert alone does; a random router does not."""
    document = mixed.run(f"{BRICKS}steps: [{MIX}]\noutput: {{dtype: float32}}\n")
    gate = document["steps"][0]["gate"]
    assert min(gate["found"].values()) > 0.95
    assert set(gate["found"]) == {"anchor", "one", "two"}
    assert len(gate["found_by_layer"]) == 4
    assert gate["used"].keys() == gate["found"].keys()
    assert sum(gate["used"].values()) == pytest.approx(1, abs=1e-3)
    assert all(share == pytest.approx(1 / 3, abs=0.02) for share in gate["used"].values())  # texts of one length, all found
    alone = "{{merge: task_arithmetic, bricks: {{{}}}, where: {{include: ['*.mlp.*']}}}}"
    dense = {
        "one": mixed.run(BRICKS + f"steps: [{alone.format('one: 0.5')}]\noutput: {{dtype: float32}}\n", "one.yaml")["model"],
        "two": mixed.run(BRICKS + f"steps: [{alone.format('two: 1')}]\noutput: {{dtype: float32}}\n", "two.yaml")["model"],
    }
    chance = mixed.run(f"{BRICKS}steps: [{MIX.replace('gate: ridge, ', '')}]\noutput: {{dtype: float32}}\n", "chance.yaml")[
        "model"
    ]
    mixture, drawn = live(document["model"]), live(chance)
    for i, (_, path) in enumerate(dense.items()):
        tokens = torch.randint(2 + 6 * i, 8 + 6 * i, (8, 12), generator=torch.Generator().manual_seed(5))
        with torch.no_grad():
            expected = live(path)(tokens).logits
            near, far = ((model(tokens).logits - expected).abs().amax(-1).median() for model in (mixture, drawn))
        assert near < 1e-4 < far


def test_a_solved_router_is_kept(mixed: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    resolved = mixed.resolve(f"{BRICKS}steps: [{MIX}]\n")
    compose(resolved, CPU)
    monkeypatch.setattr("workbench.grow.mixtures.gates._moments", lambda *_: pytest.fail("read again"))
    compose(mixed.resolve(f"{BRICKS}steps: [{MIX}]\n"), CPU)
    (mixed.path / "one.jsonl").write_text('{"text": "w1 w2 w3"}\n' * 9, "utf-8")
    assert mixed.resolve(f"{BRICKS}steps: [{MIX}]\n").keys != resolved.keys


def prompted(one: str, two: str, anchor: str = "w12 w13", more: str = "") -> str:
    """A mixture whose router is made from prompts."""
    return (f"{BRICKS}steps: [{{grow: experts, bricks: {{one: {{prompts: [{one}]}}, two: {{prompts: [{two}]{more}}}}}, prompts: [{anchor}], "
            "gate: prompts, top_k: 1}]\noutput: {dtype: float32}\n")  # fmt: skip


def test_a_router_of_prompts(mixed: Project) -> None:
    """A row is the unit mean of what the router reads on the prompts, with the brick's feed-forward layers, less that on negative ones; all
    are divided by the temperature and the mean norm."""
    document = mixed.run(prompted("w0 w1 w2, w3 w4", "w6 w7, w8 w9 w10", more=", negative_prompts: [w0 w1 w12]"))
    gate = document["steps"][0]["gate"]
    assert gate["tokens"] == {"anchor": 2, "one": 5, "two": 5}
    assert gate["found_on_prompts"].keys() == gate["tokens"].keys()
    assert min(gate["found_on_prompts"].values()) > 0.5
    alone = "{{merge: task_arithmetic, bricks: {{{}: 1}}, where: {{include: ['*.mlp.*']}}}}"
    paths = {name: mixed.run(f"{BRICKS}steps: [{alone.format(name)}]\noutput: {{dtype: float32}}\n", f"{name}.yaml")["model"]
             for name in ("one", "two")}  # fmt: skip
    paths["anchor"] = mixed.run(f"{BRICKS}steps: []\noutput: {{dtype: float32}}\n", "plain.yaml")["model"]

    def read(name: str, *prompts: str) -> torch.Tensor:
        seen: list[torch.Tensor] = []
        model = live(paths[name])
        model.model.layers[2].mlp.gate_proj.register_forward_pre_hook(lambda _m, args: seen.append(args[0][0]))
        with torch.no_grad():
            for prompt in prompts:
                model(torch.tensor([[WORDS.index(word) for word in prompt.split()]]))
        return torch.cat(seen)

    def unit(x: torch.Tensor) -> torch.Tensor:
        return x.mean(0) / x.mean(0).norm()

    inputs = [read("anchor", "w12 w13"), read("one", "w0 w1 w2", "w3 w4"), read("two", "w6 w7", "w8 w9 w10")]
    rows = torch.stack([unit(x) for x in inputs])
    rows[2] -= unit(read("two", "w0 w1 w12"))
    expected = rows / torch.cat(inputs).norm(dim=1).mean() / 0.1
    assert torch.allclose(live(document["model"]).model.layers[2].mlp.gate.weight, expected, atol=1e-4)


def test_prompts_that_tell_nothing_apart(mixed: Project) -> None:
    """An anchor and a brick of weight 0 with one prompt; and negative prompts that take away all."""
    with pytest.raises(WorkbenchError, match="the prompts of the anchor and one give the same row of the router") as error:
        compose(
            mixed.resolve(prompted("w0 w1", "w6", "w0 w1").replace("{prompts: [w0 w1]}", "{weight: 0.0, prompts: [w0 w1]}")), CPU
        )
    assert error.value.exit_code == 2
    with pytest.raises(WorkbenchError, match="gate: prompts: two: prompts and negative prompts read the same"):
        compose(mixed.resolve(prompted("w0 w1", "w6", more=", negative_prompts: [w6]")), CPU)


def test_bricks_after_a_mixture(mixed: Project) -> None:
    """A later merge reaches the anchor; without one the feed-forward layers are gone, and the brick is named."""
    head = BRICKS.replace("}\n", ", three: bricks/three}\n")
    later = "{merge: task_arithmetic, bricks: {three: 1}}"
    after = mixed.tensors(f"{head}steps: [{MIX}, {later}]\n")
    three = mixed.tensors(f"{head}steps: [{later}]\n")
    name = "model.layers.2.mlp.down_proj.weight"
    assert torch.equal(after["model.layers.2.block_sparse_moe.experts.0.w2.weight"], three[name])
    alone = MIX.replace("calibration: anchor.jsonl", "anchor: off")
    with pytest.raises(
        WorkbenchError,
        match=r"brick 'three' changes \d+ tensors that step grow-experts has removed, such as model.layers.0.mlp.down_proj",
    ):
        mixed.tensors(f"{head}steps: [{alone}, {later}]\n")


REFUSED = {
    "{grow: experts}": "expected one of `experts: 4` and `bricks",
    "{grow: experts, experts: 2, bricks: {one: 1}}": "expected one of `experts: 4` and `bricks",
    "{grow: experts, bricks: {one: 1}, anchor: off}": "one brick needs `anchor: true`",
    "{grow: experts, experts: 2, top_k: 3}": "expected top_k of at most 2",
    "{grow: experts, experts: 4, norm_topk_prob: false}": "norm_topk_prob: no longer a field",
    "{grow: experts, experts: 4, gate: ridge}": "copies are all alike",
    "{grow: experts, bricks: {one: 1, two: 1}, gate: ridge}": "for the anchor (the step's `calibration`), one, two",
    "{grow: experts, experts: 4, gate: prompts}": "copies are all alike",
    "{grow: experts, bricks: {one: 1, two: {prompts: [w1]}}, gate: prompts}": "`gate: prompts` needs `prompts`, a list of texts, for the anchor (the step's `prompts`), one",
    "{grow: experts, bricks: {one: {prompts: ['']}}, prompts: [w1], gate: prompts}": "gate: prompts: one: the prompt '' has no token",
    "{grow: experts, bricks: {one: {calibration: nowhere.jsonl}}, calibration: one.jsonl, gate: ridge}": "nowhere.jsonl does not exist",
    "{grow: experts, bricks: {four: 1}}": "no brick 'four' under `bricks`",
    "{grow: experts, experts: 4, into: qwen2_moe}": "llama cannot become qwen2_moe without changing its function; expected mixtral, granitemoe",
}


@pytest.mark.parametrize("step", REFUSED)
def test_refused(step: str, mixed: Project) -> None:
    with pytest.raises(WorkbenchError, match=re.escape(REFUSED[step])):
        compose(mixed.resolve(f"{BRICKS}steps: [{step}]\n"), CPU)


@pytest.mark.parametrize("family", ["gpt2", "phi", "gemma2"])
def test_families_without_a_twin(family: str, project: Project, dense_of: Callable[[str], Path]) -> None:
    with pytest.raises(WorkbenchError, match=f"model_type {family} has no mixture-of-experts counterpart"):
        compose(project.resolve(f"base: {dense_of(family)}\nsteps: [{{grow: experts, experts: 2}}]\n"), CPU)
