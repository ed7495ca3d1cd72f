"""Journals of searches that a crash or a user has damaged."""

from __future__ import annotations

from pathlib import Path

import pytest

from worlds.project import Project

from workbench.ground.errors import WorkbenchError
from workbench.recipe.recipe import load_recipe
from workbench.search.space import Space
from workbench.search.study import JOURNAL, Study


def study(folder: Path, project: Project) -> Study:
    text = "bricks: {one: bricks/one}\nsteps: [{id: mix, merge: ties}]\nsearch: {space: {mix.lambda: [0.2, 1.6]}, objective: x}\n"
    return Study(folder, Space(load_recipe(project.write(text))), sampler="random", objectives=1, key="k")


def test_a_journal_whose_last_line_was_cut(project: Project, tmp_path: Path) -> None:
    """A line that was appended behind half a line was lost, and the file could never be read again."""
    for i in range(3):
        opened = study(tmp_path / "s", project)
        trial = opened.claim("search", None)
        assert trial is not None
        opened.finish(trial, [0.1 * i], {"digest": "d"})
        opened.close()
    journal = tmp_path / "s" / JOURNAL
    whole = journal.read_bytes()
    journal.write_bytes(whole + b'{"op_code": 5, "worker')
    opened = study(tmp_path / "s", project)
    trial = opened.claim("search", None)
    assert trial is not None
    opened.finish(trial, [0.9], {"digest": "d"})
    opened.close()
    assert journal.read_bytes().startswith(whole)
    opened = study(tmp_path / "s", project)
    assert [record.scores for record in opened.finished("search")] == [[0.0], [0.1], [0.2], [0.9]]
    opened.close()


@pytest.mark.parametrize("line", ["{", "[]", '{"op_code": "x"}', '{"op_code": 5, "worker_id": 3}', "\0"])
def test_a_journal_with_a_damaged_line(line: str, project: Project, tmp_path: Path) -> None:
    study(tmp_path / "s", project).close()
    journal = tmp_path / "s" / JOURNAL
    lines = journal.read_text("utf-8").split("\n")
    journal.write_text("\n".join([lines[0], line, *lines[1:]]), "utf-8")
    with pytest.raises(WorkbenchError, match=r"journal\.log:2: the file is not a journal of a search"):
        study(tmp_path / "s", project)
