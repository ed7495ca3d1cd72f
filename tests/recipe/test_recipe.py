"""Recipes: what is wrong with one is said at its place; what is right means what the design says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from worlds.project import Project

from workbench.ground.errors import WorkbenchError
from workbench.ground.project import find_project
from workbench.models.layout import Layout, Model
from workbench.recipe.methods import methods
from workbench.recipe.recipe import from_data, load_recipe
from workbench.recipe.schema import recipe_schema
from workbench.recipe.space import FieldSpace
from workbench.resolve.resolve import resolve
from workbench.steps.fields import Where, parse_size, value_at

HEAD = "version: 1\nbase: base\nbricks: {math: bricks/one, code: bricks/two}\nsteps:\n"
TIES = "  - id: mix\n    merge: ties\n"
# Text after HEAD (a whole recipe where it starts with "version" or is not indented), --set, the message without its file.
BAD: dict[str, tuple[str, tuple[str, ...], str]] = {
    "misspelt field": (TIES + "    densty: 0.2\n", (), ":7:5 steps.0.densty: unknown field. Did you mean 'density'?"),
    "field of another method": ("  - {merge: average, lambda: 0.5}\n", (), ":5:22 steps.0.lambda: unknown field. Known: bricks, id, merge, space, where."),
    "unknown method": ("  - merge: tis\n", (), ":5:5 steps.0: unknown merge method 'tis'. Did you mean 'ties' or 'tsv'? `workbench methods` lists all."),
    "method is no word": ("  - merge: [ties]\n", (), ":5:5 steps.0: unknown merge method '['ties']'."),
    "two verbs": ("  - merge: ties\n    edit: finetune\n", (), ":5:5 steps.0: expected exactly one of merge, edit, grow, fuse, route; found merge and edit"),
    "no verb": ("  - density: 0.2\n", (), ":5:5 steps.0: expected exactly one of merge, edit, grow, fuse, route; found neither (fields: density)"),
    "step is a word": ("  - ties\n", (), ":5:5 steps.0: expected a mapping with fields, found 'ties'"),
    "duplicate key": ("  - merge: ties\n    merge: linear\n", (), ":6:5 duplicate key 'merge' (first at line 5)"),
    "density over 1": (TIES + "    density: 1.7\n", (), ":7:5 steps.0.density: expected a share between 0 and 1, found 1.7"),
    "density over 1 in a ramp": (TIES + "    density: {first: 0, last: 1.2}\n", (), ":7:5 steps.0.density: expected a share between 0 and 1, found 1.2"),
    "density of a brick": (TIES + "    bricks: {math: {density: -0.1}}\n", (), ":7:21 steps.0.bricks.math.density: expected a share between 0 and 1, found -0.1"),
    "boolean density": (TIES + "    density: yes\n", (), ":7:5 steps.0.density: expected a valid number, found True"),
    "boolean weight": (TIES + "    bricks: {math: on}\n", (), ":7:14 steps.0.bricks.math: expected a valid number, found True"),
    "boolean knot": (TIES + "    lambda: {knots: [1, no]}\n", (), ":7:25 steps.0.lambda.knots.1: expected a valid number, found False"),
    "text for a number": (TIES + "    density: '0.2'\n", (), ":7:5 steps.0.density: expected a valid number, found '0.2'"),
    "nothing for a number": (TIES + "    lambda:\n", (), ":7:5 steps.0.lambda: expected a valid number, found None"),
    "infinite": (TIES + "    lambda: .inf\n", (), ":7:5 steps.0.lambda: expected a finite number, found inf"),
    "not a number": (TIES + "    lambda: .nan\n", (), ":7:5 steps.0.lambda: expected a finite number, found nan"),
    "one knot": (TIES + "    lambda: {knots: [1]}\n", (), ":7:14 steps.0.lambda.knots: expected at least 2 entries, found [1]"),
    "misspelt ramp": (TIES + "    lambda: {frist: 0, last: 1}\n", (), ":7:14 steps.0.lambda.frist: unknown field. Did you mean 'first'?"),
    "rule without where": (TIES + "    lambda: [{value: 1}]\n", (), ":7:14 steps.0.lambda.0.where: required field is missing"),
    "schedule over a model": (TIES + "    threshold: model\n    density: {first: 0.1, last: 0.2}\n", (),
                              ":5:5 steps.0: `threshold: model` uses one threshold per brick: expected a number as `density`, found a schedule"),
    "unknown choice": (TIES + "    sign: majority\n", (), ":7:5 steps.0.sign: expected 'mass' or 'frequency', found 'majority'"),
    "unknown brick": (TIES + "    bricks: {maht: 1}\n", (), ":7:14 steps.0.bricks.maht: no brick 'maht' under `bricks`. Did you mean 'math'?"),
    "misspelt brick field": (TIES + "    bricks: {math: {wieght: 1}}\n", (), ":7:21 steps.0.bricks.math.wieght: unknown field. Did you mean 'weight'?"),
    "text where bricks go": (TIES + "    bricks: math\n", (), ":7:5 steps.0.bricks: expected a mapping, found 'math'"),
    "twice the same brick in a list": (TIES + "    bricks: [math, math]\n", (), ":7:5 steps.0.bricks: brick 'math' is listed twice: give it one entry with the sum of the weights"),
    "a number among bricks": (TIES + "    bricks: [math, 2]\n", (), ":7:5 steps.0.bricks: expected brick names, or a mapping of brick names to weights; found 2 in the list"),
    "unknown brick in a list": (TIES + "    bricks: [math, coed]\n", (), ":7:5 steps.0.bricks.coed: no brick 'coed' under `bricks`. Did you mean 'code'?"),
    "octal": (TIES + "    density: 010\n", (), ":7:14 YAML reads 010 as 8 (octal)"),
    "set to an octal": (TIES, ("0.density=010",), "--set:1:1 YAML reads 010 as 8 (octal)"),
    "infinite weight": (TIES + "    bricks: {math: .inf}\n", (), ":7:14 steps.0.bricks.math: expected a finite number, found inf"),
    "average with weights": ("  - merge: average\n    bricks: {math: 1.0}\n", (), ":6:5 steps.0.bricks: expected a list, found {'math': 1.0}"),
    "twice the same brick": ("  - merge: average\n    bricks: [math, math]\n", (), ":6:5 steps.0.bricks: a brick is listed twice"),
    "no bricks": (TIES + "    bricks: {}\n", (), ":7:5 steps.0.bricks: ties merges bricks, but the recipe has none"),
    "bad slice": (TIES + "    where: {layers: 4-20}\n", (), ":7:13 steps.0.where.layers: expected a slice of layers such as '4:20', '-4:' or '7', found '4-20'"),
    "slice read as a time": (TIES + "    where: {layers: 4:20}\n", (), ":7:21 YAML reads 4:20 as 260 (base 60)"),
    "glob without list": (TIES + "    where: {include: '*.mlp.*'}\n", (), ":7:13 steps.0.where.include: expected a list, found '*.mlp.*'"),
    "boolean count": ("  - {grow: depth, blocks: yes}\n", (), ":5:19 steps.0.blocks: expected a valid integer, found True"),
    "count with a point": ("  - {grow: depth, blocks: 2.0}\n", (), ":5:19 steps.0.blocks: expected a valid integer, found 2.0"),
    "no blocks": ("  - {grow: depth, blocks: 0}\n", (), ":5:19 steps.0.blocks: expected greater than or equal to 1, found 0"),
    "growth without place": ("  - grow: depth\n", (), ":5:5 steps.0: expected one of `blocks: 4` and `after: [3, 7]`, found none"),
    "growth with two places": ("  - {grow: depth, blocks: 1, after: [1]}\n", (), ":5:5 steps.0: expected one of `blocks: 4` and `after: [3, 7]`, found both"),
    "no facts": ("  - edit: finetune\n", (), ":5:5 steps.0.facts: required field is missing"),
    "name with capitals": ("  - {id: Mix, merge: ties}\n", (), ":5:6 steps.0.id: expected lower-case letters, digits and . _ - "),
    "twice the same id": ("  - {id: a, merge: ties}\n  - {id: a, merge: linear}\n", (), ":5:6 steps.0.id: two steps have the id 'a'"),
    "no version": ("base: base\n", (), ":1:1 version: required field is missing"),
    "future version": ("version: 2\nbase: base\n", (), ":1:1 version: expected 1, found 2"),
    "no base": ("version: 1\n", (), ":1:1 base: required field is missing"),
    "empty base": ("version: 1\nbase: ''\n", (), ":2:1 base: expected a text that is not empty, found ''"),
    "steps not a list": ("version: 1\nbase: base\nsteps: {merge: ties}\n", (), ":3:1 steps: expected a list, found {'merge': 'ties'}"),
    "bricks as a list": ("version: 1\nbase: base\nbricks: [m]\n", (), ":3:1 bricks: expected a mapping, found ['m']"),
    "brick of two kinds": ("version: 1\nbase: base\nbricks: {m: {adapter: a, checkpoint: b}}\n", (),
                           ":3:10 bricks.m: expected exactly one of adapter, checkpoint, brick, recipe, checkpoints; found adapter, checkpoint"),
    "brick name with a path": ("version: 1\nbase: base\nbricks: {'../m': a}\n", (), ":3:10 bricks.../m: expected lower-case letters, digits"),
    "merge without bricks": ("version: 1\nbase: base\nsteps: [{merge: ties}]\n", (), ":3:9 steps.0.bricks: ties merges bricks, but the recipe has none"),
    "unknown dtype": ("version: 1\nbase: base\noutput: {dtype: bf16}\n", (), ":3:10 output.dtype: expected 'float32', 'float16' or 'bfloat16', found 'bf16'"),
    "no size": ("version: 1\nbase: base\noutput: {shard_size: big}\n", (), ":3:10 output.shard_size: expected a size such as 2GB or 500MB, found 'big'"),
    "boolean seed": ("version: 1\nbase: base\nseed: true\n", (), ":3:1 seed: expected a valid integer, found True"),
    "suites not a list": ("version: 1\nbase: base\neval: starter\n", (), ":3:1 eval: expected a list, found 'starter'"),
    "no items": ("version: 1\nbase: base\neval: [{tasks: [a], limit: 0}]\n", (), ":3:21 eval.0.limit: expected greater than or equal to 1, found 0"),
    "misspelt part": ("version: 1\nbase: base\nstep: []\n", (), ":3:1 step: unknown field. Did you mean 'steps' or 'sweep'?"),
    "number for a text": ("version: 1\nbase: base\ndescription: 3\n", (), ":3:1 description: expected a valid string, found 3"),
    "empty file": ("\n", (), ": expected a mapping with version, base, bricks and steps"),
    "a list": ("- a\n", (), ": expected a mapping with version, base, bricks and steps"),
    "set without value": (TIES, ("mix.density",), "--set mix.density: expected FIELD=VALUE or STEP.FIELD=VALUE"),
    "set without field": (TIES, ("=1",), "--set =1: expected FIELD=VALUE or STEP.FIELD=VALUE"),
    "set of an unknown step": (TIES, ("mxi.density=0.3",), "--set mxi.density=0.3: no step or field 'mxi'. Did you mean 'mix'?"),
    "set of a step too far": (TIES, ("7.density=0.3",), "--set 7.density=0.3: no step or field '7'."),
    "set of an unknown field": (TIES, ("mix.densty=0.3",), ":5:5 steps.0.densty: unknown field. Did you mean 'density'?"),
    "set below a number": (TIES + "    density: 0.1\n", ("mix.density.first=0.3",), "--set mix.density.first=0.3: 'density' has no fields"),
    "set to no YAML": (TIES, ("mix.density=[",), "--set:1:2 not valid YAML: expected the node content"),
    "set out of range": (TIES, ("0.density=3",), ":5:5 steps.0.density: expected a share between 0 and 1, found 3"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_recipe(name: str, tmp_path: Path, cwd: Path) -> None:
    text, settings, message = BAD[name]
    (tmp_path / "recipes").mkdir()
    file = Path("recipes/r.yaml")
    file.write_text(HEAD + text if text.startswith(" ") else text, "utf-8")
    with pytest.raises(WorkbenchError) as caught:
        load_recipe(file, settings)
    expected = message if message.startswith("--set") else f"{file}{message}"
    assert any(line.startswith(expected) for line in caught.value.message.splitlines()), caught.value.message
    assert caught.value.exit_code == 2


def test_all_problems_at_once(project: Project) -> None:
    file = project.write("bricks: {a: bricks/one}\nsteps:\n  - {merge: ties, density: 2, lamda: 1}\nseed: -1\n")
    with pytest.raises(WorkbenchError) as caught:
        load_recipe(file)
    assert len(caught.value.message.splitlines()) == 3


def test_hints(project: Project) -> None:
    with pytest.raises(WorkbenchError) as caught:
        load_recipe(project.write(HEAD + TIES + "    where: {layers: 4:20}\n"))
    assert caught.value.hint == 'Write 260 for the number 260, or put "4:20" in quotes if it is a text.'


def test_settings(project: Project) -> None:
    file = project.write(HEAD + TIES + "  - {merge: linear, bricks: {math: {weight: 2}}}\n")
    recipe = load_recipe(
        file, ["mix.density=0.3", "1.bricks.math.weight=5", "output.dtype=float32", "seed=3", "merge-linear.normalize=false"]
    )
    mix, linear = recipe.steps
    assert mix.density == 0.3  # type: ignore[attr-defined]
    assert linear.entry("math").weight == 5  # type: ignore[attr-defined]
    assert not linear.normalize  # type: ignore[attr-defined]
    assert (recipe.fields.output.dtype, recipe.fields.seed) == ("float32", 3)


def test_defaults(project: Project) -> None:
    recipe = load_recipe(project.write(HEAD + TIES + "  - merge: average\n  - {merge: average, bricks: [code]}\n", "some.yaml"))
    assert recipe.name == "some"
    assert recipe.step_ids == ["mix", "merge-average-1", "merge-average-2"]
    assert recipe.used_bricks(recipe.steps[0]) == ["math", "code"]  # type: ignore[arg-type]
    assert recipe.used_bricks(recipe.steps[2]) == ["code"]  # type: ignore[arg-type]
    assert find_project(project.path / "recipes" / "some.yaml") == project.path


def test_schema_names_every_method() -> None:
    schema = str(recipe_schema())
    for tag in methods():
        assert f"'const': '{tag.partition(':')[2]}'" in schema


# -- references: what the files under a recipe must be


def test_inputs_are_named_together(project: Project) -> None:
    (project.path / "recipes" / "other.yaml").write_text("version: 1\nbase: bricks/full\n", "utf-8")
    text = """
    bricks: {a: bricks/on, b: {checkpoint: bricks/one}, c: base/../nothing, d: {recipe: recipes/other.yaml}, e: {brick: bricks/two}}
    steps: [{edit: finetune, facts: facts.jsonl}]
    """
    with pytest.raises(WorkbenchError) as caught:
        project.resolve(text)
    lines = caught.value.message.splitlines()
    assert lines[0] == "brick 'a': no such directory: bricks/on"
    assert lines[1] == "brick 'b': bricks/one is an adapter, but the recipe says checkpoint"
    assert lines[2] == "brick 'c': no such directory: base/../nothing"
    assert lines[3] == "brick 'd': recipes/other.yaml has the base bricks/full, but this recipe has base"
    assert lines[4] == "brick 'e': no brick.yaml in bricks/two"
    assert lines[5].endswith("steps.0: facts.jsonl does not exist")
    assert "Did you mean 'bricks/one'?" in (caught.value.hint or "")


@pytest.mark.parametrize("chain", [["a"], ["a", "b"], ["a", "b", "c"]])
def test_recipe_that_needs_itself(project: Project, chain: list[str]) -> None:
    for name, following in zip(chain, [*chain[1:], chain[0]], strict=True):
        project.write(f"bricks: {{x: {{recipe: recipes/{following}.yaml}}}}\nsteps: [{{merge: average}}]\n", f"{name}.yaml")
    with pytest.raises(WorkbenchError, match="uses itself: " + " -> ".join(f"{n}.yaml" for n in [*chain, "a"])) as caught:
        resolve(load_recipe(project.path / "recipes" / "a.yaml"))
    assert caught.value.exit_code == 2


def test_where_that_matches_nothing(project: Project) -> None:
    with pytest.raises(WorkbenchError, match=r"steps\.0\.where: layers '9' matches no tensor of the base") as caught:
        project.tensors("bricks: {a: bricks/one}\nsteps: [{merge: average, where: {layers: '9'}}]\n")
    assert caught.value.exit_code == 2


def test_from_data_has_no_marks(tmp_path: Path) -> None:
    with pytest.raises(WorkbenchError, match=r"^recipe probe:1:1 steps\.0\.densty: unknown field"):
        from_data(
            {"version": 1, "name": "probe", "base": "b", "bricks": {"a": "x"}, "steps": [{"merge": "ties", "densty": 1}]},
            tmp_path,
        )


# -- values over depth, and sets of tensors

NAMES = ["model.embed_tokens.weight", *(f"model.layers.{i}.{part}.weight" for i in range(5) for part in ("mlp.down_proj", "self_attn.o_proj")),
         "model.norm.weight", "lm_head.weight"]  # fmt: skip
MODEL = Model(type("W", (), {"specs": dict.fromkeys(NAMES)})(), {"num_hidden_layers": 5})
DOWN = "model.layers.{}.mlp.down_proj.weight"


def schedule(value: Any) -> Any:
    data = {"version": 1, "base": "b", "bricks": {"a": "x"}, "steps": [{"merge": "ties", "lambda": value}]}
    return from_data(data, Path()).steps[0].lam  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.5, [0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5]),
        ({"first": 0, "last": 1}, [0, 0, 0.25, 0.5, 0.75, 1, 1, 1]),
        ({"knots": [0, 1]}, [0, 0, 0.25, 0.5, 0.75, 1, 1, 1]),
        ({"knots": [1, 0, 2]}, [1, 1, 0.5, 0, 1, 2, 2, 2]),
        ([{"where": {"layers": "1:3"}, "value": 2}], [9, 9, 2, 2, 9, 9, 9, 9]),
        ([{"where": {}, "value": 1}, {"where": {"layers": "-2:"}, "value": 2}, {"where": {"include": ["lm_head*"]}, "value": 3}],
         [1, 1, 1, 1, 2, 2, 1, 3]),
        ([{"where": {"include": ["*.mlp.*"], "layers": "::2"}, "value": 0}], [9, 0, 9, 0, 9, 0, 9, 9]),
        ([], [9] * 8),
    ],
)  # fmt: skip
def test_value_at(value: Any, expected: list[float]) -> None:
    names = [NAMES[0], *(DOWN.format(i) for i in range(5)), *NAMES[-2:]]
    assert [value_at(schedule(value), name, MODEL, 9.0) for name in names] == pytest.approx(expected)


def test_heads_and_embeddings_by_family() -> None:
    """GPT-NeoX calls its head embed_out, GPT-2 its embeddings wte and wpe."""
    neox = Layout.from_config(
        ["gpt_neox.embed_in.weight", "gpt_neox.layers.0.a", "gpt_neox.layers.1.a", "embed_out.weight"], {"num_hidden_layers": 2}
    )
    assert [neox.position(n) for n in neox.names] == [0, 0, 1, 1]
    gpt2 = Layout.from_config(["wte.weight", "wpe.weight", "h.0.a", "h.1.a", "h.2.a", "ln_f.weight"], {"n_layer": 3})
    assert [gpt2.position(n) for n in gpt2.names] == [0, 0, 0, 0.5, 1, 1]


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("2", [2]),
        ("-1", [4]),
        ("1:3", [1, 2]),
        ("-2:", [3, 4]),
        (":", [0, 1, 2, 3, 4]),
        ("::2", [0, 2, 4]),
        ("3::-1", [0, 1, 2, 3]),
        ("9", []),
        ("-9", []),
    ],
)
def test_where_layers(layers: str, expected: list[int]) -> None:
    where = Where(layers=layers)
    assert [i for i in range(5) if where.matches(DOWN.format(i), MODEL)] == expected
    assert not where.matches(NAMES[0], MODEL)


def test_where_globs() -> None:
    where = Where(include=("*.mlp.*", "lm_head*"), exclude=("*layers.0.*",))
    assert [n for n in NAMES if where.matches(n, MODEL)] == [*(DOWN.format(i) for i in range(1, 5)), "lm_head.weight"]


@pytest.mark.parametrize(("text", "size"), [("2GB", 2 * 10**9), ("500 mb", 500 * 10**6), ("1.5GiB", 3 * 2**29), (4096, 4096)])
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


def test_a_list_of_bricks_stands_for_weights_of_one(project: Project, cwd: Path) -> None:
    listed = load_recipe(project.write(HEAD + TIES + "    bricks: [code, math]\n"))
    mapped = load_recipe(project.write(HEAD + TIES + "    bricks: {code: 1, math: 1}\n"))
    assert listed.steps == mapped.steps
    assert listed.steps[0].names() == ["code", "math"]  # type: ignore[attr-defined]
    set_one = load_recipe(project.write(HEAD + TIES + "    bricks: [code, math]\n"), ["0.bricks.math=0.25"])
    assert set_one.steps[0].bricks == {"code": 1.0, "math": 0.25}  # type: ignore[attr-defined]
    schema = recipe_schema()["$defs"]["Ties"]["properties"]["bricks"]["anyOf"]
    assert {"type": "array", "items": {"type": "string"}, "uniqueItems": True} in schema


def test_a_search_takes_bricks_that_stand_in_a_list(project: Project) -> None:
    text = HEAD + TIES + "    bricks: [code, math]\nsearch: {space: {0.bricks.math: [0.1, 1e0]}, objective: mini, trials: 2}\n"
    recipe = load_recipe(project.write(text))
    assert recipe.fields.search is not None
    space = FieldSpace(recipe, recipe.fields.search.space)
    assert space.written() == {"0.bricks.math": 1.0}
    assert space.document({"0.bricks.math": 0.5})["steps"][0]["bricks"] == {"code": 1.0, "math": 0.5}


@pytest.mark.parametrize(("written", "value"), [("1e-3", 1e-3), ("1e-1", 0.1), (".5", 0.5), ("5e-1", 0.5), ("1.e-2", 0.01)])
def test_numbers_as_people_write_them(written: str, value: float, project: Project) -> None:
    in_file = load_recipe(project.write(HEAD + TIES + f"    density: {written}\n    lambda: {written}\n"))
    by_set = load_recipe(project.write(HEAD + TIES), [f"0.density={written}", f"mix.lambda={written}"])
    for recipe in (in_file, by_set):
        step = recipe.steps[0]
        assert (step.density, step.lam) == (value, value)  # type: ignore[attr-defined]


def test_a_text_that_looks_like_a_number_stays_a_text(project: Project) -> None:
    """YAML 1.1 reads 1e5 as text: where a text is wanted, it still is one."""
    recipe = load_recipe(project.write(HEAD + TIES.replace("id: mix", "id: 1e3") + "description: 1e5\n"), ["description=1e-6"])
    assert (recipe.fields.description, recipe.steps[0].id) == ("1e-6", "1e3")
    assert load_recipe(project.write(HEAD + TIES), ["0.id=1e4"]).steps[0].id == "1e4"
