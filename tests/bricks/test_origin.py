"""Bricks that were made on another base, that change nothing, or that hold other kinds of numbers than the base."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from worlds.project import Project
from worlds.tiny import edit_json, save_adapter, save_model, tensors_of

from workbench.ground.errors import WorkbenchError
from workbench.run.plan import plan

SHOWN = "which does not prove that it was made on base"
ASKS = "If that is the same model, add `any_base: true`"


def recipe(brick: Path, **settings: Any) -> str:
    fields = {"adapter": str(brick), **settings}
    return f"bricks: {{brick: {json.dumps(fields)}}}\nsteps: [{{merge: task_arithmetic}}]\n"


def warnings(project: Project, text: str) -> str:
    return "\n".join(plan(project.resolve(text), project.path / "runs").warnings)


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of a Qwen2 with 3 layers, whose widths equal the llama's; the Qwen2 itself is gone."""
    place = tmp_path_factory.mktemp("foreign")
    adapter = save_adapter(save_model(place / "qwen2", "qwen2", layers=3), place / "lora", seed=1, family="qwen2")
    shutil.move(place / "qwen2", place / "gone")
    return adapter


@pytest.fixture
def own(project: Project, tmp_path: Path) -> Path:
    """A LoRA of the project's base, without the model card that names it."""
    return Path(shutil.copytree(project.path / "bricks/one", tmp_path / "own", ignore=lambda *_: ["README.md"]))


def test_an_adapter_of_fewer_layers_is_refused(project: Project, foreign: Path) -> None:
    with pytest.raises(WorkbenchError) as caught:
        project.resolve(recipe(foreign))
    assert "brick 'brick' was made on another base than base" in caught.value.message
    assert "it updates layers 0 to 2, and its target_modules name modules of the base's 4 layers" in caught.value.message
    assert "any_base: true" in (caught.value.hint or "")


def test_restricted_adapters_and_any_base(project: Project, llama: Path, tmp_path: Path, foreign: Path) -> None:
    some = save_adapter(llama, tmp_path / "some", seed=2, layers_to_transform=[0, 1])
    edit_json(some / "adapter_config.json", base_model_name_or_path="base")
    assert "another base" not in warnings(project, recipe(some))
    assert SHOWN not in warnings(project, recipe(some))
    text = recipe(foreign, any_base=True)
    assert project.resolve(text).recipe.fields.bricks["brick"].data() == {"adapter": str(foreign), "any_base": True}
    assert "it updates layers 0 to 2" in warnings(project, text)
    run = Path(project.run(text)["run"])
    assert "it updates layers 0 to 2" in "\n".join(json.loads((run / "run.json").read_text("utf-8"))["warnings"])
    assert "it updates layers 0 to 2" in (run / "model/README.md").read_text("utf-8")
    assert '"any_base": true' in (run / "recipe.yaml").read_text("utf-8")


def test_the_config_beside_it_and_the_base_that_it_names_decide(project: Project, own: Path, foreign: Path, llama: Path) -> None:
    edit_json(own / "adapter_config.json", base_model_name_or_path=str(foreign.parent / "gone"))
    with pytest.raises(WorkbenchError, match=r"the base that it names, is of a qwen2 model, the base is a llama model"):
        project.resolve(recipe(own))
    shutil.copy(llama / "config.json", own / "config.json")
    edit_json(own / "config.json", num_hidden_layers=6)
    with pytest.raises(WorkbenchError, match=r"the config.json next to it is of a model with 6 layers, the base has 4"):
        project.resolve(recipe(own))


@pytest.mark.parametrize(("module", "refused"), [("qwen2", True), ("llama", False)])
def test_the_class_that_peft_records(project: Project, own: Path, module: str, refused: bool) -> None:
    mapping = {"base_model_class": "ForCausalLM", "parent_library": f"transformers.models.{module}.modeling_{module}"}
    edit_json(own / "adapter_config.json", auto_mapping=mapping, task_type=None)
    if refused:
        with pytest.raises(WorkbenchError, match="records the class ForCausalLM, the base is a llama model"):
            project.resolve(recipe(own))
    else:
        assert "another base" not in warnings(project, recipe(own))


@pytest.mark.parametrize("name", ["unsloth/llama-bnb-4bit", "/other/machine/base", "", None])
def test_a_name_that_shows_nothing_is_a_warning(project: Project, own: Path, name: str | None) -> None:
    edit_json(own / "adapter_config.json", base_model_name_or_path=name)
    said = warnings(project, recipe(own))
    names = f"adapter_config.json names {name}" if name else "its adapter_config.json names no base"
    assert f"brick 'brick' fits base in shape, {SHOWN} ({names})" in said.splitlines()
    assert ASKS not in said, "nothing contradicts"
    assert SHOWN not in warnings(project, recipe(own, any_base=True))


@pytest.mark.parametrize("name", ["base", "./base", "base/", "absolute", "the folder that base links to"])
def test_a_name_of_the_base_is_not(project: Project, own: Path, llama: Path, name: str) -> None:
    names = {"absolute": str(llama), "the folder that base links to": f"org/{llama.name}"}
    edit_json(own / "adapter_config.json", base_model_name_or_path=names.get(name, name))
    assert SHOWN not in warnings(project, recipe(own))


@pytest.mark.parametrize(
    ("folder", "name", "said"),
    [
        ("Llama-3.2-1B", "meta-llama/Llama-3.2-1B", None),
        ("Llama-3.2-1B", "/workspace/models/llama-3.2-1b/", None),
        (
            "Llama-3.2-1B",
            "unsloth/Llama-3.2-1B-bnb-4bit",
            "but adapter_config.json names unsloth/Llama-3.2-1B-bnb-4bit. If that is",
        ),
        ("Llama-3.2-1B", "/workspace/out/checkpoint-500", "(adapter_config.json names /workspace/out/checkpoint-500)"),
        ("checkpoint-500", "/workspace/out/checkpoint-500", "(adapter_config.json names /workspace/out/checkpoint-500)"),
        ("checkpoint-500", "org/other-1b", "(adapter_config.json names org/other-1b)"),
        ("base", "org/base", "(adapter_config.json names org/base)"),
    ],
)
def test_a_copy_is_known_by_the_last_part_of_its_name(
    project: Project, own: Path, folder: str, name: str, said: str | None
) -> None:
    """A name that any folder may have shows nothing, and contradicts nothing; only a contradiction asks for something."""
    place = project.path / "models" / folder
    place.parent.mkdir()
    place.symlink_to((project.path / "base").resolve())
    edit_json(own / "adapter_config.json", base_model_name_or_path=name)
    found = [line for line in warnings(project, f"base: models/{folder}\n{recipe(own)}").splitlines() if "in shape" in line]
    assert len(found) == (said is not None)
    for line in found:
        assert line.startswith(f"brick 'brick' fits models/{folder} in shape, ")
        assert str(said) in line
        assert (ASKS in line) is ("If that is" in str(said))
        assert ("does not prove" in line) is not (ASKS in line)


def test_the_model_card_of_an_adapter_names_its_base(project: Project, own: Path) -> None:
    edit_json(own / "adapter_config.json", base_model_name_or_path="/workspace/out/model")
    place = project.path / "models" / "Llama-3.2-1B"
    place.parent.mkdir()
    place.symlink_to((project.path / "base").resolve())
    text = f"base: models/Llama-3.2-1B\n{recipe(own)}"
    readme = own / "README.md"
    for named, said in (
        ("meta-llama/Llama-3.2-1B", ""),
        ("meta-llama/Llama-3.2-3B", "README.md names meta-llama/Llama-3.2-3B. If that is"),
        ("model", "(adapter_config.json names /workspace/out/model)"),
    ):
        readme.write_text(f"---\nlibrary_name: peft\nbase_model: {named}\n---\n# A card\n", "utf-8")
        found = [line for line in warnings(project, text).splitlines() if "in shape" in line]
        assert len(found) == bool(said), named
        assert all(said in line for line in found), found


@pytest.mark.parametrize(
    ("mapping", "said"),
    [
        (
            {"base_model_class": "LlamaForCausalLM", "parent_library": "transformers.models.llama.modeling_llama"},
            " and model class",
        ),
        ({"base_model_class": "Mine", "parent_library": "mine.models"}, ""),
        (None, ""),
    ],
)
def test_the_class_that_was_compared_is_said(project: Project, own: Path, mapping: object, said: str) -> None:
    edit_json(own / "adapter_config.json", base_model_name_or_path=None, auto_mapping=mapping)
    assert f"brick 'brick' fits base in shape{said}, {SHOWN} (its adapter_config.json names no base)" in warnings(
        project, recipe(own)
    )


def card(brick: Path, **base: Any) -> None:
    data = {"version": 1, "name": "own", "kind": "adapter", "base": {"id": "org/gone", **base}}
    (brick / "brick.yaml").write_text(yaml.safe_dump(data), "utf-8")


def test_an_alias_on_the_card_and_the_digest(project: Project, own: Path, foreign: Path) -> None:
    edit_json(own / "adapter_config.json", base_model_name_or_path="org/gone")
    card(own)
    assert f"{SHOWN} (brick.yaml names org/gone)" in warnings(project, recipe(own))
    card(own, aliases=["org/other", "base"])
    assert SHOWN not in warnings(project, recipe(own))
    digest = project.resolve(recipe(own)).base_digest
    edit_json(own / "adapter_config.json", base_model_name_or_path=str(foreign.parent / "gone"))
    card(own, digest=digest)
    assert "base" not in warnings(project, recipe(own)).replace("license of base", "")
    card(own, digest="0" * 32, aliases=[digest])
    assert "another base" not in warnings(project, recipe(own))
    card(own, digest="0" * 32)
    edit_json(own / "adapter_config.json", base_model_name_or_path="base")
    with pytest.raises(WorkbenchError, match=r"its brick.yaml records other weights or another config.json \(0000000000, here"):
        project.resolve(recipe(own))


def test_a_checkpoint_of_another_model_type(project: Project, tmp_path: Path) -> None:
    """Mistral's tensors have the names and shapes of a llama's."""
    full = Path(shutil.copytree(project.path / "bricks/full", tmp_path / "full"))
    text = f"bricks: {{full: {full}}}\nsteps: [{{merge: average}}]\n"
    edit_json(full / "config.json", model_type="mistral")
    with pytest.raises(WorkbenchError, match=r"its config\.json is of a mistral model, the base is a llama model"):
        project.resolve(text)


# -- bricks that change nothing


@pytest.mark.parametrize("dora", [False, True])
def test_an_untrained_adapter_is_a_warning(project: Project, llama: Path, tmp_path: Path, dora: bool) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = LoraConfig(r=2, target_modules=["q_proj"], use_dora=dora, task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32), config)
    model.save_pretrained(tmp_path / "new")
    said = "brick 'brick' changes nothing"
    assert said in warnings(project, recipe(tmp_path / "new"))
    tensors = load_file(tmp_path / "new/adapter_model.safetensors")
    last = [name for name in tensors if "lora_B" in name][-1]
    tensors[last][0, 0] = 1e-3
    save_file(tensors, tmp_path / "new/adapter_model.safetensors")
    assert said not in warnings(project, recipe(tmp_path / "new"))


def test_a_copy_of_the_base_is_a_warning(project: Project, llama: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(llama, tmp_path / "copy"))
    text = f"bricks: {{copy: {copy}}}\nsteps: [{{merge: average}}]\n"
    assert "brick 'copy' changes nothing" in warnings(project, text)
    tensors = load_file(copy / "model.safetensors")
    tensors["model.norm.weight"][-1] += 1
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    assert "brick 'copy' changes nothing" not in warnings(project, text)


# -- kinds of numbers


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.bool])
def test_a_checkpoint_of_integers_is_refused(project: Project, tmp_path: Path, dtype: torch.dtype) -> None:
    full = Path(shutil.copytree(project.path / "bricks/full", tmp_path / "full"))
    tensors = load_file(full / "model.safetensors")
    name = "model.layers.2.mlp.down_proj.weight"
    save_file({**tensors, name: (tensors[name] * 1000).to(dtype)}, full / "model.safetensors", metadata={"format": "pt"})
    said = "boolean numbers .*the base has floating-point numbers"
    if dtype != torch.bool:
        said = f"{str(dtype).removeprefix('torch.')} numbers, which are codes of a quantized weight; expected floating point"
    with pytest.raises(WorkbenchError, match=rf"brick 'full': {name} holds {said}"):
        project.resolve(f"bricks: {{full: {full}}}\nsteps: [{{merge: average}}]\n")


def test_an_adapter_of_integers_is_refused(project: Project, own: Path) -> None:
    tensors = load_file(own / "adapter_model.safetensors")
    key = next(key for key in tensors if "lora_B" in key)
    save_file({**tensors, key: (tensors[key] * 1000).to(torch.int8)}, own / "adapter_model.safetensors")
    with pytest.raises(WorkbenchError, match=r"lora_B\.weight holds integer numbers"):
        project.resolve(recipe(own))


# -- counters


@pytest.fixture(scope="module")
def resnets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ResNet and two fine-tunes of it, which have seen 2 and 5 batches."""
    from transformers import ResNetConfig, ResNetForImageClassification

    place = tmp_path_factory.mktemp("resnets")
    config = ResNetConfig(num_channels=3, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3)
    for name, batches in (("base", 0), ("one", 2), ("two", 5)):
        torch.manual_seed(7)
        model = ResNetForImageClassification(config).train()
        torch.manual_seed(batches)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(batches):
            loss = model(pixel_values=torch.randn(4, 3, 32, 32), labels=torch.randint(0, 3, (4,))).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.save_pretrained(place / name)
    return place


def test_finetuned_resnets_merge(project: Project, resnets: Path) -> None:
    text = f"base: {resnets / 'base'}\nbricks: {{one: {resnets / 'one'}, two: {resnets / 'two'}}}\nsteps: [{{merge: task_arithmetic}}]\n"
    counters = [name for name in tensors_of(resnets / "base") if name.endswith("num_batches_tracked")]
    note = f"brick 'two': {len(counters)} training counters differ ({counters[0]}, …); the result uses the base's values"
    assert note in warnings(project, text)
    result = project.run(text)
    assert note in json.loads((Path(result["run"]) / "run.json").read_text("utf-8"))["warnings"]
    base, one, two, merged = (tensors_of(p) for p in (resnets / "base", resnets / "one", resnets / "two", Path(result["model"])))
    assert {int(base[n]) for n in counters} == {0}
    assert {int(two[n]) for n in counters} == {5}
    assert {int(merged[n]) for n in counters} == {0}
    for name in base.keys() - set(counters):
        torch.testing.assert_close(
            merged[name], base[name] + (one[name] - base[name]) + (two[name] - base[name]), rtol=1e-5, atol=1e-6
        )


def test_other_integers_that_differ_are_refused(project: Project, resnets: Path, tmp_path: Path) -> None:
    for name in ("base", "one"):
        made = Path(shutil.copytree(resnets / name, tmp_path / f"resnet-{name}"))
        tensors = {**load_file(made / "model.safetensors"), "resnet.table": torch.tensor([len(name)])}
        save_file(tensors, made / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WorkbenchError, match=r"the integer tensor resnet\.table differs"):
        project.resolve(
            f"base: {tmp_path / 'resnet-base'}\nbricks: {{one: {tmp_path / 'resnet-one'}}}\nsteps: [{{merge: linear}}]\n"
        )


@pytest.mark.parametrize("name", ["9" * 5000, "a/" + "b" * 300, "~nobody-here/model", "a\0b"])
def test_a_name_that_no_file_system_takes_is_a_name_of_nothing(name: str, project: Project, own: Path) -> None:
    edit_json(own / "adapter_config.json", base_model_name_or_path=name)
    assert SHOWN in warnings(project, recipe(own))
