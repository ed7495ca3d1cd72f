"""A search over two local Ray nodes: the same candidates and scores as in one process, also where a worker dies."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from worlds.project import Project
from worlds.search_world import lay_out, searched

from workbench.recipe.recipe import load_recipe
from workbench.search.cluster import Options, run_on_cluster
from workbench.search.run import Scoring, Search, open_study, prepare, run

ray = pytest.importorskip("ray", reason="pip install 'brick-workbench[cluster]'")


@pytest.fixture
def nodes() -> Iterator[Any]:
    """Two nodes of one CPU each."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False, logging_level=40)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def kill_one() -> None:
    """Kill the process of a worker once it is at work."""
    import psutil

    end = time.monotonic() + 400
    while time.monotonic() < end:
        for process in psutil.process_iter(["cmdline"]):
            if (process.info["cmdline"] or [""])[0].startswith("ray::Worker.score"):
                process.kill()
                return
        time.sleep(0.02)


def results(search: Search) -> list[dict[str, Any]]:
    study = open_study(search)
    found = [{k: v for k, v in r.items() if k != "seconds"} for r in study.finished()]
    study.close()
    return found


def test_two_nodes_and_a_lost_worker(nodes: Any, project: Project) -> None:
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
    threading.Thread(target=kill_one, daemon=True).start()
    run_on_cluster(search, Options(there, (), elsewhere.path / "runs", Scoring("cpu")), workers=2)
    assert results(search) == results(alone)
    assert any("worker was lost" in text for text in told)
