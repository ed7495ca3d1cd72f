"""A search over two local Ray nodes: the same candidates and scores as in one process, also where a worker dies."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from worlds.nodes import kill_a_worker, two_nodes
from worlds.project import Project
from worlds.search_world import lay_out, searched

from workbench.recipe.recipe import load_recipe
from workbench.search.cluster import Options, run_on_cluster
from workbench.search.run import Scoring, Search, open_study, prepare, run


def results(search: Search) -> list[dict[str, Any]]:
    study = open_study(search)
    found = [{k: v for k, v in r.items() if k != "seconds"} for r in study.finished()]
    study.close()
    return found


@pytest.mark.slow
def test_two_nodes_and_a_lost_worker(project: Project) -> None:
    """Without giving up, which depends on who was best when, the table is that of one process; the lost worker's task is done again."""
    world = lay_out(project)
    text = searched("{mix.lambda: [0.2, 1.6], mix.bricks.two: [0, 1]}", ", trials: 6, sampler: random, controls: false")
    path = world.write(text.replace("items: [8, 16]", "items: [16]"))
    alone = prepare(load_recipe(path), world.path / "runs", Scoring("cpu"))
    run(alone)
    assert [r["number"] for r in results(alone)] == list(range(6))

    told: list[str] = []
    # Its own scores: what the first search has kept is not seen.
    elsewhere = lay_out(Project(world.path / "there"))
    for name in ("base", "bricks"):
        (elsewhere.path / name).symlink_to(world.path / name)
    (elsewhere.path / "recipes").mkdir()
    there = elsewhere.path / "recipes" / "test.yaml"
    there.write_text(path.read_text())
    search = prepare(load_recipe(there), elsewhere.path / "runs", Scoring("cpu"), events=lambda event: told.append(event["text"]))
    with two_nodes():
        threading.Thread(target=kill_a_worker, daemon=True).start()
        run_on_cluster(search, Options(there, (), elsewhere.path / "runs", Scoring("cpu")), workers=2)
    assert results(search) == results(alone)
    assert any("worker was lost" in text for text in told)
