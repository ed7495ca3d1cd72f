"""`workbench recipe import`: what does not carry over, by field and line; notes; paths, files and the command."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from worlds.commands import call, refused
from worlds.mergekit_runs import EXAMPLES, difference, imported, run_mergekit

from workbench.exchange.mergekit import import_recipe
from workbench.ground.errors import WorkbenchError

HEAD = "merge_method: ties\nbase_model: base\n"
MOE = "base_model: base\nexperts:\n  - {source_model: one}\n  - {source_model: two}\ngate_mode: random\n"
ONE = "models: [{model: one, parameters: {weight: 1}}]\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bricks: {}\n", "expected a mergekit configuration with a merge_method"),
        ("merge_method: passthrough\nslices:\n- sources: []\n", "1:1 names no model to start from"),
        ("experts: []\nbase_model: base\n", "1:1 experts: expected a list of at least two experts, found 0"),
        (MOE.replace("random", "best"), "gate_mode: found 'best'; expected one of hidden,"),
        (MOE + "shared_experts: [{source_model: one}]\n", "shared_experts: `grow: experts` cannot make shared experts"),
        (MOE + "architecture: deepseek\n", "architecture: found 'deepseek'; expected one of auto, mixtral, qwen, qwen3"),
        (MOE.replace("one", "two"), "experts.1: two is listed twice among the experts"),
        (MOE.replace("one}", "one, noise_scale: 0.1}"), "experts.0.noise_scale: `grow: experts` cannot add noise"),
        (MOE.replace("one}", "one, residual_scale: 0.5}"), "experts.0.residual_scale: `grow: experts` cannot scale an expert's output"),
        (MOE.replace("random", "hidden"), "experts.0.positive_prompts: gate_mode hidden needs prompts"),
        ("merge_method: tie\n" + ONE, "1:1 merge_method: unknown method 'tie'. Did you mean 'ties'?"),
        (HEAD + ONE + "slices: [{sources: []}]\n", "expected exactly one of models, slices, modules; found models, slices"),
        (HEAD + "slices:\n  - sources:\n      - {model: base, layer_range: [1, 4]}\n", "4:5 slices.0: ties takes at least 1 models in a slice beside the base, found 0"),
        (HEAD + "slices:\n  - sources:\n      - {model: base, layer_range: [0, -1]}\n", "slices.0.sources.0.layer_range: found [0, -1]"),
        (HEAD + "slices:\n  - sources:\n      - {model: one, layer_range: [0, 4], parameters: {weight: 1}}\n", "2:1 base_model: base is not among the sources"),
        (HEAD + "slices:\n  - base_model: two\n    sources:\n      - {model: base, layer_range: [0, 4]}\n", "4:5 slices.0.base_model: differs from base_model base"),
        (HEAD + "modules:\n  text_decoder: {" + ONE.strip() + "}\n", "modules: expected one module named `default`, found text_decoder"),
        ("merge_method: ties\n" + ONE, "merge_method: ties needs a base_model"),
        (HEAD + "models: [{model: {model: {path: one}, override_architecture: X}, parameters: {weight: 1}}]\n", "3:39 models.0.model.override_architecture"),
        (HEAD + "models: [{model: one@a@b}]\n", "models.0.model: expected path[@revision], found 'one@a@b'"),
        (HEAD + "models: [{model: a+b+c}]\n", "models.0.model: expected path[@revision][+lora[@revision]]"),
        (HEAD + "models: [{model: lora, parameters: {weight: 1}}]\n", "models.0.model: lora is an adapter; mergekit reads it as BASE+lora"),
        (HEAD + "models: [{model: two+lora-two, parameters: {weight: 1}}]\n", "models.0.model: two+lora-two is an adapter on a model other than the base"),
        (HEAD + "models: [{model: one, parameters: {weight: 1}}, {model: one, parameters: {weight: 1}}]\n", "models.1.model: one is listed twice among the inputs"),
        (HEAD + "models: [{model: one}]\n", "models.0.model: ties requires a weight here; mergekit rejects this too"),
        (HEAD + "models: [{model: one, parameters: {weight: [{filter: mlp, value: 1}]}}]\n", "parameters.weight.0: no value for tensors that no filter matches"),
        (HEAD + "models: [{model: one, parameters: {weight: heavy}}]\n", "parameters.weight: expected float, found 'heavy'"),
        (HEAD + "models: [{model: one, parameters: {weight: [1, {value: 1}]}}]\n", "parameters.weight: expected a value, a list of values or a list of"),
        (HEAD + ONE + "parameters: {normalize: [{filter: mlp, value: false}, {value: true}]}\n", "4:26 parameters.normalize.0: normalize differs between tensors"),
        (HEAD + ONE + "dtype: bf16\n", "4:1 dtype: found 'bf16'; expected one of float32, float16, bfloat16"),
        (HEAD + ONE + "dtype: float64\n", "4:1 dtype: float64 outputs are not supported"),
        (HEAD + ONE + "tokenizer: {source: gone/away}\n", "4:13 tokenizer.source: gone/away is neither the base nor a checkpoint among the inputs"),
        (HEAD + ONE + "tokenizer_source: base\ntokenizer: {source: union}\n", "tokenizer: cannot be used together with tokenizer_source"),
        (HEAD + "models: [{model: base+lora, parameters: {weight: 1}}]\ntokenizer_source: base+lora\n", "4:1 tokenizer_source: base+lora is neither the base nor a checkpoint"),
        ("merge_method: slerp\nbase_model: base\nmodels: [{model: one}, {model: two}]\nparameters: {t: 0.5}\n", "merge_method: slerp takes exactly 1 model beside the base, found 2"),
        ("merge_method: slerp\nbase_model: base\nmodels: [{model: one}]\n", "merge_method: slerp requires the parameter t"),
        ("merge_method: nearswap\nbase_model: base\nmodels: [{model: one}]\n", "merge_method: nearswap requires the parameter t"),
        ("merge_method: passthrough\nmodels: [{model: one}, {model: two}]\n", "merge_method: passthrough takes exactly 1 model, found 2"),
    ],
)  # fmt: skip
def test_refused_by_field_and_line(text: str, message: str, tmp_path: Path, in_mergekit_project: None) -> None:
    (tmp_path / "merge.yml").write_text(text, "utf-8")
    with pytest.raises(WorkbenchError) as caught:
        import_recipe(tmp_path / "merge.yml")
    assert message in caught.value.message
    assert caught.value.exit_code == 2


def test_all_problems_are_listed_at_once(tmp_path: Path, in_mergekit_project: None) -> None:
    (tmp_path / "merge.yml").write_text(HEAD + ONE + "dtype: bf16\ntokenizer: {source: gone}\nout_dtype: int64\n", "utf-8")
    with pytest.raises(WorkbenchError) as caught:
        import_recipe(tmp_path / "merge.yml")
    assert [line.split(" ")[1] for line in caught.value.message.splitlines()] == ["dtype:", "out_dtype:", "tokenizer.source:"]


def test_notes_name_what_mergekit_ignores(mergekit_project: Path, tmp_path: Path, in_mergekit_project: None) -> None:
    """mergekit reads all of this without a word; the numbers are its own, the notes say what was not used."""
    text = """\
merge_method: task_arithmetic
base_model: base
name: mine
slices:
  - residual_weight: 0.5
    sources:
      - {model: base, layer_range: [0, 4]}
      - model: one
        layer_range: [0, 4]
        weigth: 0.5
        parameters:
          weight: [{filter: lm_head, value: 1}, {value: 0.4}]
          lambda: 3
          density: 0.5
parameters: {lamda: 2, int8_mask: true}
chat_template: chatml
dtype: float32
"""
    ours, recipe, notes = imported(text, mergekit_project)
    assert difference(ours, run_mergekit(yaml.safe_load(text), tmp_path / "out")) <= 1e-6
    expected = [
        "line 3, name: mergekit has no such field and ignores it, so it is omitted",
        "line 10, slices.0.sources.1.weigth: mergekit has no such field and ignores it, so it is omitted",
        "line 5, slices.0.residual_weight: mergekit does not use it, so it is omitted",
        "line 17, chat_template: chatml: not carried over, the output keeps the template of its tokenizer; the weights are the same",
        "line 12, slices.0.sources.1.parameters.weight.0: filter 'lm_head' matches no tensor of the base, so it is omitted",
        "line 13, slices.0.sources.1.parameters.lambda: applies to all inputs, so mergekit ignores it for one input, and it is omitted",
        "line 14, slices.0.sources.1.parameters.density: has no effect on the result of task_arithmetic, so it is omitted",
        "line 15, parameters.lamda: task_arithmetic has no such parameter and mergekit ignores it (Did you mean 'lambda'?), so it is omitted",
        "line 15, parameters.int8_mask: has no effect on the result of task_arithmetic, so it is omitted",
    ]
    line = text.splitlines().index("chat_template: chatml") + 1
    assert sorted(notes) == sorted(note.replace("line 17, chat", f"line {line}, chat") for note in expected)
    assert all(re.sub(r"\s+", " ", note) in re.sub(r"\s+(# +)?", " ", recipe) for note in notes)


def test_the_base_that_mergekit_adds_is_a_brick(mergekit_project: Path, tmp_path: Path, in_mergekit_project: None) -> None:
    text = "merge_method: karcher\nbase_model: base\nmodels: [{model: one}, {model: two}]\ndtype: float32\n"
    ours, recipe, notes = imported(text, mergekit_project)
    assert difference(ours, run_mergekit(yaml.safe_load(text), tmp_path / "out")) <= 1e-6
    assert "    bricks: [one, two, base]\n" in recipe
    assert notes == ["line 2, base_model: mergekit adds it to the models that karcher merges, so it is one of the bricks"]


def test_models_that_are_not_at_hand(tmp_path: Path, cwd: Path) -> None:
    """Hub ids: nothing is fetched; gradients get a rule for tensors outside the layers, whichever those are."""
    (tmp_path / "merge.yml").write_text(
        "merge_method: della_linear\nbase_model: org/base@main\nmodels:\n  - model: org/One-7B\n    parameters:\n      weight: 0.5\n"
        "      density: [{filter: mlp, value: [0.3, 0.6]}]\ndtype: bfloat16\n", "utf-8")  # fmt: skip
    text = import_recipe(tmp_path / "merge.yml").text
    assert text.endswith("""\
version: 1
base: org/base@main
bricks:
  one-7b: org/One-7B
steps:
  - merge: mergekit/della_linear
    bricks:
      one-7b: 0.5
    parameters:
      density:
        - {where: {}, value: 1.0}
        - {where: {include: ['*mlp*']}, value: 0.3}
        - {where: {include: ['*mlp*'], layers: ':'}, value: {knots: [0.3, 0.6]}}
output: {dtype: bfloat16}
""")
    assert "# - line 8, dtype: mergekit computes in bfloat16, the recipe in float32, rounded once at the end\n" in text
    assert (
        "# - della_linear: random numbers come from the recipe's seed and do not depend on the order of models or tensors\n"
        in text
    )


# -- paths, files, command


def test_paths_start_where_mergekit_looks_or_beside_the_file(
    mergekit_project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    text = "merge_method: linear\nparameters: {weight: 1}\nmodels: [{model: one}, {model: org/two@abc}, {model: ./gone}]\n"
    (mergekit_project / "paths.yml").write_text(text, "utf-8")
    monkeypatch.chdir(elsewhere)
    inside = import_recipe(mergekit_project / "paths.yml", mergekit_project / "recipes" / "paths.yaml")
    assert "base: one\nbricks:\n  one: one\n  two: org/two@abc\n  gone: ./gone\n" in inside.text
    assert "line 3, models.2.model: ./gone does not exist" in " ".join(inside.notes)
    outside = import_recipe(mergekit_project / "paths.yml", elsewhere / "paths.yaml")
    assert f"base: {mergekit_project / 'one'}\n" in outside.text
    (elsewhere / "one").mkdir()
    assert "base: one\n" in import_recipe(mergekit_project / "paths.yml", elsewhere / "paths.yaml").text


def test_an_adapter_on_another_model_becomes_a_recipe(mergekit_project: Path, in_mergekit_project: None) -> None:
    _, text, _ = imported(EXAMPLES["task_arithmetic_lora"].read_text("utf-8"), mergekit_project, "lora")
    assert "  lora: {adapter: lora}\n  lora-two: {recipe: recipes/lora-lora-two.yaml}\n  one: one\n" in text
    nested = (mergekit_project / "recipes" / "lora-lora-two.yaml").read_text("utf-8")
    assert "bricks:\n  model: two\n  lora-two: {adapter: lora-two}\n" in nested


def test_command_prints_or_writes_and_overwrites_nothing(mergekit_project: Path, in_mergekit_project: None) -> None:
    (mergekit_project / "cli.yml").write_text(EXAMPLES["sce"].read_text("utf-8"), "utf-8")
    printed = call("recipe", "import", "cli.yml")
    assert printed.stdout.startswith("# workbench run RECIPE.yaml\n# Imported from cli.yml, mergekit's sce.\n")
    assert "  - merge: mergekit/sce\n    bricks: [one, two, three]\n    parameters:\n      select_topk: 0.7\n" in printed.stdout
    written = call("recipe", "import", "cli.yml", "-o", "recipes/cli.yaml")
    assert written.stdout == "recipes/cli.yaml\n"
    assert (mergekit_project / "recipes" / "cli.yaml").read_text("utf-8") == printed.stdout.replace(
        "RECIPE.yaml", "recipes/cli.yaml"
    )
    checked = call("recipe", "check", "recipes/cli.yaml")
    assert checked.stdout == "recipes/cli.yaml: ok, 1 step\n"
    again = refused("recipe", "import", "cli.yml", "-o", "recipes/cli.yaml")
    assert again.message == "recipes/cli.yaml already exists"
