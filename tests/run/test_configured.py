"""Overrides of config.json (`output: {config:}`): what is written, what a loaded model computes, keys, and what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from worlds.commands import call, document
from worlds.project import CPU, Project
from worlds.routing import write_prompts
from worlds.tiny import config as family_config
from worlds.tiny import edit_json, tensors_of

from workbench.ground.errors import InvalidRecipeError, WorkbenchError
from workbench.ground.events import no_events
from workbench.models.layout import Model
from workbench.run import compose as composing
from workbench.run.compose import step_context
from workbench.run.configured import configured
from workbench.run.device import needs_no_torch
from workbench.run.materialize import configuration_digest, materialize
from workbench.run.opened import refers_to_base

STEPS = "bricks: {one: bricks/one}\nsteps: [{merge: task_arithmetic}]\n"
YARN = "{rope_scaling: {rope_type: yarn, factor: 4.0, original_max_position_embeddings: 64}, max_position_embeddings: 256}"
TOKENS = torch.tensor([[2, 7, 9, 30, 11, 5]])


def recipe(config: str, steps: str = STEPS, **output: str) -> str:
    fields = ", ".join(f"{key}: {value}" for key, value in {**output, "config": config}.items())
    return f"{steps}output: {{{fields}}}\n"


def written(result: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((Path(result["model"]) / "config.json").read_text("utf-8"))
    return found


def logits(place: str | Path, **settings: Any) -> torch.Tensor:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(place)
    for name, value in settings.items():
        setattr(config, name, value)
    model = AutoModelForCausalLM.from_pretrained(place, config=config, dtype=torch.float32)
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.fixture(params=["rope_parameters", "rope_theta"])
def layout(request: pytest.FixtureRequest, project: Project) -> str:
    """Names of rotary settings in the base's config.json: those of transformers 5, and those of files before it."""
    base = Path(shutil.copytree((project.path / "base").resolve(), project.path / "own"))
    if request.param == "rope_theta":
        data = json.loads((base / "config.json").read_text("utf-8"))
        rope = data.pop("rope_parameters")
        (base / "config.json").write_text(json.dumps({**data, "rope_theta": rope["rope_theta"], "rope_scaling": None}), "utf-8")
    return str(request.param)


def test_a_rotary_base_is_written_where_the_file_has_it_and_decides_the_logits(project: Project, layout: str) -> None:
    plain = project.run(f"base: own\n{STEPS}")
    result = project.run(f"base: own\n{recipe('{rope_theta: 500}')}")
    config, before = written(result), written(plain)
    if layout == "rope_theta":
        assert config == {**before, "rope_theta": 500}
    else:
        assert config == {**before, "rope_parameters": {"rope_type": "default", "rope_theta": 500}}
    tensors, others = tensors_of(Path(result["model"])), tensors_of(Path(plain["model"]))
    assert all(torch.equal(tensors[name], others[name]) for name in tensors.keys() | others.keys())
    expected = logits(plain["model"], rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    torch.testing.assert_close(logits(result["model"]), expected)
    assert not torch.allclose(logits(result["model"]), logits(plain["model"]), atol=1e-3)


def test_yarn_takes_the_place_of_the_scaling_before(project: Project, layout: str) -> None:
    llama3 = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    if layout == "rope_theta":
        edit_json(project.path / "own/config.json", rope_scaling=llama3)
    else:
        edit_json(project.path / "own/config.json", rope_parameters={**llama3, "rope_theta": 10000.0})
    config = written(project.run(f"base: own\n{recipe(YARN)}"))
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    assert config["max_position_embeddings"] == 256
    if layout == "rope_theta":
        assert (config["rope_theta"], config["rope_scaling"]) == (10000.0, yarn)
        assert "rope_parameters" not in config
    else:
        assert config["rope_parameters"] == {"rope_theta": 10000.0, **yarn}
    same = written(project.run(f"base: own\n{recipe('{rope_scaling: {factor: 4.0}}')}"))
    kept = same["rope_scaling"] if layout == "rope_theta" else same["rope_parameters"]
    assert {**llama3, "factor": 4.0}.items() <= kept.items(), "the fields of the same type are kept"
    none = written(project.run(f"base: own\n{recipe('{rope_scaling: null}')}"))
    assert none.get("rope_scaling") is None
    assert "rope_parameters" not in none or none["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000.0}


def test_the_live_model_and_the_digests_are_those_of_the_files(project: Project) -> None:
    text = recipe("{rope_theta: 500, rms_norm_eps: 1}")
    resolved = project.resolve(text)
    digest, _ = configuration_digest(resolved, CPU)
    result = project.run(text)
    assert result["configuration"] == digest
    live = materialize(resolved, CPU).float()
    with torch.no_grad():
        torch.testing.assert_close(live(TOKENS).logits, logits(result["model"]))
    assert written(result)["rms_norm_eps"] == 1.0
    assert isinstance(written(result)["rms_norm_eps"], float), "a whole number is a number"


def test_keys_have_the_override_and_only_where_there_is_one(project: Project) -> None:
    plain, other, same = (project.resolve(text) for text in (STEPS, recipe("{rope_theta: 500}"), recipe("{rope_theta: 500}")))
    assert other.key == same.key != plain.key
    assert other.run_key == same.run_key != plain.run_key
    assert other.stamp == same.stamp != plain.stamp
    assert other.keys == plain.keys, "no step computes with it"
    assert "config" not in plain.recipe.fields.output.model_dump(), "keys of other recipes stay"
    digests = [project.run(text)["configuration"] for text in (STEPS, recipe("{rope_theta: 500}"))]
    assert digests[0] != digests[1]


def test_a_field_that_no_digest_covers_has_a_run_of_its_own(project: Project) -> None:
    plain, other = project.resolve(STEPS), project.resolve(recipe("{use_cache: false}"))
    assert other.key == plain.key
    assert other.run_key != plain.run_key
    assert written(project.run(recipe("{use_cache: false}")))["use_cache"] is False


def test_steps_work_with_the_settings_of_the_base(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    resolved = project.resolve(recipe("{rope_theta: 500}"))
    assert needs_no_torch(project.resolve(STEPS))
    assert not needs_no_torch(resolved), "transformers checks the override"
    assert step_context(resolved, 0, CPU, no_events).model_before().config == resolved.base.config
    monkeypatch.setattr(composing, "kind_of", lambda step: pytest.fail("a step was applied"))
    with pytest.raises(InvalidRecipeError, match="rope_thet: LlamaConfig has no such field"):
        materialize(project.resolve(recipe("{rope_thet: 5}")), CPU)


def test_plan_record_and_card_say_it(project: Project, cwd: None) -> None:
    project.write(recipe("{rope_theta: 500}"))
    assert document("plan", "test")["config"] == {"rope_theta": 500}
    assert "config.json: {rope_theta: 500}\n" in call("plan", "test").stdout
    result = document("run", "test")
    record = json.loads((Path(result["run"]) / "run.json").read_text("utf-8"))
    assert record["recipe"]["output"]["config"] == {"rope_theta": 500}
    card = (Path(result["model"]) / "README.md").read_text("utf-8")
    assert "| changed in config.json | value |\n| --- | --- |\n| `rope_theta` | 500 |\n" in card
    project.write(STEPS)
    assert "config" not in document("plan", "test")
    assert "changed in config.json" not in (Path(document("run", "test")["model"]) / "README.md").read_text("utf-8")


def test_set_overrides_one_field(project: Project, cwd: None) -> None:
    project.write(STEPS)
    result = document("run", "test", "--set", "output.config.rope_theta=500")
    assert written(result)["rope_parameters"]["rope_theta"] == 500


def test_a_grown_model_and_a_control(project: Project) -> None:
    """A growth step keeps its promise on the base's settings; the override is that of the result. Controls have none."""
    text = recipe("{rope_theta: 500}", "steps: [{grow: depth, blocks: 1, check: full}]\n")
    config = written(project.run(text))
    assert config["num_hidden_layers"] == 5
    assert config["rope_parameters"]["rope_theta"] == 500
    assert project.resolve(text).recipe.derive("base", []).fields.output.config is None


def test_a_recipe_with_an_override_as_a_brick_is_a_warning(project: Project) -> None:
    project.write(recipe("{rope_theta: 500}"), "inner.yaml")
    text = "bricks: {inner: {recipe: recipes/inner.yaml}}\nsteps: [{merge: task_arithmetic}]\n"
    resolved = project.resolve(text)
    assert "brick 'inner': a merge takes tensors, and leaves out the `output: {config:}` of inner" in resolved.warnings
    assert written(project.run(text))["rope_parameters"]["rope_theta"] == 10000.0
    project.write(STEPS, "inner.yaml")
    assert not project.resolve(text).warnings


def test_a_routed_configuration_gets_a_checkpoint_of_its_own(project: Project) -> None:
    write_prompts(project.path / "calibration", {"one": 0, "two": 1})
    routed = "bricks: {one: bricks/one, two: bricks/two}\nsteps: [{route: ridge, calibration: 'calibration/{brick}.jsonl'}]\n"
    assert refers_to_base(project.resolve(routed))
    assert not refers_to_base(project.resolve(recipe("{rope_theta: 500}", routed)))


# -- other families, from headers


def of(project: Project, config: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """The config.json of a result of another family."""
    resolved = project.resolve(STEPS)
    fields = resolved.recipe.fields
    output = fields.output.model_copy(update={"config": overrides})
    changed = replace(resolved, recipe=replace(resolved.recipe, fields=fields.model_copy(update={"output": output})))
    return configured(changed, Model(resolved.base.weights, config)).config


def plain(config: Any) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return data


@pytest.fixture
def mixed() -> dict[str, Any]:
    """A Gemma 3 with a vision tower, whose kinds of layers have rotary settings of their own."""
    from transformers import Gemma3Config

    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8,
            "num_key_value_heads": 2, "vocab_size": 64, "layer_types": ["sliding_attention", "full_attention"]}  # fmt: skip
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    return plain(Gemma3Config(text_config=text, vision_config=vision))


def test_a_part_of_a_multimodal_model(project: Project, mixed: dict[str, Any]) -> None:
    rope = {"full_attention": {"rope_type": "linear", "factor": 8.0}}
    found = of(project, mixed, {"text_config": {"sliding_window": 8, "rope_parameters": rope}})
    text = mixed["text_config"]
    assert found["text_config"]["sliding_window"] == 8
    assert found["text_config"]["rope_parameters"] == {
        "sliding_attention": text["rope_parameters"]["sliding_attention"],
        "full_attention": {"rope_theta": 1_000_000.0, "rope_type": "linear", "factor": 8.0},
    }
    changed = ("sliding_window", "rope_parameters")
    assert {k: v for k, v in found["text_config"].items() if k not in changed} == {
        k: v for k, v in text.items() if k not in changed
    }
    assert {k: v for k, v in found.items() if k != "text_config"} == {k: v for k, v in mixed.items() if k != "text_config"}


@pytest.mark.parametrize(
    ("overrides", "message", "hint"),
    [
        ({"sliding_window": 8}, "sliding_window: Gemma3Config has no such field", "Write `text_config: {sliding_window: …}`."),
        ({"text_config": {"rope_theta": 5}}, "text_config.rope_theta: expected `rope_parameters: {full_attention: {…}}`", None),
        ({"text_config": {"rope_parameters": {"all": {"rope_theta": 5}}}}, "because kinds of layers differ", None),
        (
            {"text_config": {"sliding_windw": 8}},
            "text_config.sliding_windw: Gemma3TextConfig has no such field",
            "'sliding_window'",
        ),
        ({"text_config": 3}, "text_config: expected fields, found 3", None),
        ({"text_config": {"vocab_size": 65}}, "embed_tokens.weight is [64, 32], and would be [65, 32]", "`tokenizer` block"),
    ],
)
def test_parts_are_checked_by_their_class(
    project: Project, mixed: dict[str, Any], overrides: dict[str, Any], message: str, hint: str | None
) -> None:
    with pytest.raises(WorkbenchError) as caught:
        of(project, mixed, overrides)
    assert message in caught.value.message
    assert hint is None or hint in (caught.value.hint or "")


def test_names_of_the_class_and_of_the_file(project: Project) -> None:
    gpt2 = plain(family_config("gpt2"))
    assert of(project, gpt2, {"layer_norm_epsilon": 1e-6})["layer_norm_epsilon"] == 1e-6
    for name in ("n_head", "num_attention_heads"):
        with pytest.raises(WorkbenchError, match=f"{name} cannot be overridden") as caught:
            of(project, gpt2, {name: 2})
        assert caught.value.hint == "With other heads, equal tensors are another model."
    for name in ("n_positions", "max_position_embeddings"):
        with pytest.raises(WorkbenchError, match=rf"{name}: transformer\.wpe\.weight is \[64, 32\], and would be \[128, 32\]"):
            of(project, gpt2, {name: 128})
    with pytest.raises(WorkbenchError, match="rope_theta: GPT2Config has no such field"):
        of(project, gpt2, {"rope_theta": 5})
    from transformers import GPTJConfig

    gptj = plain(GPTJConfig(n_embd=32, n_layer=1, n_head=4, rotary_dim=4, vocab_size=64, n_positions=64))
    assert of(project, gptj, {"max_position_embeddings": 128}) == {**gptj, "n_positions": 128}
    other = {("max_position_embeddings" if name == "n_positions" else name): value for name, value in gptj.items()}
    assert of(project, other, {"max_position_embeddings": 128}) == {**other, "max_position_embeddings": 128}


def test_the_number_of_active_experts(project: Project) -> None:
    from transformers import MixtralConfig

    mixtral = MixtralConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, vocab_size=64
    )
    assert of(project, plain(mixtral), {"num_experts_per_tok": 1}) == {**plain(mixtral), "num_experts_per_tok": 1}
    with pytest.raises(WorkbenchError, match=r"num_local_experts: .*, and would be"):
        of(project, plain(mixtral), {"num_local_experts": 4})


# -- refused before any work

BAD = {
    "{rope_thet: 5}": ("rope_thet: LlamaConfig has no such field", "Did you mean 'rope_theta'?"),
    "{max_position_embeddings: 64.5}": ("'max_position_embeddings' expected int, got float", None),
    "{max_position_embeddings: true}": ("max_position_embeddings: expected a value like 64, found True", None),
    "{max_position_embeddings: null}": ("'max_position_embeddings' expected int, got NoneType", None),
    "{rms_norm_eps: small}": ("'rms_norm_eps' expected float, got str", None),
    "{hidden_act: nothing}": ("transformers refuses it: 'nothing'", None),
    "{num_hidden_layers: 3}": ("model.layers.3.self_attn.q_proj.weight is [32, 32], and would be None", "`grow` step"),
    "{hidden_size: 64}": ("model.embed_tokens.weight is [64, 32], and would be [64, 64]", "`grow` step"),
    "{vocab_size: 65}": ("model.embed_tokens.weight is [64, 32], and would be [65, 32]", "`tokenizer` block"),
    "{attention_bias: true}": ("q_proj.bias is None, and would be [32]", None),
    "{tie_word_embeddings: false}": ("tied heads is ['lm_head.weight'], and would be []", None),
    "{num_attention_heads: 2}": ("num_attention_heads cannot be overridden", "another model"),
    "{head_dim: 16}": ("head_dim cannot be overridden", "another model"),
    "{dtype: float32}": ("dtype cannot be overridden", "Write `output: {dtype: …}`."),
    "{model_type: mistral}": ("model_type cannot be overridden", "The base and the steps decide it."),
    "{rope_scaling: 4}": ("rope_scaling: expected fields, found 4", None),
    "{rope_theta: big}": ("rope_theta: found 'big', expected a number above 0", None),
    "{rope_theta: -1}": ("rope_theta: found -1, expected a number above 0", None),
    "{rope_theta: true}": ("rope_theta: found True, expected a number above 0", None),
    "{rope_scaling: {rope_type: yarn, factor: 4.0}}": ("Missing required keys", None),
    "{rope_scaling: {rope_type: yarn, factor: 4.0}, max_position_embeddings: 256}": ("original_max_position_embeddings", None),
    "{rope_scaling: {rope_type: yarn, factor: 0.5, original_max_position_embeddings: 64}}": ("must be a float or int >= 1, got 0.5", None),
    "{rope_scaling: {type: yarm, factor: 4.0}}": ("'rope_type'='yarm'", None),
    "{rope_parameters: {bogus: 3}}": ("Unrecognized keys in `rope_parameters` for 'rope_type'='default': {'bogus'}", None),
    "{max_position_embeddings: 512, rope_scaling: {rope_type: yarn, factor: 4.0, original_max_position_embeddings: 64}}": (
        "does not match the ratio implicitly set by other parameters (implicit factor", None),
}  # fmt: skip


@pytest.mark.parametrize("config", BAD)
def test_a_bad_override_is_refused_by_plan_run_and_in_memory_alike(project: Project, config: str) -> None:
    from workbench.run.plan import plan

    message, hint = BAD[config]
    resolved = project.resolve(recipe(config))
    for use in (
        lambda: plan(resolved, project.path / "runs"),
        lambda: project.run(recipe(config)),
        lambda: materialize(resolved, CPU),
    ):
        with pytest.raises(InvalidRecipeError) as caught:
            use()
        assert (
            caught.value.message.startswith("recipes/test.yaml:5:10 output.config: ") or "output.config: " in caught.value.message
        )
        assert message in caught.value.message
        assert hint is None or hint in (caught.value.hint or "")
    assert not list((project.path / "runs").glob("*")), "nothing was begun"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("output: {config: {}}", "output.config: expected at least 1"),
        ("output: {config: 3}", "output.config: expected a mapping, found 3"),
        ("output: {config: {rope_theta: .inf}}", "Out of range float values are not JSON compliant"),
        (
            "output: {form: adapter, config: {rope_theta: 5}}",
            "an adapter has no config.json, so `config` belongs to another `form`",
        ),
    ],
)
def test_what_the_schema_refuses(project: Project, text: str, message: str) -> None:
    with pytest.raises(InvalidRecipeError) as caught:
        project.resolve(f"{STEPS}{text}\n")
    assert message in caught.value.message
