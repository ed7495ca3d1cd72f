"""`report` and searches: the page beside the comparison, alone, or not at all; results that cannot be read."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from worlds.commands import call, refused
from worlds.project import Project
from worlds.search_document import make_search
from worlds.suites import clustered_suite

from workbench.cli.app import app
from workbench.ground.errors import WorkbenchError

RECIPE = "bricks: {one: bricks/one, two: bricks/two}\nsteps: [{id: mix, merge: linear}]\neval: [mini]\n"
SEARCH = "search: {space: {mix.lambda: [0.2, 1.2]}, trials: 4}\n"
PAGES = ["report-search.html", "report-search.json", "report-search.md"]


@pytest.fixture
def world(project: Project, cwd: Path) -> Project:
    clustered_suite(project)
    project.write(RECIPE + SEARCH, "toy.yaml")
    project.write(RECIPE, "plain.yaml")
    return project


def put(name: str = "toy", key: str = "da01b81b", age: float = 0.0, **changes: object) -> Path:
    """A search's result on disk, as old as `age` seconds."""
    file = Path("runs/search") / f"{name}-{key}" / "search.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({**make_search(6, comparison=False), "name": name, **changes}))
    os.utime(file, (1e9 - age, 1e9 - age))
    return file


def written() -> list[str]:
    return sorted(p.name for p in Path("reports").iterdir()) if Path("reports").is_dir() else []


def test_a_recipe_that_is_only_searched_gets_the_page_alone(world: Project) -> None:
    put()
    assert call("report", "toy").stdout.splitlines() == [f"reports/report-search.{s}" for s in ("html", "md", "json")]
    assert written() == PAGES
    assert "Search of toy" in Path("reports/report-search.html").read_text("utf-8")
    call("report", "recipes/toy.yaml", "-o", "other/mine.html")
    assert sorted(p.name for p in Path("other").iterdir()) == ["mine-search.html", "mine-search.json", "mine-search.md"]
    assert len(call("report").stdout.splitlines()) == 3, "of all recipes, none of which is scored"


def test_the_newest_result_of_that_name_counts(world: Project) -> None:
    put(key="00000000", age=50, sampler="gp")
    put(key="11111111", age=10, sampler="cmaes")
    put(name="toy-deep", key="22222222", sampler="grid")
    call("report", "toy")
    assert json.loads(Path("reports/report-search.json").read_text("utf-8"))["sampler"] == "cmaes"


def test_scored_recipes_get_the_report_as_before_and_the_page_beside_it(world: Project) -> None:
    call("eval", "toy", "plain", "--quiet")
    assert call("report", "toy").stdout.splitlines() == [f"reports/report.{s}" for s in ("html", "md", "json")]
    before = json.loads(Path("reports/report.json").read_text("utf-8"))
    file = put()
    found = call("report", "toy").stdout.splitlines()
    assert found == [f"reports/{name}.{s}" for name in ("report", "report-search") for s in ("html", "md", "json")]
    after = json.loads(Path("reports/report.json").read_text("utf-8"))
    for document in (before, after):
        document["provenance"].pop("created")
    assert after == before
    assert json.loads(Path("reports/report-search.json").read_text("utf-8")) == json.loads(file.read_text("utf-8"))
    assert len(call("report", "plain").stdout.splitlines()) == 3, "no search of a recipe that is not named"
    assert len(call("report").stdout.splitlines()) == 6


def test_two_searches_have_their_names_in_the_files(world: Project) -> None:
    world.write(RECIPE + SEARCH, "other.yaml")
    put()
    put(name="other")
    call("report", "toy", "other")
    assert [n for n in written() if n.endswith(".html")] == ["report-search-other.html", "report-search-toy.html"]


def test_neither_scored_nor_searched(world: Project) -> None:
    error = refused("report", "toy")
    assert error.message == "not scored yet: toy"
    assert error.hint == "workbench eval toy; workbench search toy (to report its search alone)"
    put()
    error = refused("report", "toy", "plain")
    assert error.message == "not scored yet: plain"
    assert error.hint == "workbench eval toy plain"
    assert written() == []


def test_a_search_that_is_not_finished(world: Project) -> None:
    Path("runs/search/toy-da01b81b").mkdir(parents=True)
    result = CliRunner().invoke(app, ["report", "toy"])
    assert "the search of toy is not finished; resume it: workbench search recipes/toy.yaml" in result.stderr
    assert isinstance(result.exception, WorkbenchError)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON: Expecting property name"),
        ("[]", "found a list, expected an object"),
        ('{"version": 1, "name": "toy", "objectives": [], "space": {}, "trials": []}', "key: Field required"),
    ],
)
def test_results_that_cannot_be_read(world: Project, text: str, message: str) -> None:
    put().write_text(text)
    error = refused("report", "toy")
    assert error.message.startswith("runs/search/toy-da01b81b/search.json: ")
    assert message in error.message
    assert error.hint == "workbench search recipes/toy.yaml"
