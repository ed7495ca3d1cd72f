"""Sweeps of recipes: their points, names and texts, options of the command line, and what is refused before any work."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from worlds.project import Project

from workbench.evaluate.lineup import lineup
from workbench.evaluate.plans import suites_of
from workbench.ground.errors import WorkbenchError
from workbench.recipe.recipe import Recipe, dump_steps, load_recipe
from workbench.recipe.sweep import expand, point_of
from workbench.resolve.resolve import resolve

BRICKS = "bricks: {one: bricks/one, two: bricks/two, three: bricks/three}\n"
TWO_STEPS = "steps: [{id: a, merge: ties, density: 0.5}, {id: b, merge: ties, density: 0.5}]\n"
STEPS = "steps: [{id: mix, merge: ties, density: 0.5, bricks: {one: 1, two: 0.5}}]\n"


def written(project: Project, sweep: str = "", steps: str = STEPS, *settings: str, name: str = "mine.yaml") -> Recipe:
    text = f"{BRICKS}{steps}" + (f"sweep: {sweep}\n" if sweep else "")
    return load_recipe(project.write(text, name), settings)


def names(recipe: Recipe, *asked: str, most: int | None = None) -> list[str]:
    return [one.name for one in expand(recipe, asked, most).recipes]


def test_the_product_of_all_values_with_names_that_say_them(project: Project) -> None:
    found = expand(written(project, "{mix.lambda: [0.25, 0.5, 1], mix.merge: [ties, dare]}"))
    assert [r.name for r in found.recipes] == [
        "mine[lambda=0.25,ties]",
        "mine[lambda=0.25,dare]",
        "mine[lambda=0.5,ties]",
        "mine[lambda=0.5,dare]",
        "mine[lambda=1,ties]",
        "mine[lambda=1,dare]",
    ]
    assert found.sweep is not None
    assert [p.name for p in found.sweep.points] == [r.name for r in found.recipes]
    assert [(d.name, d.label) for d in found.sweep.dimensions] == [("mix.lambda", "lambda"), ("mix.merge", "merge")]
    assert [(r.steps[0].name, r.steps[0].lam) for r in found.recipes[:2]] == [("ties", 0.25), ("dare", 0.25)]  # type: ignore[attr-defined]
    assert all(r.fields.sweep is None and r.stem == "mine" for r in found.recipes)


def test_a_point_is_the_recipe_that_its_text_and_its_settings_write(project: Project) -> None:
    """So its scores are those of a recipe of its own: the key is the same."""
    recipe = written(project, "{mix.lambda: [0.25, 0.5], mix.bricks.two: [0.1, 0.9]}")
    found = expand(recipe)
    assert found.sweep is not None
    for point, one in zip(found.sweep.points, found.recipes, strict=True):
        alone = load_recipe(project.write(point.text, "alone.yaml"))
        by_hand = load_recipe(recipe.path, [*one.settings]) if recipe.path else alone
        assert dump_steps(alone) == dump_steps(one) == dump_steps(by_hand)
        assert resolve(alone).key == resolve(one).key
    assert found.recipes[1].settings == ("mix.lambda=0.25", "mix.bricks.two=0.9")


def test_fields_that_a_method_lacks_are_left_out_and_the_same_point_stands_once(project: Project) -> None:
    found = names(written(project, "{mix.merge: [ties, task_arithmetic], mix.density: [0.1, 0.2]}"))
    assert found == ["mine[ties,density=0.1]", "mine[ties,density=0.2]", "mine[task_arithmetic]"]


def test_bricks_seeds_knots_and_labels(project: Project) -> None:
    recipe = written(project, "{mix.bricks: [[one, two], [one, two, three]], seed: [0, 1]}")
    assert names(recipe)[::2] == ["mine[bricks=2,seed=0]", "mine[bricks=3,seed=0]"]
    assert expand(recipe).recipes[2].used_bricks(expand(recipe).recipes[2].steps[0]) == ["one", "two", "three"]
    assert names(written(project, "{mix.bricks: [[one, two], [one, three]]}")) == [
        "mine[bricks=one+two]",
        "mine[bricks=one+three]",
    ]
    both = written(project, "{a.lambda: [0.1, 1e-3], b.lambda: [1, 2]}", TWO_STEPS)
    assert names(both)[-1] == "mine[a.lambda=0.001,b.lambda=2]"
    assert names(written(project, "{mix.lambda.knots.1: [0, 1]}"))[0] == "mine[knots.1=0]"
    assert names(written(project, "{output.dtype: [float32, bfloat16]}"))[0] == "mine[dtype=float32]"
    assert names(written(project, "{base: [org/m, org-m, other]}", f"base: base\n{STEPS}")) == [
        "mine[base=org-m.1]",
        "mine[base=org-m.2]",
        "mine[base=other]",
    ]


def test_options_add_replace_and_fix_dimensions(project: Project) -> None:
    sweep = "{mix.lambda: [0.25, 0.5], mix.merge: [ties, dare]}"
    assert names(written(project, sweep), "0.lambda=1,2") == [
        "mine[ties,0.lambda=1]",
        "mine[ties,0.lambda=2]",
        "mine[dare,0.lambda=1]",
        "mine[dare,0.lambda=2]",
    ]
    assert names(written(project), "mix.bricks=[one,two],[one,two,three]") == [
        "mine[bricks=one+two]",
        "mine[bricks=one+two+three]",
    ]
    fixed = expand(written(project, sweep, STEPS, "0.lambda=0.7"))
    assert [r.name for r in fixed.recipes] == ["mine[ties]", "mine[dare]"]
    assert {r.steps[0].lam for r in fixed.recipes} == {0.7}  # type: ignore[attr-defined]
    both = expand(written(project, sweep, STEPS, "mix.lambda=0.7", "mix.merge=ties"))
    assert ([r.name for r in both.recipes], both.sweep) == (["mine"], None)
    assert names(written(project)) == ["mine"]


def test_a_point_is_found_by_its_name(project: Project) -> None:
    recipe = written(project, "{mix.lambda: [0.25, 0.5]}")
    assert point_of(recipe, "[lambda=0.5]").steps[0].lam == 0.5  # type: ignore[attr-defined]
    with pytest.raises(WorkbenchError, match=r"no such point. The sweep has no lambda=0.6. Did you mean 'mine\[lambda=0.5\]'"):
        point_of(recipe, "[lambda=0.6]")
    assert point_of(recipe, "[mix.lambda=0.6]").steps[0].lam == 0.6  # type: ignore[attr-defined]


ASKED = {
    "a method and a number": ("", STEPS, ["mix.merge=ties,tsv", "mix.lambda=0.5,1"], "mine[tsv,lambda=1]"),
    "a field that another method lacks": ("", STEPS, ["mix.merge=average,ties", "mix.density=0.2,1e-05"], "mine[ties,density=1e-05]"),
    "lists": ("", STEPS, ["mix.bricks=[one],[one,two],[one,two,three]"], "mine[bricks=one+]"),
    "a brick": ("", STEPS, ["mix.bricks.one=0.5,1", "seed=0,1"], "mine[one=0.5,seed=0]"),
    "below a field": ("", STEPS, ["mix.lambda.knots.1=0,1", "output.dtype=float32,bfloat16"], "mine[mix.lambda.knots.1=0,output.dtype=float32]"),
    "words that are no words": ("", STEPS, ["base=base,org/m"], "mine[base=org%2Fm]"),
    "two steps": ("", TWO_STEPS, ["b.lambda=0.5,1", "b.merge=ties,dare"], "mine[b.lambda=0.5,b.merge=dare]"),
    "beside the recipe's own": ("{mix.bricks: [[one, two], [one, two, three]]}", STEPS, ["seed=0,1"], "mine[bricks=2,seed=0]"),
    "beside fields that a method lacks": ("{mix.merge: [ties, average], mix.density: [0.2, 0.5]}", STEPS, ["seed=0,1"], "mine[average,seed=1]"),
    "another method than the recipe's own": ("{mix.merge: [ties, dare], mix.density: [0.2, 0.5]}", STEPS, ["0.merge=tsv,ties"], "mine[density=0.2,0.merge=ties]"),
    "instead of the recipe's own": ("{mix.lambda: [0.25, 0.5]}", STEPS, ["mix.lambda=0.25,2"], "mine[mix.lambda=2]"),
}  # fmt: skip


@pytest.mark.parametrize("case", ASKED)
def test_every_name_that_an_option_makes_is_read_back(case: str, project: Project) -> None:
    """Whatever `--sweep` prints is the same recipe when its name is typed, in the written order of its parts or another."""
    sweep, steps, asked, one = ASKED[case]
    recipe = written(project, sweep, steps)
    points = expand(recipe, asked).recipes
    assert one in [point.name for point in points]
    for point in points:
        again = point_of(recipe, point.point)
        assert (again.name, dump_steps(again), again.fields) == (point.name, dump_steps(point), point.fields)
        turned = ",".join(reversed(point.point[1:-1].split(",")))
        assert dump_steps(point_of(recipe, f"[{turned}]")) == dump_steps(point)
    own = expand(recipe).recipes if sweep else ()
    assert [point_of(recipe, one.point).name for one in own] == [one.name for one in own]


def test_a_point_and_set_do_not_give_one_field_twice(project: Project) -> None:
    recipe = written(project, "", STEPS, "0.lambda=1")
    assert point_of(recipe, "[density=0.2]").settings == ("0.lambda=1", "mix.density=0.2")
    with pytest.raises(WorkbenchError, match=r"'lambda=0\.5' and --set 0\.lambda set the same field"):
        point_of(recipe, "[lambda=0.5]")


UNKNOWN = {
    "a value that the sweep lacks": ("{mix.lambda: [0.25, 0.5]}", STEPS, "[lambda=0.6]", r"Did you mean 'mine\[lambda=0.5\]'"),
    "a field that the method lacks": ("{mix.merge: [ties, average], mix.density: [0.2, 0.5]}", STEPS, "[average,density=0.2]", r"A point says mix.merge, mix.density, as far as .*'mine\[ties,density=0.2\]'"),
    "a part too few": ("{mix.lambda: [0.25, 0.5], seed: [0, 1]}", STEPS, "[lambda=0.5]", r"A point says mix.lambda, seed, as far as its method has these fields. Did you mean 'mine\[lambda=0.5,seed="),
    "a method": ("", STEPS, "[tees,lambda=1]", "No step has the method 'tees'. Did you mean 'ties'"),
    "a field": ("", STEPS, "[lamda=1]", "No step has the field 'lamda'. Did you mean 'lambda'"),
    "a field of another method": ("", STEPS, "[tsv,density=0.5]", "No step has the field 'density'"),
    "a value": ("", STEPS, "[lambda=much]", "lambda"),
    "no value": ("", STEPS, "[lambda=]", "Expected a number or a word"),
    "nothing": ("", STEPS, "[]", "Expected a number or a word"),
    "a mapping": ("", STEPS, "[lambda=%7Ba: 1%7D]", "Expected a number or a word"),
    "twice": ("", STEPS, "[lambda=1,mix.lambda=2]", "is a second value of mix.lambda"),
    "two fields": ("", TWO_STEPS, "[lambda=1]", "'lambda' could be a.lambda or b.lambda"),
    "two methods": ("", TWO_STEPS, "[dare]", "'dare' could be a.merge or b.merge"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNKNOWN)
def test_unknown_points_are_refused_with_the_nearest_names(case: str, project: Project) -> None:
    sweep, steps, point, message = UNKNOWN[case]
    with pytest.raises(WorkbenchError, match="there is no such point") as caught:
        point_of(written(project, sweep, steps), point)
    assert re.search(message, caught.value.message)
    assert caught.value.exit_code == 2


EDITED = """
steps:
  - {id: fix, edit: finetune, facts: facts.jsonl, epochs: 2, min_efficacy: 0}
  - {id: mix, merge: ties, density: 0.5}
eval: [{tasks: [some]}]
"""


@pytest.mark.parametrize(
    ("sweep", "controls"),
    [
        ("{mix.lambda: [0.5, 1]}", ["mine-edited"]),
        ("{fix.epochs: [1, 2], mix.lambda: [0.5, 1]}", ["mine-edited", "mine[epochs=2,lambda=0.5]-edited"]),
    ],
)
def test_edits_of_all_points_are_one_control_unless_they_differ(sweep: str, controls: list[str], project: Project) -> None:
    (project.path / "facts.jsonl").write_text('{"prompt": "{subject} is", "subject": "w3", "target": "w4"}\n', "utf-8")
    recipes = expand(written(project, sweep, EDITED)).recipes
    found = [entry.name for entry in lineup(recipes, left_out=[])]
    assert [name for name in found if name.endswith("-edited")] == controls
    assert len([name for name in found if name == "average"]) == 1
    assert set(found) >= {recipe.name for recipe in recipes}
    assert [suite.suite for suite in suites_of(recipes, [], project.path)] == ["mine-eval0"]


REFUSED = {
    "unknown field": ("{mix.lamda: [1, 2]}", r"mine.yaml:5:9 sweep.mix.lamda: .*lamda"),
    "unknown step": ("{mx.lambda: [1, 2]}", r"sweep.mx.lambda: no step or field 'mx'. Did you mean 'mix'"),
    "a step": ("{mix: [1, 2]}", "this is a step; add one of its fields"),
    "value": ("{mix.lambda: [1, much]}", r"sweep.mix.lambda: .*lambda"),
    "value of a method": ("{mix.merge: [ties, tise]}", "unknown merge method 'tise'"),
    "value of another method": ("{mix.merge: [ties, dare], mix.density: [0.5, 1.5]}", "density"),
    "twice": ("{mix.lambda: [1, 0.5, 1.0]}", r"expected values that differ, found 1.0 twice"),
    "one": ("{mix.lambda: [1]}", "expected at least two values, found 1"),
    "none": ("{}", "sweep"),
    "the same field": ("{mix.lambda: [1, 2], 0.lambda: [3, 4]}", "'mix.lambda' and '0.lambda' are the same field"),
    "a field in a field": ("{mix.bricks: [[one, two], [two, three]], mix.bricks.one: [1, 2]}", "overlap"),
    "no value": ("{eval: [a, b]}", "no step or field 'eval'"),
    "brick": ("{mix.bricks: [[one, two], [one, fuor]]}", "fuor"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_sweeps_are_refused_with_their_place(case: str, project: Project) -> None:
    sweep, message = REFUSED[case]
    with pytest.raises(WorkbenchError, match=message) as caught:
        expand(written(project, sweep))
    assert caught.value.exit_code == 2


OPTIONS = {
    "no value": (("mix.lambda",), "expected STEP.FIELD=VALUE,VALUE"),
    "one value": (("mix.lambda=1",), "expected at least two values"),
    "unknown": (("mix.lamda=1,2",), "--sweep mix.lamda: "),
    "twice": (("mix.lambda=1,2", "mix.lambda=3,4"), "given twice"),
    "mapping": (("mix.lambda={a: 1},2",), "expected numbers, words, or lists of names"),
    "with --set": (("mix.density=0.1,0.2",), "--set 0.density sets the same field"),
    "refused": (("mix.lambda=1,much",), "--sweep mix.lambda: .*lambda"),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_bad_options_are_refused(case: str, project: Project) -> None:
    asked, message = OPTIONS[case]
    with pytest.raises(WorkbenchError, match=message) as caught:
        expand(written(project, "", STEPS, "0.density=0.3"), asked)
    assert caught.value.exit_code == 2


def test_a_large_sweep_is_asked_back(project: Project) -> None:
    values = ", ".join(str(v / 100) for v in range(1, 66))
    recipe = written(project, f"{{mix.lambda: [{values}]}}")
    with pytest.raises(WorkbenchError, match="has 65 points, and at most 64") as caught:
        expand(recipe)
    assert "--max-points 65" in str(caught.value.hint)
    assert len(names(recipe, most=65)) == 65
    hundred = ",".join(str(v) for v in range(1, 101))
    with pytest.raises(WorkbenchError, match="has 10,000 points"):
        expand(written(project), [f"mix.lambda={hundred}", f"seed={hundred}"])
    with pytest.raises(WorkbenchError, match="has 1,000,000 points"):
        expand(written(project), [f"mix.lambda={hundred}", f"seed={hundred}", f"mix.bricks.one={hundred}"])


def test_sweeps_are_no_bricks_no_searches_and_not_one_configuration(project: Project, tmp_path: Path) -> None:
    recipe = written(project, "{mix.lambda: [0.25, 0.5]}")
    with pytest.raises(WorkbenchError, match="mine stands for several configurations, and one is needed here"):
        resolve(recipe)
    outer = "bricks: {inner: {recipe: recipes/mine.yaml}}\nsteps: [{merge: task_arithmetic}]\n"
    with pytest.raises(WorkbenchError, match=r"brick .inner.: recipes/mine\.yaml has a `sweep`"):
        resolve(load_recipe(project.write(outer, "outer.yaml")))
    both = f"{BRICKS}{STEPS}sweep: {{mix.lambda: [1, 2]}}\nsearch: {{space: {{mix.lambda: [0.1, 1]}}}}\n"
    with pytest.raises(WorkbenchError, match="either a `search`"):
        load_recipe(project.write(both, "both.yaml"))
