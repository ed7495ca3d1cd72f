"""`grow: components`: encoders of multimodal checkpoints around a merged language part."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from worlds.multimodal import TEXT_MODELS, answer, image_inputs, load_multimodal, save_multimodal, save_text
from worlds.project import Project
from worlds.tiny import edit_json

from workbench.ground.errors import WorkbenchError
from workbench.run.plan import plan

KINDS = tuple(TEXT_MODELS)


@pytest.fixture(scope="session")
def multimodal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For each architecture a folder with `base`, the text model; `chat`, another one; and multimodal models `eyes` and `other`."""
    out = tmp_path_factory.mktemp("multimodal")
    for kind in KINDS:
        save_text(kind, out / kind / "base", seed=0)
        save_text(kind, out / kind / "chat", seed=1)
        save_multimodal(kind, out / kind / "eyes", seed=2)
        save_multimodal(kind, out / kind / "other", seed=3)
    return out


@pytest.fixture
def world(multimodal: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Project:
    """A project of one architecture, LLaVA's by default."""
    return Project.of(tmp_path, multimodal / getattr(request, "param", "llava"))


def language(path: Path) -> dict[str, torch.Tensor]:
    """The language part of a checkpoint under the text model's names, told by hand."""
    tensors = load_file(path / "model.safetensors")
    starts = ("language_model.model.", "model.language_model.", "model.")
    found = {}
    for name, tensor in tensors.items():
        start = next((s for s in starts if name.startswith(s)), None)
        if name.endswith("lm_head.weight"):
            found["lm_head.weight"] = tensor
        elif start and not name.startswith("model.visual."):
            found["model." + name.removeprefix(start)] = tensor
    return found


ALONE = """
    bricks: {eyes: {checkpoint: eyes, part: language}}
    steps:
      - {merge: linear}
      - {grow: components, from: eyes}
    """


@pytest.mark.parametrize("world", KINDS, indirect=True)
def test_an_unchanged_language_part_answers_images_and_texts_exactly_as_the_parent(world: Project) -> None:
    kind = json.loads((world.path / "eyes" / "config.json").read_text("utf-8"))["model_type"]
    record = world.run(ALONE, out=world.path / "out")
    assert (
        load_file(world.path / "out" / "model.safetensors").keys() == load_file(world.path / "eyes" / "model.safetensors").keys()
    )
    parent, made = (load_multimodal(world.path / name) for name in ("eyes", "out"))
    image = image_inputs(kind)
    text = {"input_ids": torch.tensor([[3, 4, 5, 6]])}
    assert torch.equal(answer(parent, image), answer(made, image))
    assert torch.equal(answer(parent, text), answer(made, text))
    assert not torch.equal(answer(made, image), answer(made, image_inputs(kind, seed=1)))  # the image is seen
    (step,) = (s for s in record["steps"] if s.get("grow") == "components")
    assert step["check"]["max_logit_difference"] == 0
    assert step["check"]["kept"]["new"] == step["component_tensors"]
    card = (world.path / "out" / "README.md").read_text("utf-8")
    assert "pipeline_tag: image-text-to-text" in card
    assert "AutoModelForImageTextToText.from_pretrained" in card
    assert (world.path / "out" / "preprocessor_config.json").read_bytes() == (
        world.path / "eyes" / "preprocessor_config.json"
    ).read_bytes()


@pytest.mark.parametrize("world", KINDS, indirect=True)
def test_a_chat_vector_is_added_to_the_language_part_and_to_nothing_else(world: Project) -> None:
    kind = json.loads((world.path / "eyes" / "config.json").read_text("utf-8"))["model_type"]
    world.run(
        """
        bricks: {eyes: {checkpoint: eyes, part: language}, chat: chat}
        steps:
          - {merge: task_arithmetic, bricks: {eyes: 1, chat: 0.5}}
          - {grow: components, from: eyes}
        """,
        out=world.path / "out",
    )
    base, chat, eyes = (language(world.path / name) for name in ("base", "chat", "eyes"))
    made = language(world.path / "out")
    assert made.keys() == base.keys() == eyes.keys()
    for name, tensor in made.items():
        expected = eyes[name].double() + 0.5 * (chat[name].double() - base[name].double())
        assert torch.allclose(tensor.double(), expected, atol=1e-6), name
    parent, files = (load_file(world.path / name / "model.safetensors") for name in ("eyes", "out"))
    outside = [name for name in parent if "vis" in name or "projector" in name]
    assert len(outside) == len(parent) - len(base)
    assert all(torch.equal(parent[name], files[name]) for name in outside)
    # The same by hand: the parent's live model with the new language part.
    hand = load_multimodal(world.path / "eyes")
    state = hand.state_dict()
    for name, tensor in made.items():
        place = "lm_head.weight" if name == "lm_head.weight" else "model.language_model." + name.removeprefix("model.")
        state[place].copy_(tensor)
    image = image_inputs(kind)
    assert torch.equal(answer(hand, image), answer(load_multimodal(world.path / "out"), image))


def test_a_component_of_another_brick_of_the_class(world: Project) -> None:
    world.run(
        """
        bricks: {eyes: {checkpoint: eyes, part: language}, other: {checkpoint: other, part: language}}
        steps:
          - {merge: linear, bricks: {eyes: 1}}
          - {grow: components, from: eyes, components: {vision_tower: other}, check: tensors}
        """,
        out=world.path / "out",
    )
    eyes, other, made = (load_file(world.path / name / "model.safetensors") for name in ("eyes", "other", "out"))
    for name, tensor in made.items():
        assert torch.equal(tensor, (other if name.startswith("vision_tower.") else eyes)[name]), name


def test_another_encoder_gives_the_result_another_key(world: Project, multimodal: Path) -> None:
    first = world.resolve(ALONE).key
    changed = load_file(world.path / "eyes" / "model.safetensors")
    changed["multi_modal_projector.linear_1.bias"] += 1
    copy = world.path / "copy"
    copy.mkdir()
    save_file(changed, copy / "model.safetensors", metadata={"format": "pt"})
    for name in ("config.json", "tokenizer.json"):
        (copy / name).write_bytes((world.path / "eyes" / name).read_bytes())
    assert world.resolve(ALONE.replace("checkpoint: eyes", "checkpoint: copy")).key != first


def test_a_base_with_fewer_tokens_gets_those_of_the_brick_with_encoders(world: Project) -> None:
    """The vision model has one token more, as LLaVA has a placeholder for images that its text model lacks."""
    save_text("llava", world.path / "short", seed=0, tokens=60)
    text = """
        base: short
        bricks: {eyes: {checkpoint: eyes, part: language}}
        steps:
          - {merge: task_arithmetic}
          - {grow: components, from: eyes}
        """
    with pytest.raises(WorkbenchError, match="has 64 rows"):
        world.resolve(text)
    world.run(text + "tokenizer: {source: eyes}\n", out=world.path / "out")
    eyes, made = (load_file(world.path / name / "model.safetensors") for name in ("eyes", "out"))
    assert made.keys() == eyes.keys()
    assert all(torch.allclose(made[name], eyes[name], atol=1e-6) for name in eyes)
    image = image_inputs("llava")
    parent, found = (answer(load_multimodal(world.path / name), image) for name in ("eyes", "out"))
    assert torch.allclose(parent, found, atol=1e-5)
    assert (world.path / "out" / "preprocessor_config.json").is_file()
    with pytest.raises(WorkbenchError, match="whose placeholders for images are tokens of its own tokenizer"):
        world.resolve(text + "tokenizer: {source: union}\n")


def test_a_tied_brick_around_an_untied_language_part_gets_a_head(world: Project) -> None:
    save_multimodal("llava", world.path / "tied", seed=4, tied=True)
    assert "lm_head" not in " ".join(load_file(world.path / "tied" / "model.safetensors"))
    world.run(ALONE.replace("checkpoint: eyes", "checkpoint: tied"), out=world.path / "out")
    image = image_inputs("llava")
    parent, made = (load_multimodal(world.path / name) for name in ("tied", "out"))
    assert torch.equal(answer(parent, image), answer(made, image))
    assert not made.config.get_text_config().tie_word_embeddings


def test_two_bricks_with_encoders_share_a_language_merge(world: Project) -> None:
    """TIES or any other merge of two multimodal bricks: each result keeps its own encoder, and both have the same language part."""
    text = """
        bricks: {{eyes: {{checkpoint: eyes, part: language}}, other: {{checkpoint: other, part: language}}}}
        steps:
          - {{merge: ties, density: 0.5}}
          - {{grow: components, from: {source}, check: tensors}}
        """
    for source in ("eyes", "other"):
        world.run(text.format(source=source), out=world.path / f"out-{source}")
    one, two = (language(world.path / f"out-{source}") for source in ("eyes", "other"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["lm_head.weight"], language(world.path / "eyes")["lm_head.weight"])


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ("{grow: components, from: [eyes, other]}", "no class with the encoders of two"),
        ("{grow: components, from: nose}", "no brick 'nose'"),
        ("{grow: components, from: eyes}\n  - {merge: linear}", "no step can follow `grow: components`"),
        ("{grow: components, from: plain}", "must be a multimodal checkpoint with `part: language`"),
        ("{grow: components, from: eyes, components: {ears: other}}", "has no component 'ears'"),
        ("{grow: components, from: eyes, components: {vision_tower: wide}}", "collides with that of brick 'eyes': vision_config"),
        ("{grow: components, from: eyes, train: {data: x.jsonl, steps: 1}}", "`train` trains text models"),
        ("{merge: linear, bricks: {plain: 1}}", "add `part: language`|part: language"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_work(world: Project, steps: str, words: str) -> None:
    if "wide" in steps:
        save_multimodal("llava", world.path / "wide", seed=5, intermediate_size=32)
    unit = "wide: {checkpoint: wide, part: language}, " if "wide" in steps else ""
    plain = "plain: {checkpoint: eyes}, " if "plain" in steps else ""
    bricks = f"{unit}{plain}eyes: {{checkpoint: eyes, part: language}}, other: {{checkpoint: other, part: language}}"
    with pytest.raises(WorkbenchError) as error:
        plan(world.resolve(f"bricks: {{{bricks}}}\nsteps:\n  - {steps}\n"), world.path / "runs")
    assert any(word in f"{error.value.message} {error.value.hint}" for word in words.split("|")), error.value


def test_models_of_other_widths_and_settings_are_refused(world: Project, tmp_path: Path) -> None:
    text = (
        "bricks: {eyes: {checkpoint: narrow, part: language}}\nsteps:\n  - {merge: linear}\n  - {grow: components, from: eyes}\n"
    )
    narrow = tmp_path / "narrow"
    narrow.mkdir()
    tensors = load_file(world.path / "eyes" / "model.safetensors")
    name = "language_model.model.layers.0.mlp.up_proj.weight"
    save_file({**tensors, name: tensors[name][:40].contiguous()}, narrow / "model.safetensors", metadata={"format": "pt"})
    for file in ("config.json", "tokenizer.json"):
        (narrow / file).write_bytes((world.path / "eyes" / file).read_bytes())
    with pytest.raises(WorkbenchError, match="is \\[40, 32\\], the base has \\[48, 32\\]"):
        world.resolve(text)
    save_file(tensors, narrow / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((narrow / "config.json").read_text("utf-8"))
    edit_json(narrow / "config.json", text_config={**config["text_config"], "rms_norm_eps": 1e-5})
    with pytest.raises(WorkbenchError, match="rms_norm_eps, so its text decoder computes another function"):
        world.resolve(text)


def test_part_is_for_checkpoints_with_encoders(world: Project) -> None:
    with pytest.raises(WorkbenchError, match=r"all tensors .* belong to its text decoder"):
        world.resolve("bricks: {chat: {checkpoint: chat, part: language}}\nsteps:\n  - {merge: linear}\n")
    with pytest.raises(WorkbenchError, match="is for a multimodal checkpoint"):
        world.resolve("bricks: {chat: {adapter: chat, part: language}}\nsteps:\n  - {merge: linear}\n")


@pytest.mark.parametrize("kind", ["llava", "qwen2_5_vl"])
def test_depth_of_a_multimodal_base_is_checked(kind: str, tmp_path: Path) -> None:
    """The written model is loaded with its own class, and answers texts as before."""
    (tmp_path / "recipes").mkdir()
    save_multimodal(kind, tmp_path / "base", seed=1)
    (step,) = Project(tmp_path).run("base: base\nsteps: [{grow: depth, blocks: 1}]\n")["steps"]
    assert step["check"]["max_logit_difference"] == 0
