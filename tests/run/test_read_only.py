"""A project that cannot be written to: runs, copies and caches go elsewhere. The commands obey its permissions, as root too."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from worlds.places import PROJECT
from worlds.processes import in_one_process
from worlds.project import Project

PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH = 24, 1, 2
RECIPE = "bricks: {one: bricks/one}\nsteps: [{merge: task_arithmetic}]\n"


def obey_permissions() -> None:
    """Drop the rights that let root write where no permission allows it, for the program that is started next."""
    for right in (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH):
        ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, right, 0, 0, 0)


class ReadOnly:
    """A read-only project, and a folder of the user who works in it."""

    def __init__(self, folder: Path) -> None:
        self.project, self.own = folder / "project", folder / "own"

        self.preexec = obey_permissions if os.geteuid() == 0 else None

    def workbench(self, *commands: Sequence[str], **environment: str) -> list[subprocess.CompletedProcess[str]]:
        """Run commands one after another in one process of this user."""
        variables = {
            "PATH": os.environ["PATH"],
            "HOME": str(self.own),
            "PYTHONPATH": str(PROJECT),
            "OMP_NUM_THREADS": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        return [
            done for done, _ in in_one_process(commands, self.project, environment=variables | environment, preexec=self.preexec)
        ]


@pytest.fixture(scope="module")
def read_only(bricks: Path, llama: Path) -> Iterator[ReadOnly]:
    with tempfile.TemporaryDirectory() as folder:
        world = ReadOnly(Path(folder))
        (world.project / "recipes").mkdir(parents=True)
        shutil.copytree(llama, world.project / "base")
        shutil.copytree(bricks / "one", world.project / "bricks" / "one")
        Project(world.project).write(RECIPE, "sum.yaml")
        world.own.mkdir()
        for path in (world.project, *world.project.rglob("*")):
            path.chmod(0o555 if path.is_dir() else 0o444)
        try:
            tried = subprocess.run(
                ["touch", "recipes/new"], cwd=world.project, capture_output=True, preexec_fn=world.preexec, check=False
            )
            if tried.returncode == 0:
                pytest.skip("this user may write to folders without permission, and cannot give up that right")
            yield world
        finally:
            for path in (world.project, *world.project.rglob("*")):
                path.chmod(0o755)


@pytest.mark.parametrize(
    ("words", "cache"),
    [
        (("--runs-dir", "{own}/runs"), None),
        (("-o", "{own}/out"), None),
        ((), "cache"),
        (("--runs-dir", "{own}/runs", "-o", "{own}/out"), "cache"),
    ],
)
def test_a_recipe_runs(words: tuple[str, ...], cache: str | None, read_only: ReadOnly) -> None:
    before = sorted(read_only.project.rglob("*"))
    for path in read_only.own.iterdir():
        shutil.rmtree(path)
    moved = {"WORKBENCH_CACHE": str(read_only.own / cache)} if cache else {}
    options = [word.format(own=read_only.own) for word in words]
    runs = options[:2] if "--runs-dir" in options else []
    run = ("run", "recipes/sum.yaml")
    commands = [(*run, "--json", *options), ("runs", "ls", *runs), (*run, *runs)]
    commands += [("doctor", *runs)] if runs and cache else []
    done, listed, again, *doctor = read_only.workbench(*commands, **moved)
    assert done.returncode == 0, done.stderr
    model = Path(json.loads(done.stdout)["model"])
    assert (model / "model.safetensors").is_file()
    assert model.is_relative_to(read_only.own)
    assert sorted(read_only.project.rglob("*")) == before
    if cache:
        assert {path.name for path in (read_only.own / cache).iterdir()} >= {"configurations", "digests"}
    else:
        assert not (read_only.own / "cache").exists()
    assert "done" in listed.stdout
    assert "finished before: nothing to do" in again.stderr
    assert [looked.returncode for looked in doctor] == [0] * len(doctor)


def test_the_hint_of_a_place_that_cannot_be_written_names_what_works(read_only: ReadOnly) -> None:
    (done,) = read_only.workbench(("run", "recipes/sum.yaml", "--runs-dir", "runs"))
    assert done.returncode == 1
    assert "permission denied" in done.stderr
    assert "--runs-dir DIR for runs, -o DIR for a result, WORKBENCH_CACHE=DIR" in done.stderr
