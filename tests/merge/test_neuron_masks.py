"""`where: {neurons: SET}`: a merge that moves the deltas of some neurons only."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from worlds.neuron_sets import inside, random_set, save_random_set
from worlds.project import CPU, Project
from worlds.tiny import tensors_of

from workbench.activations.sets import NeuronSet, write_set
from workbench.ground.errors import WorkbenchError
from workbench.recipe.methods import methods
from workbench.recipe.recipe import dump_step
from workbench.run.compose import compose
from workbench.run.plan import plan
from workbench.steps import MergeMethod
from workbench.weights.lowrank import low_rank_update

METHODS = sorted(
    cls.name
    for cls in methods().values()
    if issubclass(cls, MergeMethod) and not cls.name.startswith("mergekit/") and cls.laws.needs == "tensor"
)
LORAS = "bricks: {one: bricks/one, two: bricks/two}\n"
MIXED = "bricks: {one: bricks/one, full: bricks/full}\n"


@pytest.fixture
def chosen(project: Project) -> NeuronSet:
    """A quarter of the neurons of layers 0 to 2, in sets/math."""
    return save_random_set(project.path / "sets" / "math", project.path / "base", layers=(0, 1, 2))


def step(method: str, **fields: Any) -> str:
    more = "".join(f", {name}: {value}" for name, value in fields.items())
    return f"steps: [{{merge: {method}, where: {{neurons: sets/math}}{more}}}]\n"


def places(chosen: NeuronSet, name: str, tensor: Tensor) -> Tensor | None:
    layer = int(name.split(".")[2]) if ".layers." in name else -1
    return inside(name, chosen.indices.get(layer, torch.zeros(0, dtype=torch.long)), tensor.shape)


@pytest.mark.parametrize("head", [LORAS, MIXED], ids=["adapters", "adapter and checkpoint"])
@pytest.mark.parametrize("method", METHODS)
def test_nothing_outside_the_set_changes(project: Project, chosen: NeuronSet, method: str, head: str) -> None:
    """Bit for bit, with every method, although some spread a delta over its tensor."""
    base = tensors_of(project.path / "base")
    merged = project.tensors(head + step(method))
    changed = 0
    for name, theta in base.items():
        where = places(chosen, name, theta)
        if where is None:
            continue
        assert torch.equal(merged[name][~where], theta.float()[~where]), name
        changed += int((merged[name][where] != theta.float()[where]).sum())
    assert changed > 0


def test_what_scales_the_base_and_include_are_limited_to_the_set(project: Project, chosen: NeuronSet) -> None:
    fields = {"normalize": "false", "bricks": "{one: 0.5, full: 1}"}
    merged = project.tensors(MIXED + step("linear", **fields))
    plain = project.tensors(MIXED + "steps: [{merge: linear, normalize: false, bricks: {one: 0.5, full: 1}}]\n")
    for name, theta in tensors_of(project.path / "base").items():
        where = places(chosen, name, theta)
        expected = plain[name] if where is None else torch.where(where, plain[name], theta.float())
        torch.testing.assert_close(merged[name], expected, atol=1e-6, rtol=0)
    # `include: ["*mlp*"]` leaves the attention alone.
    merged = project.tensors(MIXED + "steps: [{merge: average, where: {neurons: sets/math, include: ['*mlp*']}}]\n")
    for name, theta in tensors_of(project.path / "base").items():
        if ".mlp." not in name:
            assert torch.equal(merged[name], theta.float()), name


@pytest.mark.parametrize("method", ["task_arithmetic", "average", "tall_mask"])
def test_inside_the_set_it_is_the_plain_merge(project: Project, chosen: NeuronSet, method: str) -> None:
    """Element by element methods give on the set, and on all tensors without neurons, what they give without a set."""
    plain = project.tensors(MIXED + f"steps: [{{merge: {method}}}]\n")
    merged = project.tensors(MIXED + step(method))
    for name, theta in tensors_of(project.path / "base").items():
        where = places(chosen, name, theta)
        where = torch.ones(theta.shape, dtype=torch.bool) if where is None else where
        torch.testing.assert_close(merged[name][where], plain[name][where], atol=1e-7, rtol=0)


def test_low_rank_deltas_stay_low_rank(project: Project, chosen: NeuronSet) -> None:
    """Rows of B or columns of A are zero; the product is the update of the streamed merge, and an adapter can hold it."""
    resolved = project.resolve(LORAS + step("task_arithmetic"))
    model = compose(resolved, CPU).model
    merged = project.tensors(LORAS + step("task_arithmetic"))
    for name, theta in tensors_of(project.path / "base").items():
        update = low_rank_update(model.weights, resolved.base.weights, name, CPU)
        assert update is not None
        assert update.rank <= 12
        product = (update.left @ update.right).reshape(theta.shape)
        torch.testing.assert_close(theta.float() + product, merged[name], atol=1e-6, rtol=0)
        where = places(chosen, name, theta)
        if where is not None:
            assert not product[~where].any()
    document = project.run(LORAS + step("task_arithmetic") + "output: {form: adapter, rank: exact}\n")
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(project.path / "base", dtype=torch.float32)
    baked = PeftModel.from_pretrained(plain, document["adapter"]).merge_and_unload().state_dict()
    for name, tensor in merged.items():
        torch.testing.assert_close(baked[name].float(), tensor, atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "iso_c"])
def test_core_space(project: Project, chosen: NeuronSet, method: str) -> None:
    merged = project.tensors(LORAS + step(method, space="core"))
    for name, theta in tensors_of(project.path / "base").items():
        where = places(chosen, name, theta)
        if where is not None:
            assert torch.equal(merged[name][~where], theta.float()[~where]), name
    if method == "task_arithmetic":
        whole = project.tensors(LORAS + step(method))
        assert all(torch.allclose(merged[name], whole[name], atol=1e-5) for name in merged)


def test_a_recipe_as_a_brick_is_limited_too(project: Project, chosen: NeuronSet) -> None:
    project.write(LORAS + "steps: [{merge: ties}]\n", "inner.yaml")
    merged = project.tensors("bricks: {inner: {recipe: recipes/inner.yaml}}\n" + step("task_arithmetic"))
    inner = project.tensors(LORAS + "steps: [{merge: ties}]\n")
    for name, theta in tensors_of(project.path / "base").items():
        where = places(chosen, name, theta)
        expected = inner[name] if where is None else torch.where(where, inner[name], theta.float())
        torch.testing.assert_close(merged[name], expected, atol=1e-7, rtol=0)


@pytest.mark.parametrize("method", ["regmean", "featcal"])
def test_texts_are_read_with_the_limited_bricks(method: str, project: Project, chosen: NeuronSet) -> None:
    """A method that measures on texts measures the bricks as they are merged: another set gives another measurement."""
    (project.path / "texts.jsonl").write_text('{"text": "w1 w2 w3 w4 w5 is w6"}\n{"text": "w9 of w8 is w7 w6 w5"}\n')
    text = LORAS + step(method, bricks="{one: {calibration: texts.jsonl}, two: {calibration: texts.jsonl}}")
    merged = project.tensors(text)
    for name, theta in tensors_of(project.path / "base").items():
        where = places(chosen, name, theta)
        if where is not None:
            assert torch.equal(merged[name][~where], theta.float()[~where]), name


def test_the_set_is_part_of_the_key(project: Project, chosen: NeuronSet) -> None:
    text = LORAS + step("task_arithmetic")
    first = project.resolve(text).keys[-1]
    write_set(project.path / "sets" / "math", NeuronSet("other name", "neurons", chosen.units, chosen.indices, base=chosen.base))
    assert project.resolve(text).keys[-1] == first, "a key depends on the places alone"
    save_random_set(project.path / "sets" / "math", project.path / "base", seed=5)
    assert project.resolve(text).keys[-1] != first
    plain = project.resolve(LORAS + "steps: [{merge: average, where: {layers: '1:'}}]\n").recipe.steps[0]
    assert dump_step(plain)["where"] == {"include": ["*"], "exclude": [], "layers": "1:"}, "keys without a set stay the same"


def test_plan_and_record(project: Project, chosen: NeuronSet) -> None:
    text = LORAS + step("task_arithmetic")
    row = plan(project.resolve(text), project.path / "runs").steps[0].to_dict()["neurons"]
    same = {"set": "sets/math", "kind": "neurons", "size": 36, "share": 36 / 192, "layers": 3, "digest": chosen.digest()}
    assert row == same
    composed = compose(project.resolve(text), CPU)
    assert composed.records()[0]["neurons"] == row


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (step("average").replace("sets/math", "sets/maths"), "where.neurons: sets/maths: no such directory"),
        (step("average").replace("sets/math", "bricks/one"), "expected a set of neurons with a neurons.json, but it is an adapter"),
        ("steps: [{merge: average, where: {neurons: sets/math, include: ['*self_attn*']}}]\n", "select no tensor with neurons of the set"),
    ],
)  # fmt: skip
def test_refused(project: Project, chosen: NeuronSet, text: str, message: str) -> None:
    with pytest.raises(WorkbenchError, match=message) as caught:
        project.resolve(LORAS + text)
    assert "test.yaml:" in caught.value.message
    assert "where.neurons" in caught.value.message


def test_a_set_chosen_on_other_weights(project: Project) -> None:
    """Refused, unless the set's card lists the base's digest; a set that records no weights is used with a warning."""
    place = project.path / "sets" / "math"
    mine = random_set(project.path / "base")
    write_set(place, NeuronSet("math", "neurons", mine.units, mine.indices, base="0" * 32))
    with pytest.raises(WorkbenchError, match="the set was chosen on a model with other weights"):
        project.resolve(LORAS + step("average"))
    card = f"version: 1\nname: math\nkind: neurons\nbase: {{id: base, digest: '{'0' * 32}', aliases: [{mine.base}]}}\n"
    (place / "brick.yaml").write_text(card)
    assert not project.resolve(LORAS + step("average")).warnings
    (place / "brick.yaml").unlink()
    write_set(place, NeuronSet("math", "neurons", mine.units, mine.indices))
    (warning,) = project.resolve(LORAS + step("average")).warnings
    assert "does not record the weights" in warning


def test_neurons_belong_to_merge_steps(project: Project, chosen: NeuronSet) -> None:
    """A schedule's `where` selects whole tensors."""
    with pytest.raises(WorkbenchError, match="neurons"):
        project.resolve(LORAS + "steps: [{merge: task_arithmetic, lambda: [{where: {neurons: sets/math}, value: 1}]}]\n")
