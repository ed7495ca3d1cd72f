"""Bases as they are published, with a head for further tokens that transformers does not load, and fine-tunes as trainers save them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from worlds.commands import call
from worlds.family import NotTinyError, build, save
from worlds.family_merges import MERGE, finetuned, two_tuned
from worlds.multimodal import load_multimodal, save_multimodal, save_text
from worlds.project import Project
from worlds.published import add, of_file, published, speculative, with_head
from worlds.tiny import tensors_of

from workbench.ground.errors import WorkbenchError

FAMILIES = [("llama", "mtp"), ("qwen3", "mtp"), ("deepseek_v3", "layer"), ("glm4_moe", "layer")]
ONE = "bricks: {one: {checkpoint: one}}\nsteps: [{merge: task_arithmetic, bricks: {one: 0.5}}]\noutput: {dtype: float32}\n"


def made(kind: str, head: str, folder: Path) -> tuple[Any, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A family with the head in its base, the base's own tensors, and the head's."""
    family = build(kind, "", folder)
    own = of_file(folder / "base")
    extra = speculative(own, family.base.config.get_text_config().num_hidden_layers, head)
    add(folder / "base", extra)
    return family, own, extra


def merged(family: Any, text: str) -> tuple[dict[str, torch.Tensor], Any]:
    result = family.project.run(text, "test.yaml")
    return tensors_of(Path(result["model"])), result


def warnings_of(family: Any, text: str) -> list[str]:
    return list[str](family.project.resolve(text, "test.yaml").warnings)


@pytest.mark.parametrize(("kind", "head"), FAMILIES)
def test_a_full_fine_tune_lacks_the_head(kind: str, head: str, tmp_path: Path) -> None:
    """`from_pretrained`, train, `save_pretrained`: the head is gone. It stays the base's, bit for bit, and is named."""
    family, own, extra = made(kind, head, tmp_path / "world")
    save(tuned := finetuned(family, 1), tmp_path / "world" / "one")
    found, result = merged(family, ONE)
    assert found.keys() == own.keys() | extra.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in extra.items())
    assert result["warnings"] == list(warnings_of(family, ONE)), "a script that reads --json is told, too"
    after = of_file(tmp_path / "world" / "one")
    for name, tensor in own.items():
        assert (found[name].double() - (tensor.double() + after[name].double()) / 2).abs().max() < 1e-6, name
    (said,) = (text for text in warnings_of(family, ONE) if "of the base" in text)
    assert f"({len(extra)} tensors) of the base: they stay the base's; transformers does not load them" in said
    del tuned


def test_a_head_that_only_some_bricks_have(tmp_path: Path) -> None:
    """The delta of a brick without it is zero there, as that of an adapter that does not touch a tensor."""
    family, own, extra = made("llama", "mtp", tmp_path / "world")
    two_tuned(family)
    change = {name: torch.full_like(tensor, 0.25) for name, tensor in extra.items()}
    add(tmp_path / "world" / "one", {name: extra[name] + change[name] for name in extra})
    found, _ = merged(family, MERGE)
    for name, tensor in extra.items():
        assert (found[name] - (tensor + 0.7 * change[name])).abs().max() < 1e-6
    assert [text for text in warnings_of(family, MERGE) if text.startswith("brick 'two' lacks")]
    assert not [text for text in warnings_of(family, MERGE) if text.startswith("brick 'one' lacks")]
    assert found.keys() == own.keys() | extra.keys()


def test_tensors_that_the_bricks_class_does_not_use_are_left_out_and_said(tmp_path: Path) -> None:
    """A head of the brick alone, and TRL's value head; a tensor that its class uses is refused by name."""
    family = build("llama", "", tmp_path / "world")
    own = of_file(tmp_path / "world" / "base")
    save(finetuned(family, 1), tmp_path / "world" / "one")
    expected, _ = merged(family, ONE)
    add(
        tmp_path / "world" / "one",
        {**speculative(own, 2, "mtp"), "v_head.summary.weight": torch.ones(1, 32), "v_head.summary.bias": torch.ones(1)},
    )
    found, _ = merged(family, ONE)
    assert found.keys() == own.keys()
    assert all(torch.equal(found[name], expected[name]) for name in own)
    (said,) = (text for text in warnings_of(family, ONE) if "left out" in text)
    assert "because its own class in transformers does not load it: " in said
    config = tmp_path / "world" / "one" / "config.json"
    config.write_text(config.read_text().replace("LlamaForCausalLM", "LlamaForSequenceClassification"))
    add(tmp_path / "world" / "one", {"score.weight": torch.ones(2, 32)})
    with pytest.raises(WorkbenchError, match=r"has score.weight that the base does not"):
        merged(family, ONE)


@pytest.mark.part("upkeep")
def test_extract_reads_the_difference_beside_the_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family, own, extra = made("llama", "mtp", tmp_path / "world")
    tuned = finetuned(family, 1)
    save(tuned, tmp_path / "world" / "one")
    monkeypatch.chdir(tmp_path / "world")
    call("brick", "extract", "one", "--base", "base", "-o", "bricks/made", "--rank", "48")
    text = "bricks: {made: {adapter: bricks/made}}\nsteps: [{merge: task_arithmetic}]\noutput: {dtype: float32}\n"
    found, _ = merged(family, text)
    after = of_file(tmp_path / "world" / "one")
    assert all(torch.equal(found[name], tensor) for name, tensor in extra.items())
    assert max(float((found[name] - after[name]).abs().max()) for name in own) < 1e-4


@pytest.mark.parametrize("kind", ["llava", "qwen3_5"])
def test_a_text_only_save_merges_into_the_multimodal_model(kind: str, project: Project) -> None:
    """`AutoModelForCausalLM` saves the decoder alone: it is found by its class, and the encoder stays the base's."""
    whole = save_multimodal(kind, project.path / "whole", seed=1)
    text = save_text(kind, project.path / "text", seed=2)
    recipe = "base: whole\nbricks: {one: {checkpoint: text}}\nsteps: [{merge: task_arithmetic, bricks: {one: 0.5}}]\noutput: {dtype: float32}\n"
    result = project.run(recipe)
    merged, before, decoder = load_multimodal(Path(result["model"])), load_multimodal(whole), of_file(text)
    after = AutoModelForCausalLM.from_pretrained(text, dtype=torch.float32).model.state_dict()
    place = "model.language_model."
    found, start = merged.state_dict(), before.state_dict()
    assert len([name for name in start if name.startswith(place)]) == len(after)
    for name, tensor in start.items():
        other = (
            after[name.removeprefix(place)]
            if name.startswith(place)
            else decoder["lm_head.weight"]
            if name == "lm_head.weight"
            else tensor
        )
        assert (found[name] - (tensor + other) / 2).abs().max() < 1e-6, name
    (said,) = (w for w in result["warnings"] if "of the base: they stay the base's" in w)
    assert said.endswith("they lie outside the text decoder, which is what the brick holds")


def test_a_text_only_save_without_its_head_is_refused(project: Project) -> None:
    save_multimodal("llava", project.path / "whole", seed=1)
    (file,) = save_text("llava", project.path / "text", seed=2).glob("*.safetensors")
    save_file({name: t for name, t in load_file(file).items() if name != "lm_head.weight"}, file, metadata={"format": "pt"})
    with pytest.raises(WorkbenchError, match=r"lacks .*lm_head.weight"):
        project.resolve("base: whole\nbricks: {one: {checkpoint: text}}\nsteps: [{merge: task_arithmetic}]\n")


def test_the_way_with_components_says_what_a_merge_must_leave_out(project: Project) -> None:
    """With the multimodal brick among the merged ones, the result has the published decoder and nothing of the fine-tune."""
    save_multimodal("llava", project.path / "whole", seed=1)
    save_text("qwen2_5_vl", project.path / "text", seed=2)
    with pytest.raises(WorkbenchError) as caught:
        project.resolve("base: whole\nbricks: {one: {checkpoint: text}}\nsteps: [{merge: task_arithmetic}]\n")
    assert "A merge step before it names its `bricks`, without that one" in (caught.value.hint or "")


@pytest.mark.parametrize("kind", ["llava", "qwen3_5"])
def test_a_lora_of_the_text_model_merges_into_the_multimodal_one(kind: str, project: Project) -> None:
    """PEFT on `AutoModelForCausalLM`, where the hub has the multimodal checkpoint alone; compared with PEFT's own merge."""
    from peft import LoraConfig, get_peft_model

    save_multimodal(kind, project.path / "whole", seed=1)
    text = AutoModelForCausalLM.from_pretrained(save_text(kind, project.path / "text", seed=2), dtype=torch.float32)
    before = {name: t.clone() for name, t in text.model.state_dict().items()}
    torch.manual_seed(3)
    tuned = get_peft_model(text, LoraConfig(r=3, lora_alpha=6, target_modules=["down_proj", "up_proj"], init_lora_weights=False))
    tuned.save_pretrained(project.path / "lora")
    after = tuned.merge_and_unload().model.state_dict()
    recipe = "base: whole\nbricks: {one: {adapter: lora, any_base: true}}\nsteps: [{merge: task_arithmetic}]\noutput: {dtype: float32}\n"
    found = load_multimodal(Path(project.run(recipe)["model"])).state_dict()
    start = load_multimodal(project.path / "whole").state_dict()
    changed = {name for name in start if not torch.equal(start[name], found[name])}
    assert len(changed) == 4
    for name in changed:
        own = name.removeprefix("model.language_model.")
        assert (found[name] - (start[name] + after[own] - before[own])).abs().max() < 1e-5


@pytest.mark.parametrize(("kind", "module"), [("llava", "patch_embedding"), ("qwen2_5_vl", "patch_embed.proj")])
def test_an_adapter_that_saves_a_convolution_whole(kind: str, module: str, project: Project) -> None:
    """PEFT's `modules_to_save` on the kernel of an encoder, of four and five dimensions; compared with PEFT's own merge."""
    from peft import LoraConfig, get_peft_model

    base = load_multimodal(save_multimodal(kind, project.path / "whole", seed=1))
    before = {name: t.clone() for name, t in base.state_dict().items()}
    tuned = get_peft_model(base, LoraConfig(r=2, target_modules=["down_proj"], modules_to_save=[module]))
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter))
    tuned.save_pretrained(project.path / "lora")
    after = tuned.merge_and_unload().state_dict()
    recipe = "base: whole\nbricks: {one: {adapter: lora}}\nsteps: [{merge: task_arithmetic}]\noutput: {dtype: float32}\n"
    found = load_multimodal(Path(project.run(recipe)["model"])).state_dict()
    (changed,) = (name for name in before if not torch.equal(before[name], after[name]))
    assert before[changed].dim() == (4 if kind == "llava" else 5)
    assert found.keys() == after.keys()
    assert all((found[name] - after[name]).abs().max() < 1e-6 for name in found)


@pytest.mark.parametrize("own", ["model.language_model.language_model.", "language_model.model."])
def test_a_broken_prefix_is_told_with_the_line_that_renames(own: str, tmp_path: Path) -> None:
    """transformers 5.5.0 to 5.5.3 saved such names (huggingface/transformers#45357)."""
    family = build("llama", "", tmp_path / "world")
    save(finetuned(family, 1), tmp_path / "world" / "one")
    expected, _ = merged(family, ONE)
    (file,) = (tmp_path / "world" / "one").glob("*.safetensors")
    tensors = {name.replace("model.", own, 1) if name.startswith("model.") else name: t for name, t in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(WorkbenchError) as caught:
        merged(family, ONE)
    theirs, ours = (own, "model.") if "language_model.language" in own else ("language_model.", "")
    assert f"its tensors begin with '{theirs}' where the base's begin with '{ours}'; otherwise names" in caught.value.message
    line = (caught.value.hint or "").partition("under the base's: ")[2]
    assert line.startswith("python -c ")
    subprocess.run(line.replace("python", sys.executable, 1), shell=True, check=True)
    found, _ = merged(family, ONE)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_loaded_tensor_without_a_partner_is_refused(tmp_path: Path) -> None:
    family, *_ = made("llama", "mtp", tmp_path / "world")
    tuned = finetuned(family, 1)
    save(tuned, tmp_path / "world" / "one")
    (file,) = (tmp_path / "world" / "one").glob("*.safetensors")
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(WorkbenchError, match=r"lacks model.norm.weight \("):
        merged(family, ONE)


@pytest.mark.slow
@pytest.mark.skipif(not published(), reason="the families as published are not beside the checkout")
@pytest.mark.parametrize(("kind", "head"), list(with_head(published())))
def test_every_published_family_with_a_head(kind: str, head: str, tmp_path: Path) -> None:
    about = published()[kind]
    try:
        family = build(about["model_type"], about["architecture"], tmp_path / "world")
    except NotTinyError as error:
        pytest.skip(str(error))
    own = of_file(tmp_path / "world" / "base")
    extra = speculative(own, family.base.config.get_text_config().num_hidden_layers, head)
    add(tmp_path / "world" / "base", extra)
    save(finetuned(family, 1), tmp_path / "world" / "one")
    found, _ = merged(family, ONE)
    assert all(torch.equal(found[name], tensor) for name, tensor in extra.items())
    after = of_file(tmp_path / "world" / "one")
    for name, tensor in own.items():
        if tensor.is_floating_point():
            assert (found[name].double() - (tensor.double() + after[name].double()) / 2).abs().max() < 1e-6, name
