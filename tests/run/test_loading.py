"""The line that `run` prints for loading its result: the class that keeps all of the model."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from typer.testing import CliRunner

from worlds.project import Project
from worlds.tiny import config, save_finetuned, save_model

from workbench.cli.app import app
from workbench.ground.foreign_names import convert_command

_VISION = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}


def _llava() -> Any:
    vision = transformers.CLIPVisionConfig(num_hidden_layers=2, **_VISION)
    made = transformers.LlavaConfig(text_config=config("llama", 2), vision_config=vision, image_token_index=3)
    return transformers.LlavaForConditionalGeneration(made)


def _llama4() -> Any:
    text = {
        "hidden_size": 32, "intermediate_size": 48, "intermediate_size_mlp": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 64, "num_local_experts": 2, "pad_token_id": 0,
    }  # fmt: skip
    vision = {**_VISION, "num_hidden_layers": 1, "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32}
    return transformers.Llama4ForConditionalGeneration(transformers.Llama4Config(text_config=text, vision_config=vision))


def _resnet() -> Any:
    made = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3)
    return transformers.ResNetForImageClassification(made)


def _gpt2() -> Any:
    return transformers.GPT2LMHeadModel(config("gpt2", 2))


MODELS: dict[str, tuple[Callable[[], Any], str, str]] = {
    "llava": (_llava, "AutoModelForImageTextToText", "image-text-to-text"),
    "llama4": (_llama4, "AutoModelForImageTextToText", "image-text-to-text"),
    "resnet": (_resnet, "AutoModelForImageClassification", "image-classification"),
    "gpt2": (_gpt2, "AutoModelForCausalLM", "text-generation"),
}


@pytest.mark.parametrize("family", MODELS)
def test_the_printed_line_loads_all_of_the_model(family: str, tmp_path: Path, cwd: Path) -> None:
    make, loader, task = MODELS[family]
    (tmp_path / "recipes").mkdir()
    torch.manual_seed(0)
    made = make()
    made.save_pretrained(tmp_path / "base")
    save_finetuned(tmp_path / "base", tmp_path / "tuned", seed=1)
    (tmp_path / "recipes/vl.yaml").write_text(
        "version: 1\nbase: base\nbricks: {tuned: tuned}\nsteps: [{merge: linear}]\n", "utf-8"
    )
    result = CliRunner().invoke(app, ["run", "recipes/vl.yaml", "--device", "cpu"])
    assert result.exit_code == 0, result.output
    line = re.search(r"load: +(\S+)\.from_pretrained\(\"(.+?)\"\)", result.output)
    assert line, result.output
    assert line[1] == loader
    model = getattr(transformers, line[1]).from_pretrained(line[2])
    assert type(model) is type(made)
    expected = {n: t for n, t in make().state_dict().items() if t.is_floating_point()}
    assert {n for n, _ in model.state_dict().items()} >= set(expected)
    tuned = type(made).from_pretrained(tmp_path / "tuned").state_dict()
    for name in expected:
        torch.testing.assert_close(model.state_dict()[name], tuned[name])
    readme = (Path(line[2]) / "README.md").read_text("utf-8")
    assert yaml.safe_load(readme.split("---")[1])["pipeline_tag"] == task
    assert f"model = {loader}.from_pretrained(" in readme


def test_a_pickled_multimodal_model_is_converted_whole(tmp_path: Path) -> None:
    _llava().config.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(
        (tmp_path / "config.json").read_text("utf-8").replace("{", '{"architectures": ["LlavaForConditionalGeneration"],', 1),
        "utf-8",
    )
    assert "import LlavaForConditionalGeneration as M" in convert_command(tmp_path)
    assert "import AutoModelForCausalLM as M" in convert_command(tmp_path / "nothing")


def test_an_adapter_of_a_text_model_says_nothing_more(project: Project, cwd: Path) -> None:
    project.write("bricks: {one: bricks/one}\nsteps: [{merge: task_arithmetic}]\noutput: {form: adapter}\n", "adapter.yaml")
    result = CliRunner().invoke(app, ["run", "recipes/adapter.yaml", "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert "AutoModelForCausalLM" in result.output
    assert "text decoder" not in result.output


def test_chat_with_a_model_of_images_is_refused(tmp_path: Path, cwd: Path) -> None:
    from transformers import ViTConfig, ViTModel

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28}
    ViTModel(ViTConfig(**sizes)).save_pretrained(tmp_path / "vl")
    save_model(tmp_path / "text")
    for file in (tmp_path / "text").glob("token*"):
        file.rename(tmp_path / "vl" / file.name)
    result = CliRunner().invoke(app, ["chat", "vl"])
    assert result.exit_code == 1
    assert "model_type vit is not a decoder-only language model" in str(result.exception or result.output)
