"""Run directories: what may be removed, and a run that waits for the process that writes it."""

from __future__ import annotations

import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from worlds.commands import call
from worlds.project import Project
from worlds.stopped import stopped_run
from worlds.tiny import files_of

from workbench.ground.errors import WorkbenchError

TIES = "bricks: {one: bricks/one, two: bricks/two, full: bricks/full}\nsteps: [{id: mix, merge: ties}]\n"


@pytest.fixture
def runs(project: Project, cwd: Path) -> Path:
    """A runs folder with one finished run, in the current directory."""
    project.run("steps: []\n", "plain.yaml")
    return project.path / "runs"


def only(runs: Path) -> Path:
    (path,) = (record.parent for record in runs.glob("*/run.json"))
    return path


def files(place: Path) -> dict[str, str]:
    """Every path below a folder, links and folders included."""
    return {
        str(p.relative_to(place)): str(p.readlink()) if p.is_symlink() else p.read_bytes().hex() if p.is_file() else ""
        for p in sorted(place.rglob("*"))
    }


def outside(runs: Path) -> str:
    """A run of ours in another place."""
    shutil.copytree(only(runs), runs.parent / "kept" / only(runs).name)
    return f"kept/{only(runs).name}"


def foreign_inside(runs: Path) -> str:
    """Another program's folder in the runs folder: trackers write a run.json too."""
    (runs / "sweep").mkdir()
    (runs / "sweep" / "run.json").write_text('{"version": 1, "status": "done", "lr": 0.1}')
    (runs / "sweep" / "weights.bin").write_bytes(b"x" * 100)
    return "sweep"


def foreign_damaged(runs: Path) -> str:
    """A run.json that cannot be read, in a folder that is not named like a run."""
    (runs / "photos").mkdir()
    (runs / "photos" / "run.json").write_text("{")
    (runs / "photos" / "recipe.yaml").write_text("")
    return "photos"


def foreign_list(runs: Path) -> str:
    (runs / "photos").mkdir()
    (runs / "photos" / "run.json").write_text("[1]")
    return "photos"


def with_own_files(runs: Path) -> str:
    """A run in which somebody has left five files."""
    for name in "abcde":
        (only(runs) / name).write_text("mine")
    return only(runs).name


def link_inside(runs: Path) -> str:
    """A link in the runs folder to a run in another place."""
    outside(runs)
    (runs / "link-0123456789").symlink_to(runs.parent / outside_name(runs))
    return "link-0123456789"


def outside_name(runs: Path) -> str:
    return f"kept/{next(p.name for p in (runs.parent / 'kept').iterdir())}"


def link_outside(runs: Path) -> str:
    """A link elsewhere to a run in the runs folder, given as a path."""
    (runs.parent / "latest").symlink_to(only(runs))
    return "latest"


def nested(runs: Path) -> str:
    """A run's directory two levels down."""
    shutil.copytree(only(runs), runs / "old" / only(runs).name)
    return f"runs/old/{next((runs / 'old').iterdir()).name}"


def dots(runs: Path) -> str:
    """Up and out of the runs folder."""
    outside(runs)
    return f"runs/../{outside_name(runs)}"


def itself(runs: Path) -> str:
    """The runs folder, in which somebody has left a run.json."""
    shutil.copyfile(only(runs) / "run.json", runs / "run.json")
    return f"runs/{only(runs).name}/.."


def project_folder(runs: Path) -> str:
    """The project, in which a tracker has left a run.json."""
    (runs.parent / "run.json").write_text("{}")
    return "."


REFUSED: dict[Callable[[Path], str], str] = {
    outside: "not a directory directly in the runs folder",
    foreign_inside: r"its run\.json is not the record of a run",
    foreign_damaged: r"its run\.json is not the record of a run",
    foreign_list: r"its run\.json is not the record of a run",
    with_own_files: r"contains files that are not part of a run: a, b, c, d and 1 more$",
    link_inside: "is a link to .*, but `runs rm` removes only run directories",
    link_outside: "is a link to .*, but `runs rm` removes only run directories",
    nested: "not a directory directly in the runs folder",
    dots: "not a directory directly in the runs folder",
    itself: "not a directory directly in the runs folder",
    project_folder: "not a directory directly in the runs folder",
}


@pytest.mark.parametrize("make", REFUSED, ids=lambda make: make.__name__)
def test_rm_removes_nothing_but_runs_of_the_runs_folder(make: Callable[[Path], str], runs: Path) -> None:
    name = make(runs)
    before = files(runs.parent)
    with pytest.raises(WorkbenchError, match=REFUSED[make]) as caught:
        call("runs", "rm", "-y", name)
    assert caught.value.hint
    assert files(runs.parent) == before


def test_rm_refuses_all_where_one_is_refused(runs: Path) -> None:
    good = only(runs).name
    foreign_inside(runs)
    before = files(runs.parent)
    with pytest.raises(WorkbenchError, match="not the record of a run"):
        call("runs", "rm", "-y", good, "sweep")
    assert files(runs.parent) == before


@pytest.mark.parametrize("how", ["name", "start", "relative", "absolute", "through a linked runs folder", "twice"])
def test_rm_removes_a_run(how: str, runs: Path) -> None:
    name = only(runs).name
    (runs.parent / "disk").symlink_to(runs)
    given = {"name": [name], "start": [name[:8]], "relative": [f"./runs/{name}"], "absolute": [str(runs / name)],
             "through a linked runs folder": ["--runs-dir", "disk", name], "twice": [name, f"runs/{name}"]}[how]  # fmt: skip
    assert call("runs", "rm", "-y", *given).stderr.count(f"removed {name}") == 1
    assert not (runs / name).exists()
    assert list(runs.glob("*/run.json")) == []


def test_rm_removes_a_run_elsewhere_when_its_runs_folder_is_named(runs: Path) -> None:
    """What the refusal prints works."""
    name = outside(runs)
    with pytest.raises(WorkbenchError) as caught:
        call("runs", "rm", "-y", name)
    command = (caught.value.hint or "").partition("workbench ")[2].split()
    call(*command, "-y")
    assert not (runs.parent / name).exists()
    assert only(runs).is_dir()


def test_rm_removes_a_damaged_run_of_ours(runs: Path) -> None:
    path = only(runs)
    (path / "run.json").write_text('{"status": "do', "utf-8")
    call("runs", "rm", "-y", path.name)
    assert not path.exists()


def test_rm_removes_a_link_in_a_run_and_not_what_it_points_to(runs: Path) -> None:
    """A model that was moved to another disk stays there."""
    path, disk = only(runs), runs.parent / "disk"
    (path / "model").rename(disk)
    (path / "model").symlink_to(disk)
    before = files(disk)
    call("runs", "rm", "-y", path.name)
    assert not path.exists()
    assert files(disk) == before


# -- a run that another process writes


@pytest.mark.parametrize("end", ["done", "killed"])
def test_wait_goes_on_with_what_the_other_process_leaves(end: str, project: Project) -> None:
    """Two processes: the second one waits for the first one's lock, then finds the run finished, or resumes it. Same bytes either way."""
    undisturbed = files_of(Path(project.run(TIES)["model"]))
    shutil.rmtree(project.path / "runs")
    shutil.rmtree(project.path / ".workbench")  # the inputs' digests are not known yet: the first process renames its directory
    recipe = project.path / "recipes" / "test.yaml"
    command = [sys.executable, "-m", "workbench", "run", str(recipe)]
    with stopped_run(project, recipe) as first:
        busy = subprocess.run(command, cwd=project.path, capture_output=True, text=True, check=False)
        assert busy.returncode == 1
        assert re.search(
            rf"another process \(pid {first.pid} on \S+ since [^)]* UTC\) writes this run", " ".join(busy.stderr.split())
        )
        assert "--wait" in busy.stderr
        second = subprocess.Popen(
            [*command, "--wait"], cwd=project.path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        try:
            assert second.stderr is not None
            said = []
            while not said or "waiting for it" not in said[-1]:
                said.append(second.stderr.readline())
                assert said[-1], f"the second process ended: {said}"
            assert f"another process (pid {first.pid} on {socket.gethostname()} since " in said[-1]
            if end == "done":
                assert first.stdin is not None
                first.stdin.write("\n")
                first.stdin.flush()
                assert first.wait() == 0
            else:
                first.send_signal(signal.SIGKILL)
            model, errors = second.communicate()
        finally:
            second.kill()
    assert second.returncode == 0, errors
    assert ("finished before: nothing to do" in errors) == (end == "done")
    assert files_of(project.path / model.strip()) == undisturbed
    (record,) = (project.path / "runs").glob("*/run.json")
    log = (record.parent / "log.jsonl").read_text("utf-8")
    assert log.count('"text": "done"') == 1, "the run was written once"
