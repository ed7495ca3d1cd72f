"""Documents of `--json` fit their published schemas, and no key changes unnoticed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

from worlds.json_commands import call_all, paths_of, problems, write_project
from worlds.places import FIXTURES, PARTS, PROJECT
from worlds.project import Project

from workbench.cli.app import app
from workbench.cli.published import DOCUMENTS, pages, schema, schema_file
from workbench.ground.results import JsonObject
from workbench.steps.fields import field_docs

KEYS = FIXTURES / "json_keys.json"
"""Command -> paths of the keys that it printed when they were last decided. A key that disappears breaks a user's script."""


def commands_with_json(command: Any, name: str = "") -> Iterator[str]:
    for key, child in getattr(command, "commands", {}).items():
        yield from commands_with_json(child, f"{name} {key}".strip())
    if any("--json" in parameter.opts for parameter in command.params):
        yield name


def classes(cls: type[JsonObject] = JsonObject) -> Iterator[type[JsonObject]]:
    for inner in cls.__subclasses__():
        if inner.__module__.startswith("workbench.") and not inner.__name__.startswith("_"):
            yield inner
        yield from classes(inner)


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory, llama: Path, bricks: Path) -> dict[str, list[Any]]:
    """Command -> the documents that it printed on a tiny project."""
    project = Project(tmp_path_factory.mktemp("json"))
    (project.path / "recipes").mkdir()
    (project.path / "base").symlink_to(llama)
    (project.path / "bricks").symlink_to(bricks)
    write_project(project)
    before = Path.cwd()
    os.chdir(project.path)
    try:
        return call_all(project)
    finally:
        os.chdir(before)


def test_every_command_with_json_has_a_document() -> None:
    assert sorted(commands_with_json(typer.main.get_command(app))) == sorted(DOCUMENTS)


def test_every_field_has_a_text() -> None:
    bare = [f"{cls.__name__}.{name}" for cls in classes() for name, text in field_docs(cls).items() if not text.endswith(".")]
    assert bare == []


@pytest.mark.part(*PARTS)
def test_the_schemas_are_those_of_the_commands() -> None:
    schemas = {p.relative_to(PROJECT / "docs").as_posix() for p in (PROJECT / "docs" / "schemas").iterdir()}
    assert schemas == {schema_file(command) for command in DOCUMENTS}
    assert set(pages()) == schemas | {"json.md"}


@pytest.mark.parametrize("command", DOCUMENTS)
def test_a_document_fits_its_published_schema(command: str, printed: dict[str, list[Any]]) -> None:
    published = json.loads((PROJECT / "docs" / schema_file(command)).read_text("utf-8"))
    assert published == schema(command)
    assert printed[command], "the world calls every command"
    for document in printed[command]:
        assert problems(document, published, published) == []


EXTRACTED = pytest.param(
    "brick ls", marks=pytest.mark.part("upkeep")
)  # the card of a brick that `brick extract` made has most keys


@pytest.mark.parametrize("command", [EXTRACTED if command == "brick ls" else command for command in DOCUMENTS])
def test_keys_are_those_that_were_decided(command: str, printed: dict[str, list[Any]]) -> None:
    found = sorted({path for document in printed[command] for path in paths_of(document)})
    assert found == json.loads(KEYS.read_text("utf-8"))[command]


def test_the_reader_of_schemas_finds_differences(printed: dict[str, list[Any]]) -> None:
    published = schema("run")
    document = printed["run"][0]
    assert problems({**document, "seconds": "1"}, published, published) == [".seconds: expected number, found '1'"]
    assert problems({k: v for k, v in document.items() if k != "key"}, published, published) == [": lacks key"]
    assert problems({**document, "status": "failed"}, published, published) == [".status: 'failed' is none of ['done']"]
