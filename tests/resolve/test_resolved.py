"""A resolved recipe does not change, and its bricks answer alike whether they are directories or recipes."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import FrozenInstanceError, fields, replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from worlds.project import CPU, Project
from worlds.tiny import edit_json, save_adapter, save_model, tensors_of

from workbench.adapters.read import WEIGHTS
from workbench.bricks.brick import BrickSource
from workbench.ground.errors import WorkbenchError
from workbench.ground.identity import InputChangedError
from workbench.resolve.keys import StepKey
from workbench.resolve.resolved import Resolved
from workbench.run.compose import compose

INNER = "bricks: {two: own/two, full: bricks/full, three: bricks/three}\nsteps: [{merge: ties, bricks: {two: 1, full: 1}}]\n"
OUTER = """
bricks: {full: bricks/full, inner: {recipe: recipes/inner.yaml}, one: own/one, three: bricks/three}
steps: [{merge: average, bricks: [one, inner, full]}]
"""
CARD = "version: 1\nname: one-card\nkind: adapter\nbase: {id: base}\nlicence: MIT\ndata_licences: {rows: CC0-1.0}\n"


@pytest.fixture
def nested(project: Project) -> Resolved:
    """A recipe with an adapter that has a card, a checkpoint, an unused adapter, and a recipe of an adapter and a checkpoint."""
    for name in ("one", "two"):
        shutil.copytree(project.path / "bricks" / name, project.path / "own" / name)
    (project.path / "own" / "one" / "brick.yaml").write_text(CARD)
    (project.path / "own" / "two" / "README.md").write_text("---\nlicense: Apache-2.0\n---\n")
    project.write(INNER, "inner.yaml")
    resolved = project.resolve(OUTER)
    assert isinstance(resolved, Resolved)
    return resolved


@pytest.mark.parametrize("kind", ["adapter", "checkpoint"])
def test_a_brick_that_no_step_uses_is_checked_on_the_base_that_it_needs(kind: str, project: Project) -> None:
    """It has a head of its own, which the tied base lacks; the result stays tied."""
    if kind == "adapter":
        file = save_adapter(project.path / "base", project.path / "own", seed=3, modules_to_save=["lm_head"]) / WEIGHTS
        save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file)
    else:
        save_model(project.path / "own", "llama_untied")
    text = "bricks: {one: bricks/one, own: own}\nsteps: [{merge: average, bricks: [one]}]\n"
    assert not project.resolve(text).unties
    assert project.resolve(text.replace("[one]", "[one, own]")).unties


def size(project: Project, *files: str) -> int:
    return sum((project.path / file).stat().st_size for file in files)


def values(value: Any) -> Iterator[Any]:
    """Every value that a frozen dataclass holds in a field, and the elements of tuples."""
    yield value
    if isinstance(value, tuple):
        for element in value:
            yield from values(element)


def test_a_resolved_recipe_does_not_change(nested: Resolved) -> None:
    for field in fields(nested):
        with pytest.raises(FrozenInstanceError):
            setattr(nested, field.name, None)
        for value in values(getattr(nested, field.name)):
            assert not isinstance(value, (list, dict, set)), field.name
    for mapping in (nested.on_disk, nested.nested, nested.bricks, nested.digests, nested.fingerprints):
        with pytest.raises(TypeError, match="does not support item assignment"):
            mapping["one"] = None  # type: ignore[index]


def test_bricks_are_in_the_order_of_the_recipe(nested: Resolved) -> None:
    assert list(nested.bricks) == ["full", "inner", "one", "three"]
    assert list(nested.on_disk) == ["full", "one", "three"]
    assert list(nested.nested) == ["inner"]
    assert list(nested.adapters) == ["one", "three"]
    assert nested.parents == ["full", "inner", "one"]


def test_each_kind_of_brick_answers_alike(nested: Resolved, project: Project) -> None:
    bricks: dict[str, BrickSource] = dict(nested.bricks)
    inner = nested.nested["inner"]
    full, base = size(project, "bricks/full/model.safetensors"), sum(s.nbytes for s in nested.base.weights.specs.values())
    one, two, three = (size(project, f"{name}/adapter_model.safetensors") for name in ("own/one", "own/two", "bricks/three"))
    assert {n: b.name for n, b in bricks.items()} == {n: n for n in bricks}
    assert {n: b.kind for n, b in bricks.items()} == {
        "full": "checkpoint", "inner": "recipe", "one": "adapter", "three": "adapter",
    }  # fmt: skip
    assert {n: b.public_name for n, b in bricks.items()} == {
        "full": "full", "inner": "recipe inner", "one": "one-card", "three": "three",
    }  # fmt: skip
    assert {n: b.stored_bytes for n, b in bricks.items()} == {"full": full, "inner": two + full, "one": one, "three": three}
    assert {n: b.input_bytes for n, b in bricks.items()} == {
        "full": full, "inner": base + two + full + three, "one": one, "three": three,
    }  # fmt: skip
    assert bricks["inner"].digest(nested.cache) == inner.key
    assert bricks["inner"].stamp(nested.cache) == inner.stamp
    assert nested.digests == {name: brick.digest(nested.cache) for name, brick in bricks.items()}
    assert len({*nested.digests.values(), *nested.fingerprints.values()}) >= 4
    assert all(brick.known(nested.cache) for brick in bricks.values())
    assert nested.known
    for brick in bricks.values():
        assert (brick.revision, brick.headers_only, tuple(brick.downloads), tuple(brick.deferred)) == (None, False, (), ())
        assert brick.unties(nested.plain) is None


def test_licences_of_a_nested_recipe_are_those_of_its_inputs(nested: Resolved) -> None:
    assert nested.licences == {"base": "unknown", "full": "unknown", "inner": "apache-2.0, unknown", "one": "mit"}
    assert nested.data_licences == [("one", "rows", "cc0-1.0")]


def test_data_licences_name_the_brick_within_a_nested_recipe(project: Project) -> None:
    shutil.copytree(project.path / "bricks" / "one", project.path / "own" / "one")
    (project.path / "own" / "one" / "brick.yaml").write_text(CARD)
    project.write("bricks: {one: own/one}\nsteps: [{merge: average}]\n", "inner.yaml")
    outer = project.resolve("bricks: {inner: {recipe: recipes/inner.yaml}}\nsteps: [{merge: average}]\n")
    assert outer.data_licences == [("inner/one", "rows", "cc0-1.0")]


def test_the_chat_template_is_part_of_a_key_where_texts_may_be_conversations(project: Project) -> None:
    (project.path / "rows.jsonl").write_text('{"prompt": "all messages", "completion": "a"}\n')
    (project.path / "talks.jsonl").write_text('{"messages": []}\n')
    resolved = project.resolve("bricks: {one: bricks/one}\nsteps: [{merge: average}]\n")
    step = StepKey(resolved, resolved.digests, 0)
    files: list[list[str] | None] = [None, ["talks.jsonl"], ["rows.jsonl", "talks.jsonl"], ["rows.jsonl"], []]
    assert [len(step.wording(names, 0)) for names in files] == [1, 1, 1, 0, 0]


def test_a_brick_of_the_same_base_in_another_directory_is_a_delta_of_it(project: Project) -> None:
    shutil.copytree(project.path / "base", project.path / "copy")
    project.write("base: copy\nbricks: {two: bricks/two}\nsteps: [{merge: average}]\n", "inner.yaml")
    outer = "bricks: {inner: {recipe: recipes/inner.yaml}}\nsteps: [{merge: average}]\n"
    assert project.resolve(outer).nested["inner"].base_path.name == "copy"
    project.write("base: bricks/full\nbricks: {two: bricks/two}\nsteps: [{merge: average}]\n", "inner.yaml")
    with pytest.raises(WorkbenchError, match="has the base bricks/full, but this recipe has base"):
        project.resolve(outer)


@pytest.mark.parametrize("name", ["one", "two"])
def test_a_changed_file_is_found_at_any_depth(nested: Resolved, project: Project, name: str) -> None:
    nested.check_inputs()
    (project.path / "own" / name / "adapter_model.safetensors").touch()
    with pytest.raises(InputChangedError, match=rf"own/{name}/adapter_model.safetensors: the file changed"):
        nested.check_inputs()


def test_a_copy_with_other_steps_keeps_base_and_digests(nested: Resolved) -> None:
    first = replace(nested, recipe=replace(nested.recipe, steps=()))
    assert first.base is nested.base
    assert first.watched is nested.watched
    assert (first.base_digest, first.digests) == (nested.base_digest, nested.digests)
    assert first.keys == ()
    assert list(compose(first, CPU).model.weights.specs) == list(nested.base.weights.specs)


def test_stored_buffers_of_a_checkpoint_are_named(project: Project) -> None:
    shutil.copytree(project.path / "bricks" / "full", project.path / "own")
    buffers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(2)}
    save_file({**tensors_of(project.path / "own"), **buffers}, project.path / "own" / "model.safetensors", {"format": "pt"})
    assert project.resolve("bricks: {full: own}\nsteps: [{merge: average}]\n").warnings == (
        f"brick 'full': skips 2 stored buffers ({next(iter(buffers))}, …), which transformers computes itself",
    )


def test_all_problems_are_reported_at_once(project: Project) -> None:
    project.write("bricks: {two: bricks/tow}\nsteps: [{merge: average}]\n", "inner.yaml")
    own = project.path / "own"
    shutil.copytree(project.path / "bricks" / "one", own)
    edit_json(own / "adapter_config.json", peft_type="UNHEARD")
    with pytest.raises(WorkbenchError) as error:
        project.resolve(OUTER.replace("own/one", "own").replace("bricks/three", "bricks/tree"))
    lines = error.value.message.splitlines()
    assert [next(name for name in ("'two'", "'one'", "'three'") if name in line) for line in lines] == [
        "'two'",
        "'three'",
        "'one'",
    ]


def test_damaged_generation_settings_are_refused_before_any_work(project: Project) -> None:
    base = project.path / "base"
    own = base.resolve()
    base.unlink()
    shutil.copytree(own, base)
    (base / "generation_config.json").write_text("[]")
    with pytest.raises(WorkbenchError, match=r"generation_config\.json"):
        project.resolve("bricks: {one: bricks/one}\nsteps: [{merge: average}]\n")
