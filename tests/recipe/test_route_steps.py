"""Route steps in recipes: their fields, the bricks that they take from the recipe, and their errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from worlds.routing import write_prompts

from workbench.ground.errors import WorkbenchError
from workbench.recipe.methods import methods
from workbench.recipe.recipe import dump_step, from_data, load_recipe
from workbench.recipe.schema import recipe_schema
from workbench.steps import RouteMethod

NAMES = ("ridge", "centroid", "text", "arrow", "fixed")
BRICKS = {"one": "bricks/one", "two": "bricks/two", "three": "bricks/three"}


def data(step: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"version": 1, "name": "routed", "base": "base", "bricks": BRICKS, "steps": [step], **fields}


def refused(step: dict[str, Any], tmp_path: Path, **fields: Any) -> str:
    with pytest.raises(WorkbenchError) as error:
        from_data(data(step, **fields), tmp_path)
    return error.value.message


def test_every_router_is_a_method() -> None:
    found = {cls.name for cls in methods().values() if issubclass(cls, RouteMethod)}
    assert found >= set(NAMES)
    assert list(methods())[-len(found) :] == sorted(f"route:{name}" for name in found)  # after all other verbs


def test_the_schema_has_route_steps() -> None:
    definitions = recipe_schema()["$defs"]
    ridge = definitions["Ridge"]["properties"]
    assert ridge["route"]["const"] == "ridge"
    assert ridge.keys() - {"id", "route"} == {"bricks", "calibration", "samples", "negatives", "threshold", "abstain", "encoder"}
    assert all(field["description"] for name, field in ridge.items() if name != "route")
    assert definitions["RoutedBrick"]["properties"]["calibration"]["description"].startswith("JSONL file of the brick's prompts")


def test_a_step_without_bricks_takes_all_of_the_recipe(tmp_path: Path) -> None:
    recipe = from_data(data({"route": "ridge", "calibration": "texts/{brick}.jsonl"}), tmp_path)
    step: Any = recipe.router
    assert step is recipe.steps[-1]
    assert recipe.memory is None
    assert recipe.used_bricks(step) == ["one", "two", "three"]
    assert step.inputs() == ["texts/one.jsonl", "texts/three.jsonl", "texts/two.jsonl"]
    assert recipe.fields.output.form == "configuration"


def test_each_brick_may_have_a_file_and_a_description(tmp_path: Path) -> None:
    bricks = {"two": {"calibration": "own.jsonl", "description": "adds numbers"}, "one": {}}
    recipe = from_data(data({"route": "text", "bricks": bricks, "calibration": "{brick}.jsonl"}), tmp_path)
    step: Any = recipe.router
    assert recipe.used_bricks(step) == ["two", "one"]
    assert {name: step.prompt_files(name) for name in bricks} == {"two": ["own.jsonl"], "one": ["one.jsonl"]}
    assert step.descriptions() == {"two": "adds numbers"}


def test_fixed_weights_may_be_a_list_or_omitted(tmp_path: Path) -> None:
    for bricks, expected in (
        ({"two": 0.5}, {"two": 0.5}),
        (["two", "one"], {"two": 1.0, "one": 1.0}),
        (None, dict.fromkeys(BRICKS, 1.0)),
    ):
        step: Any = from_data(data({"route": "fixed", **({"bricks": bricks} if bricks else {})}), tmp_path).router
        assert step.bricks == expected
        assert step.prompts(tmp_path) == {name: [] for name in expected}


def test_prompts_are_read_once_and_of_every_template(tmp_path: Path) -> None:
    write_prompts(tmp_path / "texts", {"one": 0, "two": 1, "three": 2}, count=12)
    recipe = from_data(data({"route": "ridge", "calibration": "texts/{brick}.jsonl", "samples": 4}), tmp_path)
    step: Any = recipe.router
    forms = ("Add {} to {}. Answer:", "Sum of {} and {} is", "What do {} and {} make?", "{} plus {} equals")
    rows = [json.dumps({"prompt": form.format(i, 10 + i)}) for form in forms for i in range(3)]  # sorted by template
    (tmp_path / "texts" / "two.jsonl").write_text("\n".join(rows) + "\n", "utf-8")
    found = step.prompts(tmp_path)["two"]
    assert [text.split()[-1] for text in found] == ["Answer:", "is", "make?", "equals"], "one of each template"
    negatives: Any = step.model_copy(update={"negatives": ["texts/one.jsonl", "none.jsonl"]})
    assert "none.jsonl" in negatives.inputs()
    with pytest.raises(WorkbenchError, match=r"none\.jsonl: no such file of prompts"):
        negatives.check_inputs(tmp_path)
    (tmp_path / "texts" / "two.jsonl").write_text('{"prompt": "a"}\n{"prompt": "a"}\n{"text": "b"}\n', "utf-8")
    with pytest.raises(WorkbenchError, match=r"texts/two\.jsonl: 2 different prompts, expected 4 or more"):
        step.check_inputs(tmp_path)
    (tmp_path / "texts" / "two.jsonl").write_text("\n", "utf-8")
    with pytest.raises(WorkbenchError, match=r"texts/two\.jsonl: no prompts, expected 4 or more"):
        step.check_inputs(tmp_path)
    (tmp_path / "texts" / "two.jsonl").write_text('{"prompt": "a"}\n{"completion": "b"}\n', "utf-8")
    with pytest.raises(WorkbenchError, match=r"texts/two\.jsonl:2: expected either 'prompt' or 'text', found completion"):
        step.check_inputs(tmp_path)
    (tmp_path / "texts" / "two.jsonl").unlink()
    with pytest.raises(WorkbenchError, match=r"texts/two\.jsonl: no such file of prompts"):
        step.check_inputs(tmp_path)


CALIBRATED = {"route": "ridge", "calibration": "{brick}.jsonl"}


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ({"route": "ridge"}, "expected `calibration`, a JSONL file of prompts, for every brick"),
        ({"route": "ridge", "bricks": {"one": {}, "two": {"calibration": "a"}}}, "a JSONL file of prompts, for one;"),
        ({"route": "ridge", "calibration": "texts.jsonl"}, "expected a name that contains {brick}"),
        ({**CALIBRATED, "mix": 2}, "mix: no longer a field"),
        ({**CALIBRATED, "abstain": 1}, "less than 1"),
        ({**CALIBRATED, "abstain": None, "threshold": 0.1}, "`abstain: null` sends no prompt to the base"),
        ({**CALIBRATED, "samples": 3}, "greater than or equal to 4"),
        ({**CALIBRATED, "bricks": {"one": {}}}, "route ridge: expected 2 or more bricks to choose among, found 'one' alone"),
        ({**CALIBRATED, "bricks": {"one": {}, "tow": {}}}, "no brick 'tow' under `bricks`. Did you mean 'two'?"),
        ({"route": "rigde", "calibration": "{brick}"}, "unknown route method 'rigde'. Did you mean 'ridge'?"),
        ({"route": "fixed", "bricks": {"one": 0}}, "route fixed: every weight is 0, so no brick acts"),
        ({"route": "fixed", "calibration": "x"}, "calibration"),
    ],
)
def test_wrong_fields_are_refused(step: dict[str, Any], message: str, tmp_path: Path) -> None:
    assert message in refused(step, tmp_path)


def test_a_router_ends_a_recipe(tmp_path: Path) -> None:
    steps = [CALIBRATED, {"merge": "average"}]
    with pytest.raises(WorkbenchError, match="no step can follow `route: ridge`, whose router chooses bricks for the live model"):
        from_data({**data(CALIBRATED), "steps": steps}, tmp_path)
    assert "but a checkpoint cannot hold a router" in refused(CALIBRATED, tmp_path, output={"form": "checkpoint"})
    assert "but an adapter cannot hold a router" in refused(CALIBRATED, tmp_path, output={"form": "adapter"})
    message = refused({"merge": "average"}, tmp_path, output={"form": "configuration"})
    assert "`form: configuration` needs a memory or a router, but no step makes one" in message


def test_overrides_reach_a_route_step(tmp_path: Path) -> None:
    path = tmp_path / "recipes" / "routed.yaml"
    path.parent.mkdir()
    path.write_text(
        "version: 1\nbase: base\nbricks: {one: a, two: b}\nsteps: [{route: ridge, calibration: '{brick}.jsonl'}]\n", "utf-8"
    )
    step: Any = load_recipe(path, ["route-ridge.samples=8", "0.abstain=null"]).router
    assert (step.samples, step.abstain) == (8, None)


def test_constants_that_were_fields_stay_in_keys(tmp_path: Path) -> None:
    """A recipe without them has the key that it had when they were fields with these defaults."""
    step: Any = from_data(data(CALIBRATED), tmp_path).router
    former = {"mix": 1, "layer": None, "window": 16, "lambda": 0.1}
    assert former.items() <= dump_step(step).items()
    again: Any = from_data(data(dump_step(step)), tmp_path).router
    assert again.prompt_files("one") == ["one.jsonl"], "a record is read again"
