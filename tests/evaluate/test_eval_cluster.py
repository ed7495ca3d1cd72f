"""`eval --engine ray` over two local nodes: the scores of one process, none computed twice, also where a worker dies."""

from __future__ import annotations

import json
import re
import threading
from pathlib import Path
from typing import Any

import pytest

from worlds.commands import call, refused
from worlds.nodes import kill_a_worker, two_nodes
from worlds.project import Project
from worlds.search_world import RECIPE, lay_out

from workbench.evaluate import cluster
from workbench.evaluate import cluster as on_cluster
from workbench.ground.trust import VARIABLE, is_trusted

ALIKE = RECIPE.replace("id: mix, merge: ties, density: 0.5, lambda: 1.0", "id: mix, merge: average")  # the weights of a control


def stored(runs: Path) -> dict[str, Any]:
    """Score documents by path, without what differs between two times and places."""
    found = {}
    for path in sorted((runs / "scores").rglob("*.json")):
        if path.parent.name == "passed":  # the first configuration is checked as a whole, and workers start at the same time
            continue
        document = json.loads(path.read_text("utf-8"))
        check = document.pop("check", None)
        assert check is None or check["max_difference"] <= check["tolerance"]
        for part in (document, *document.get("tasks", {}).values()):
            for key in ("created", "seconds", "measured"):
                part.pop(key, None)
        found[str(path.relative_to(runs))] = document
    return found


@pytest.mark.slow
def test_two_nodes_and_a_lost_worker(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two suites of equal items, which have one digest, a recipe with its controls, and a recipe with the weights of one of them."""
    world = lay_out(project)
    suites = world.path / "evals" / "suites"
    (suites / "again.yaml").write_text((suites / "words.yaml").read_text().replace("suite: words", "suite: again"))
    world.write(RECIPE, "mine.yaml")
    world.write(ALIKE, "alike.yaml")
    monkeypatch.chdir(world.path)
    command = ("eval", "mine", "alike", "--suite", "words", "--suite", "again", "--device", "cpu")
    alone = call(*command, "--runs-dir", "alone")
    shares = re.findall(r"(\w+): 80 items  \((\d+) % of 6", alone.output)
    assert shares[:4] == [("words", "8"), ("again", "17"), ("words", "25"), ("again", "33")], "both suites are work"
    submitted: list[str] = []
    submit = on_cluster.Pool.submit
    monkeypatch.setattr(
        on_cluster.Pool, "submit", lambda pool, unit, *rest: (submitted.append(str(unit)), submit(pool, unit, *rest))
    )
    with two_nodes():
        error = refused(*command, "--runs-dir", "spread", "--engine", "ray", "--workers", "9")
        assert error.message == "--workers 9: the cluster has 2 CPUs and 0 GPUs"
        ended = threading.Event()
        threading.Thread(target=kill_a_worker, args=(ended,), daemon=True).start()
        # Digests of configurations that the first call has kept would leave the workers less to do.
        for path in (world.path / ".workbench").glob("configurations"):
            path.rename(world.path / "elsewhere")
        try:
            spread = call(*command, "--runs-dir", "spread", "--engine", "ray", "--workers", "2")
        finally:
            ended.set()
    assert "its worker was lost, scoring again" in spread.output
    assert spread.output.count("  (100 % of 6 configurations)\n") == 1
    assert stored(world.path / "spread") == stored(world.path / "alone") != {}
    table = alone.output[alone.output.index("configuration ") :].replace("--runs-dir alone", "--runs-dir spread")
    assert spread.output.endswith(table)
    lost = spread.output.count("scoring again")
    composed = [unit for unit in submitted if unit.endswith(": composing")]
    scored = [unit for unit in submitted if not unit.endswith(": composing")]
    assert {unit.partition(":")[0] for unit in composed} == {"base", "one", "two", "average", "mine", "alike"}
    assert len(set(scored)) == 2 * 5, "the average and its equal are scored once on each suite"
    assert len(submitted) == len(set(submitted)) + lost
    again = call(*command, "--runs-dir", "spread", "--engine", "ray", "--workers", "2")
    assert again.output.endswith(table), "nothing is left to score, so that no cluster is started"


def test_files_that_differ_between_nodes(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that finds other suites than the command stops it, instead of scoring something else."""
    lay_out(project)
    monkeypatch.chdir(project.path)
    unit = on_cluster.Unit("base", "0" * 32, "words")
    worker = on_cluster.Worker(lambda: on_cluster.Subjects([], [], None, Path("runs")))  # type: ignore[arg-type]
    with pytest.raises(on_cluster.WorkbenchError, match="a node of the cluster finds other configurations or suites"):
        worker.score(unit)


@pytest.mark.parametrize("trusted", [True, False])
def test_a_worker_has_the_directory_and_the_trust_of_the_command(
    trusted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Method files of a project that is trusted here run on other nodes, whose user settings may not name it; others do not."""

    class Seen:
        def __init__(self, name: str) -> None:
            self.name = name

        def score(self, more: str) -> tuple[str, Path, bool]:
            return self.name + more, Path.cwd(), is_trusted(tmp_path)

    monkeypatch.setenv(VARIABLE, "0")
    monkeypatch.chdir(tmp_path.parent)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "settings"))
    hosted = cluster._Hosted(1, Seen, ("one",), tmp_path, trusted)
    assert hosted.score("+") == ("one+", tmp_path, trusted)
