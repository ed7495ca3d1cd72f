"""Merges in forward order (FeatCal) and AIM beside dense float64 computations on whole models; laws and errors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from worlds.fuzzing import EXAMPLES, fuzz
from worlds.project import CPU, Project
from worlds.texts import save_other, words_tokenizer, write_rows
from worlds.tiny import save_finetuned, tensors_of

from workbench.ground.errors import WorkbenchError
from workbench.merge.aim import kept_share
from workbench.models.live import live_model
from workbench.models.texts import encode, read_texts
from workbench.run.compose import compose

FAMILIES = ["llama", "llama_untied", "qwen2", "gemma2", "gpt2", "gpt_neox"]
BRICKS = "bricks: {one: bricks/one, two: bricks/two}\n"
EACH = "bricks: {one: {weight: 1.0, calibration: one.jsonl}, two: {weight: 0.5, calibration: two.jsonl}}"
WEIGHTS = (1.0, 0.5)
Read = Callable[[Any, Sequence[Sequence[int]]], dict[str, Tensor]]


@pytest.fixture
def family_project(tmp_path: Path, model_of: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Project]:
    """A project on a family's tiny model, with two fine-tunes and two files of texts."""

    def make(family: str) -> Project:
        base = save_other(tmp_path / "other", family) if family == "mixtral" else model_of(family, torch.float32)
        (tmp_path / "recipes").mkdir()
        (tmp_path / "base").symlink_to(base)
        for i, name in enumerate(("one", "two")):
            save_finetuned(base, tmp_path / "bricks" / name, seed=i)
            write_rows(tmp_path / f"{name}.jsonl", 7, seed=1000 * i)
        monkeypatch.setattr("workbench.models.prompts.load_tokenizer", lambda source: words_tokenizer(source))
        return Project(tmp_path)

    return make


class Dense:
    """The base, the bricks and a merge as whole float64 models."""

    def __init__(self, project: Project) -> None:
        resolved = project.resolve(f"{BRICKS}steps: [{{merge: average}}]\n", "dense.yaml")
        config, self.path = resolved.base.config, project.path
        self.base = {name: t.double() for name, t in tensors_of(project.path / "base").items()}
        self.bricks = [{n: t.double() for n, t in tensors_of(project.path / "bricks" / b).items()} for b in ("one", "two")]
        self.model = live_model(config, {n: t.float() for n, t in self.base.items()}, project.path / "base", CPU).double()
        tokenizer = words_tokenizer(project.path / "base")
        self.texts = [
            [row.tokens for row in encode(read_texts(project.path / f"{b}.jsonl", b), tokenizer, 512)] for b in ("one", "two")
        ]
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        self.live = {
            name: next(live for live in parameters if live.endswith(name) or name.endswith(live))
            for name in self.base
            if any(live.endswith(name) or name.endswith(live) for live in parameters)
        }

    def sum(self, factors: Sequence[float]) -> dict[str, Tensor]:
        """Return the base plus a sum of deltas."""
        return {
            n: t + sum(f * (brick[n] - t) for f, brick in zip(factors, self.bricks, strict=True)) for n, t in self.base.items()
        }

    def inputs(self, weights: dict[str, Tensor], texts: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """Return the inputs of every linear layer in a model with these weights, [token, in], one unpadded text at a time."""
        with torch.no_grad():
            parameters = dict(self.model.named_parameters(remove_duplicate=False))
            for name, live in self.live.items():
                parameters[live].copy_(weights[name])
        found: dict[str, list[Tensor]] = {}
        hooks = []
        for name, live in self.live.items():
            module = self.model.get_submodule(live.rpartition(".")[0])
            if live.endswith(".weight") and (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"):

                def see(_m: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
                    found.setdefault(name, []).append(args[0].reshape(-1, args[0].shape[-1]))

                hooks.append(module.register_forward_pre_hook(see))
        with torch.no_grad():
            for row in texts:
                self.model(input_ids=torch.tensor([row]))
        for hook in hooks:
            hook.remove()
        return {name: torch.cat(rows) for name, rows in found.items()}

    def flip(self, name: str, weight: Tensor) -> Tensor:
        """Return a weight as [out, in] from its stored orientation, or the other way round."""
        module = self.model.get_submodule(self.live[name].rpartition(".")[0])
        return weight.T if type(module).__name__ == "Conv1D" else weight


def layers_of(dense: Dense, read: dict[str, Tensor]) -> list[list[str]]:
    """Return the names of the linear layers inside each decoder layer."""
    found: dict[int, list[str]] = {}
    for name in read:
        numbers = [int(part) for part in name.split(".") if part.isdigit()]
        if numbers:
            found.setdefault(numbers[0], []).append(name)
    return [found[i] for i in sorted(found)]


def featcal(dense: Dense, lam: float, anchor: float, ridge: float, blend: float) -> dict[str, Tensor]:
    """Solve FeatCal's equations without a Cholesky factor, with whole forward passes of the merge so far."""
    start = dense.sum([lam * w for w in WEIGHTS])
    merged = dict(start)
    own = [dense.inputs(brick, texts) for brick, texts in zip(dense.bricks, dense.texts, strict=True)]
    for names in layers_of(dense, own[0]):
        seen = [dense.inputs(merged, texts) for texts in dense.texts]
        for name in names:
            base, bias = dense.flip(name, dense.base[name]), name.removesuffix("weight") + "bias"
            left = (ridge + 1e-8) * torch.eye(base.shape[1], dtype=torch.float64)
            right = ridge * (base + anchor * (dense.flip(name, start[name]) - base)).T
            shift, scale, mean = (
                torch.zeros(base.shape[0], dtype=torch.float64),
                0.0,
                torch.zeros(base.shape[1], dtype=torch.float64),
            )
            for weight, brick, read, taught in zip(WEIGHTS, dense.bricks, seen, own, strict=True):
                x, theta = read[name], dense.flip(name, brick[name])
                y = blend * taught[name] + (1 - blend) * x
                factor = weight / float((x.T @ x / len(x)).norm())
                left += factor * x.T @ x / len(x)
                right += factor * x.T @ y / len(x) @ theta.T
                scale, mean = scale + factor, mean + factor * x.mean(0)
                if bias in dense.live:
                    shift += factor * (brick[bias] + theta @ y.mean(0))
            solved = (torch.linalg.inv(left) @ right).T
            merged[name] = dense.flip(name, solved)
            if bias in dense.live:
                anchored = dense.base[bias] + anchor * (start[bias] - dense.base[bias])
                merged[bias] = (shift - solved @ mean + ridge * anchored) / (scale + ridge)
    return merged


def same_deltas(found: dict[str, Tensor], expected: dict[str, Tensor], base: dict[str, Tensor], skip: Sequence[str] = ()) -> None:
    for name, right in expected.items():
        if name in skip:
            continue
        change = right - base[name]
        error = float((found[name].double() - base[name] - change).norm())
        assert error <= 2e-4 * float(change.norm()) + 1e-6, (name, error, float(change.norm()))


@pytest.mark.parametrize("family", FAMILIES)
def test_featcal_beside_dense_equations(family: str, family_project: Callable[[str], Project]) -> None:
    """Biases, Conv1D, tuples as outputs, norms after the layer, an untied head."""
    project = family_project(family)
    dense = Dense(project)

    @given(
        st.tuples(
            st.sampled_from((0.4, 1.0)), st.sampled_from((1.5, 0.0, 2.2)), st.floats(0.05, 1), st.sampled_from((0.3, 0.0, 1.0))
        )
    )
    @settings(fuzz, max_examples=max(1, EXAMPLES // 4))
    def check(fields: tuple[float, float, float, float]) -> None:
        stated = ", ".join(f"{name}: {value}" for name, value in zip(("lambda", "anchor", "ridge", "blend"), fields, strict=True))
        found = project.tensors(f"{BRICKS}steps: [{{merge: featcal, {EACH}, {stated}}}]\n")
        same_deltas(found, featcal(dense, *fields), dense.base)

    check()


@pytest.mark.parametrize("family", FAMILIES)
def test_aim_beside_the_dense_formula(family: str, family_project: Callable[[str], Project]) -> None:
    """Conv1D, tied and untied heads, a negative weight; norms, biases and embeddings get the plain sum."""
    project = family_project(family)
    step = "{merge: aim, calibration: one.jsonl, bricks: {one: 1.0, two: -0.5}, lambda: 0.8, omega: 0.3}"
    found, dense = project.tensors(f"{BRICKS}steps: [{step}]\n"), Dense(project)
    expected = dense.sum([0.8, -0.4])
    for name, read in dense.inputs(dense.base, dense.texts[0]).items():
        used = read.abs().mean(0)
        change = dense.flip(name, expected[name] - dense.base[name]) * (1 - 0.7 * used / used.max())
        assert float(used.min() / used.max()) < 0.8  # else the damping would hardly differ between channels
        expected[name] = dense.base[name] + dense.flip(name, change)
    same_deltas(found, expected, dense.base, skip=["embed_out.weight"])  # gpt_neox's head, which has another name in a live model


def test_aim_keeps_the_whole_sum_where_the_base_uses_no_channel() -> None:
    assert kept_share(torch.tensor([0.0, 1.0, 4.0]), 0.2).tolist() == pytest.approx([1.0, 0.8, 0.2])
    assert kept_share(torch.zeros(3), 0.2).tolist() == [1.0, 1.0, 1.0]


def test_aim_is_linear_in_the_weights_and_omega_1_is_the_sum(family_project: Callable[[str], Project]) -> None:
    project = family_project("llama")
    base = tensors_of(project.path / "base")

    def merged(first: float, fields: str = "merge: aim, calibration: one.jsonl") -> dict[str, Tensor]:
        return project.tensors(f"{BRICKS}steps: [{{{fields}, bricks: {{one: {first}, two: {first / 2}}}}}]\n")

    once, twice = merged(1), merged(2)
    assert all(torch.allclose(twice[n] - base[n], 2 * (once[n] - base[n]), atol=1e-6) for n in base)
    assert all(torch.equal(tensor, base[n].float()) for n, tensor in merged(0).items())
    plain, undamped = merged(1, "merge: task_arithmetic"), merged(1, "merge: aim, calibration: one.jsonl, omega: 1")
    auto = [
        merged(1, f"{step}, weights: auto") for step in ("merge: task_arithmetic", "merge: aim, calibration: one.jsonl, omega: 1")
    ]
    assert all(torch.equal(auto[0][n], auto[1][n]) for n in base)
    assert any(not torch.equal(auto[0][n], plain[n]) for n in base)
    assert all(
        torch.equal(plain[n], undamped[n]) and (plain[n].dim() < 2 or "embed" in n or not torch.equal(plain[n], once[n]))
        for n in base
    )


# -- a recipe's other fields, the cache and errors


@pytest.fixture
def llama(family_project: Callable[[str], Project]) -> Project:
    return family_project("llama")


def step(method: str, rest: str = "", bricks: str = EACH) -> str:
    return f"{BRICKS}steps: [{{merge: {method}, {bricks}{rest}}}]\n"


def test_featcal_without_changes_with_a_large_ridge_and_beside_where(llama: Project) -> None:
    """The equations then have the base's weights as their solution, whatever the fields."""
    same = "bricks: {one: base, two: base}\n"
    found = llama.tensors(step("featcal", ", anchor: 3, blend: 0.9").replace(BRICKS, same))
    for name, tensor in tensors_of(llama.path / "base").items():
        torch.testing.assert_close(found[name], tensor.float(), atol=5e-6, rtol=0)
    # At ρ = 1 that is the scaled sum, at ρ = 2 twice its delta.
    for anchor in (1.0, 2.0):
        found = llama.tensors(step("featcal", f", lambda: 0.3, ridge: 1.0e+9, anchor: {anchor}"))
        summed = llama.tensors(step("task_arithmetic", f", lambda: {0.3 * anchor}", "bricks: {one: 1.0, two: 0.5}"))
        linear = [n for n in found if n.endswith("proj.weight")]
        assert len(linear) == 7 * 4
        assert all(torch.allclose(found[n], summed[n], atol=1e-6) for n in linear)
    # In the forward passes too: layer 1 is fitted to what the base's layer 0 gives it.
    base = tensors_of(llama.path / "base")
    found = llama.tensors(step("featcal", ", where: {layers: '1'}"))
    assert all(torch.equal(found[n], t.float()) for n, t in base.items() if ".layers.0." in n)
    assert all(not torch.equal(found[n], base[n].float()) for n in found if ".layers.1." in n and n.endswith("proj.weight"))
    both = llama.tensors(step("featcal"))
    assert any(not torch.equal(found[n], both[n]) for n in found if ".layers.1." in n)


def test_a_second_composition_measures_nothing(llama: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another field or other texts are measured anew; a damaged index is measured again."""
    first = llama.tensors(step("featcal"))
    with monkeypatch.context() as patch:
        patch.setattr("workbench.merge.measuring.forward.Walk.at_first_layer", lambda *_: pytest.fail("measured again"))
        second = llama.tensors(step("featcal", ", id: other"))
        assert all(torch.equal(first[n], second[n]) for n in first)
    write_rows(llama.path / "one.jsonl", 7, seed=5)
    third = llama.tensors(step("featcal"))
    assert any(not torch.equal(first[n], third[n]) for n in first)
    for index in (llama.path / ".workbench").glob("forward/*/index.json"):
        index.write_text("{")
    again = llama.tensors(step("featcal"))
    assert all(torch.equal(third[n], again[n]) for n in third)


def test_fused_experts_are_refused(family_project: Callable[[str], Project]) -> None:
    project = family_project("mixtral")
    with pytest.raises(WorkbenchError, match="featcal: transformers fuses weights of mixtral, such as experts"):
        compose(project.resolve(step("featcal")), CPU)


def test_a_brick_that_gives_no_numbers_is_refused(llama: Project) -> None:
    file = llama.path / "bricks" / "two" / "model.safetensors"
    tensors = tensors_of(file.parent)
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = float("inf")
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(WorkbenchError, match=r"model\.layers\.0\..*(NaN|infinit|finite|singular)"):
        compose(llama.resolve(step("featcal")), CPU)


def test_weights_by_layer_have_systems_of_their_own(llama: Project) -> None:
    """The layers q and k read one input, but the bricks may weigh differently there."""

    def merged(place: str | None) -> list[Tensor]:
        weight = f"weight: [{{where: {{include: ['{place}']}}, value: 0.25}}], " if place else ""
        bricks = f"bricks: {{one: {{{weight}calibration: one.jsonl}}, two: {{calibration: two.jsonl}}}}"
        found = llama.tensors(step("featcal", bricks=bricks))
        return [found[f"model.layers.0.self_attn.{name}.weight"] for name in ("q_proj", "k_proj")]

    plain, query, both = merged(None), merged("*q_proj*"), merged("*layers.0.self_attn*")
    assert torch.equal(query[1], plain[1])
    assert torch.equal(query[0], both[0])
    assert not torch.equal(query[0], plain[0])
    assert not torch.equal(query[1], both[1])


def test_the_record_has_the_norms_of_the_deltas(llama: Project) -> None:
    """Each merged delta's norm over the mean of the bricks', and the number of solved layers."""
    text = step("featcal") + "output: {dtype: float32}\n"
    record, merged = llama.run(text)["steps"][0], llama.tensors(text)
    base, one, two = (tensors_of(llama.path / place) for place in ("base", "bricks/one", "bricks/two"))

    def ratio(name: str) -> float:
        norms = [float((brick[name] - base[name]).norm()) for brick in (one, two)]
        return float((merged[name] - base[name]).norm()) / (sum(norms) / 2)

    ratios = {name: ratio(name) for name in base if name.endswith("proj.weight")}
    assert record["solved"] == len(ratios)
    assert record["norm_ratio"]["at"] == max(ratios, key=lambda name: ratios[name])
    assert record["norm_ratio"]["largest"] == pytest.approx(max(ratios.values()), rel=1e-3)
    assert record["norm_ratio"]["smallest"] == pytest.approx(min(ratios.values()), rel=1e-3)
    assert set(record["calibration"]) == {"one", "two"}
