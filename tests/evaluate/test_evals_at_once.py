"""Two evaluations of one project at once: they share the work, and whoever stops leaves the rest to the other."""

from __future__ import annotations

import shutil
import signal
import socket
from pathlib import Path
from typing import Any

import pytest

from worlds.commands import call
from worlds.evals_at_once import answered, evaluation, stored_rows, until
from worlds.local_tasks import CHOICE, tiny

NAMES = ("base", "other", "--suite", "toy", "--suite", "more")


@pytest.fixture
def both(place: Path, tokenizer: Any) -> Path:
    """A project with two models and two suites: four times a configuration under a plan."""
    tiny(1).save_pretrained(place / "other")
    tokenizer.save_pretrained(place / "other")
    (place / "evals" / "tasks" / "pickmore.yaml").write_text(CHOICE.replace("task: pick", "task: pickmore"))
    (place / "evals" / "suites" / "more.yaml").write_text("suite: more\ndescription: Choices\ntasks: [pickmore]\ncluster: id\n")
    return place


@pytest.fixture
def undisturbed(both: Path) -> dict[str, tuple[str, str]]:
    """The rows of one evaluation alone, whose scores are then removed."""
    call("eval", *NAMES)
    rows = stored_rows(both)
    assert len(rows) == 4
    shutil.rmtree(both / "runs")
    return rows


def holders(place: Path) -> list[str]:
    return [file.name for file in (place / "runs" / "scores").rglob("*") if file.suffix in (".holder", ".lock", ".partial")]


def test_two_evaluations_share_the_work(both: Path, undisturbed: dict[str, tuple[str, str]]) -> None:
    """The second one takes the other configuration, comes back, waits, and prints what the first one prints."""
    first = evaluation(both, *NAMES, stop=5)
    until(first, "stopped")
    second = evaluation(both, *NAMES)
    busy = until(second, "the others come first")
    assert f"base on toy: another process (pid {first.pid} on {socket.gethostname()} since " in busy
    assert until(second, "waiting for it").startswith("score   base (1/2)  base on toy: another process")
    assert len(stored_rows(both)) == 3, "all but what the first one holds"
    said = first.communicate("\n")[0], second.communicate()[0]
    assert (first.returncode, second.returncode) == (0, 0)
    assert said[0] == said[1]
    assert "other" in said[0]
    assert stored_rows(both) == undisturbed
    found = answered(both)
    assert len(found) == len(set(found)) == 2 * (24 + 72 + 72), "every request was answered once"
    assert holders(both) == []


def test_what_a_killed_evaluation_leaves_is_resumed(both: Path, undisturbed: dict[str, tuple[str, str]]) -> None:
    first = evaluation(both, *NAMES, stop=5)
    until(first, "stopped")
    kept = len(answered(both))
    impatient = evaluation(both, *NAMES, "--wait", "0")
    error = impatient.communicate()[1]
    assert impatient.returncode == 1
    assert f"base on toy: another process (pid {first.pid} on " in " ".join(error.split())
    assert len(stored_rows(both)) == 3, "the rest is scored before it fails"
    patient = evaluation(both, *NAMES)
    until(patient, "waiting for it")
    first.send_signal(signal.SIGKILL)
    assert patient.communicate()[0]
    assert patient.returncode == 0
    assert stored_rows(both) == undisturbed
    found = answered(both)
    assert 0 < kept < len(found) == len(set(found))
    assert holders(both) == []
    first.communicate()
