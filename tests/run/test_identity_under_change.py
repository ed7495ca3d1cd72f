"""Whatever happens to a project's files, cache and runs, a command says what it would say in a new project with the same files.

A state machine changes files in the ways in which a stat is no content (old times, the same size, another inode, links), damages what the
package has written, interrupts runs, and compares every command with the oracle of `worlds.changing`.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from worlds.changing import (
    LINKS,
    RECIPES,
    USES,
    Changing,
    Fresh,
    compared,
    differences,
    keys,
    lay_out,
    outcome,
    planned,
    run,
    scored,
    scored_and_compared,
)
from worlds.commands import document
from worlds.fuzzing import fuzz
from worlds.tiny import edit_json

from workbench.errors import GateFailedError
from workbench.manifest import MANIFEST, read_manifest
from workbench.run.directory import RunDirectory
from workbench.run.execute import verify_run

STEPS = int(os.environ.get("WORKBENCH_STEPS") or 60)
LENGTH = 20
"""Steps of one history."""
WAYS = ("overwritten", "overwritten, old times", "replaced", "replaced, old times", "cp -p", "truncated", "deleted")
DAMAGES = ("deleted", "cut", "emptied", "garbage", "{}", "[]")


COMMANDS = {"keys": keys, "run": run, "scored": scored}
ACTS = {
    "change": 2, "change and run": 6, "exchange": 1, "point": 1, "damage_cache": 2, "damage_run": 1, "downgrade": 1, "interrupt": 3,
    "keys": 2, "run": 3, "scored": 2, "plan": 1, "compare": 1, "verify": 1,
}  # fmt: skip
"""What a step does -> how often."""
Draw = Callable[[st.SearchStrategy[Any]], Any]


class Stopped(Exception):
    """A run is stopped here."""


def write(file: Path, content: bytes, way: str) -> None:
    """Give a file another content in one of the ways in which programs do that."""
    times = (file.stat().st_atime_ns, file.stat().st_mtime_ns) if file.exists() else None
    if way.startswith("replaced"):
        new = file.with_name("new")
        new.write_bytes(content)
        if times and way.endswith("old times"):
            os.utime(new, ns=times)
        new.rename(file)
        return
    if way == "cp -p":
        other = file.with_name("new")
        other.write_bytes(content)
        os.utime(other, (1e9, 1e9))
        shutil.copy2(other, file)
        other.unlink()
        return
    file.write_bytes(content)
    if times and way.endswith("old times"):
        os.utime(file, ns=times)


class Changes(RuleBasedStateMachine):
    """Changes of a project, and commands."""

    laid_out: ClassVar[Changing]
    fresh: ClassVar[Fresh]
    place: ClassVar[Path]
    taken: ClassVar[int] = 0
    """Steps that all histories have taken."""

    def __init__(self) -> None:
        super().__init__()
        self.project = self.place / "project"
        shutil.rmtree(self.project, ignore_errors=True)
        shutil.copytree(self.laid_out.path, self.project, symlinks=True)
        self.broken: str | None = None
        self.recipes: list[str] = []
        self.files: list[str] = []
        self.links: list[str] = []

    @initialize(recipes=st.lists(st.sampled_from([*RECIPES]), min_size=1, max_size=2, unique=True), tasks=st.booleans())
    def focus(self, recipes: list[str], tasks: bool) -> None:
        """Choose the recipes of a history, so that most of its changes matter to them."""
        used = {
            "base",
            *(word for name in recipes for word in (f"recipes/{name}.yaml", *USES[name].split())),
            *(["evals"] if tasks else []),
        }
        self.recipes = recipes
        self.files = [name for name in self.laid_out.contents if name in used or name.split("/")[0] in used]
        self.links = [link for link in LINKS if link.split("/")[0] in used]
        for recipe in recipes:  # what follows meets full caches
            self.ask(scored if tasks else run, recipe)

    @rule(act=st.sampled_from([name for name, times in ACTS.items() for _ in range(times)]), data=st.data())
    def step(self, act: str, data: st.DataObject) -> None:
        """Change something, or ask for something."""
        type(self).taken += 1
        recipe = data.draw(st.sampled_from(self.recipes))
        if act in COMMANDS:
            self.ask(COMMANDS[act], recipe)
        elif act == "change and run":
            self.change(data.draw)
            self.ask(run, recipe)
        elif act in ("plan", "compare", "interrupt"):
            getattr(self, act)(recipe, data.draw)
        else:
            getattr(self, act)(data.draw)

    @property
    def runs(self) -> list[RunDirectory]:
        """The finished runs."""
        return [found for path in sorted((self.project / "runs").glob("*-*")) if (found := RunDirectory(path)).done]

    # Changes of the user's files.

    def change(self, draw: Draw) -> None:
        """Change a file; one that was truncated or deleted before is whole again."""
        name, number, way = draw(st.sampled_from(self.files)), draw(st.integers(0, 1)), draw(st.sampled_from(WAYS))
        self.restore()
        others = [content for content in self.laid_out.contents[name] if content != (self.project / name).read_bytes()]
        content = others[number % len(others)]
        if way in ("truncated", "deleted"):
            self.broken = name
        if way == "deleted":
            (self.project / name).unlink()
        else:
            write(self.project / name, content[: len(content) // 2] if way == "truncated" else content, way)

    def restore(self) -> None:
        """Make the one broken file whole."""
        if self.broken is not None:
            (self.project / self.broken).write_bytes(self.laid_out.contents[self.broken][0])
            self.broken = None

    def exchange(self, draw: Draw) -> None:
        """Exchange two files, or two folders, by renaming: inodes and times go with the content."""
        what = draw(st.sampled_from(["model.safetensors", ""]))
        self.restore()
        one, two, aside = self.project / "tuned" / what, self.project / "other" / what, self.project / "aside"
        one.rename(aside)
        two.rename(one)
        aside.rename(two)

    def point(self, draw: Draw) -> None:
        """Let a link point to another file or folder."""
        link = self.project / draw(st.sampled_from(self.links or [*LINKS]))
        (target,) = {*LINKS[str(link.relative_to(self.project))]} - {str(link.readlink())}
        link.unlink()
        link.symlink_to(target)

    # Changes of what the package wrote.

    def damage_cache(self, draw: Draw) -> None:
        """Damage the files of one name in a folder of the cache, or remove the folder."""
        cache, how = self.project / ".workbench", draw(st.sampled_from(DAMAGES))
        if not (folders := sorted(path.name for path in cache.glob("*"))):
            return
        folder = cache / draw(st.sampled_from(folders))
        # without its manifest, a result is one of an earlier version, which is trusted
        inner = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST]
        # names of entries have times and inodes in them: what is drawn is the same in every process
        names = sorted({"/".join(path.parts[1:]) for path in inner})
        if not names:
            return
        name = draw(st.sampled_from([*names, *names, None]))
        for path in [path for path in inner if name is not None and "/".join(path.parts[1:]) == name]:
            damage(folder / path, how)
        if name is None:
            shutil.rmtree(folder)

    def damage_run(self, draw: Draw) -> None:
        """Damage a finished run, which every command notices that says so."""
        how, runs = draw(st.sampled_from(["deleted", "cut", "added", "manifest", "same size"])), self.runs
        if not runs:
            return
        found = runs[draw(st.integers(0, len(runs) - 1))]
        if found.harm() or not found.sealed:
            return
        sealed = read_manifest(found.path)
        assert sealed is not None
        name = draw(st.sampled_from(sorted(n for n in sealed.files if n not in ("run.json", "README.md") and "README" not in n)))
        file, before = found.path / name, (found.path / name).read_bytes()
        if how == "added":
            (found.path / "model" / "more").parent.mkdir(exist_ok=True)
            (found.path / "model" / "more").write_bytes(b"")
        elif how == "manifest":
            (found.path / MANIFEST).unlink()
        elif how == "same size":
            write(file, bytes([before[0] ^ 1]) + before[1:], "overwritten, old times")
        else:
            damage(file, how)
        with pytest.raises(GateFailedError):
            verify_run(found)
        if how == "same size":  # which is found where contents are compared
            file.write_bytes(before)
            verify_run(found)
            return
        rows = document("runs", "ls", "--runs-dir", str(self.project / "runs"))
        assert {row["name"]: row["status"] for row in rows}[found.name] == "broken"

    def downgrade(self, draw: Draw) -> None:
        """Make documents look like those of an earlier version."""
        what = draw(st.sampled_from(["run", "scores", "configurations", "tasks"]))
        cache, runs = self.project / ".workbench", self.project / "runs"
        if what == "run":
            for found in self.runs:
                if not found.harm():
                    (found.path / MANIFEST).unlink(missing_ok=True)
                    file = found.path / "run.json"
                    file.write_text(
                        json.dumps({k: v for k, v in json.loads(file.read_bytes()).items() if k != "manifest"}), "utf-8"
                    )
        for file in (runs / "scores").glob("*/*.json") if what == "scores" else ():
            if file.name != "plan.json":
                edit_json(file, version=1, rows=None, items=None, key=None)
        for file in (cache / "configurations").glob("*.json") if what == "configurations" else ():
            known = json.loads(file.read_bytes() or b"{}") if whole(file) else {}
            edit_json(
                file, **{k: {**row, "digest": "0" * 32, "libraries": {"torch": "1.0"}} for k, row in known.items()}
            ) if known else None
        for file in (cache / "tasks").glob("*.json") if what == "tasks" else ():
            if whole(file) and (known := json.loads(file.read_bytes())):
                edit_json(file, format="task-1", source={**known["source"], "digest": "0" * 32})

    # Commands.

    def ask(self, command: Callable[[Path, str], Any], recipe: str) -> None:
        """Run a command whose output depends on the user's files alone."""
        self.agree(outcome(self.project, command, recipe), command, recipe)

    def agree(self, found: Any, command: Callable[[Path, str], Any], recipe: str) -> None:
        """Compare with a fresh project."""
        wrong = differences(found, self.fresh.says(self.project, command, recipe))
        assert not wrong, f"{command.__name__} {recipe}:\n" + "\n".join(wrong[:12])

    def plan(self, recipe: str, draw: Draw) -> None:
        """Plan: a key that is known is the right one, and a run that is done has the right files."""
        found = outcome(self.project, planned, recipe)
        expected = self.fresh.says(self.project, planned, recipe)
        if "error" in found:
            assert found == expected
            return
        assert not differences(found[0], expected[0])
        key, name, done = found[1]
        if key is not None:
            assert key == self.fresh.says(self.project, keys, recipe)[4]
        if done and name is not None:  # a run that was interrupted behind its result has another name
            output = RunDirectory(self.project / "runs" / name).read_record().to_dict()["output"]
            assert not differences(output, self.fresh.says(self.project, run, recipe)["record"]["output"])

    def compare(self, recipe: str, draw: Draw) -> None:
        """Compare stored scores: those of the files as they are, or none."""
        found = outcome(self.project, compared, recipe)
        if "error" in found and found["error"].startswith("not scored yet"):
            return
        expected = self.fresh.says(self.project, scored_and_compared, recipe)
        if "error" not in found or "error" not in expected:  # scoring refuses broken files in other words
            self.agree(found, scored_and_compared, recipe)

    def interrupt(self, recipe: str, draw: Draw) -> None:
        """Stop a run at one of its last events; the last one comes behind the result and before its final name."""
        event, told = draw(st.sampled_from([0, 3, 6, 99, 99])), [0]

        def stop(found: Any) -> None:
            told[0] += found["stage"] == "write" or found.get("text") == "done"
            if found.get("text") == "done" or told[0] > event:
                raise Stopped

        with suppress(Stopped):
            outcome(self.project, lambda project, name: run(project, name, stop), recipe)

    def verify(self, draw: Draw) -> None:
        """Verify all runs: those that are not broken have what they wrote, whatever happened to their inputs."""
        for found in self.runs:
            if not found.harm():
                verify_run(found)


def whole(file: Path) -> bool:
    """Whether a document is an object."""
    try:
        return isinstance(json.loads(file.read_bytes()), dict)
    except ValueError:
        return False


def damage(file: Path, how: str) -> None:
    """Damage a file so that its size changes."""
    if how == "deleted":
        file.unlink()
    else:
        raw = file.read_bytes()
        file.write_bytes(
            {"cut": raw[: len(raw) // 2], "emptied": b"", "garbage": b"\xff" * (len(raw) + 1)}.get(how, how.encode())
        )


@pytest.fixture
def machine(tmp_path: Path) -> type[Changes]:
    """The machine on a project of this test."""

    class Here(Changes):
        laid_out = lay_out(tmp_path / "laid out")
        fresh = Fresh(tmp_path / "fresh")
        place = tmp_path

    (tmp_path / "fresh").mkdir()
    return Here


def test_commands_say_what_a_fresh_project_says(machine: type[Changes]) -> None:
    run_state_machine_as_test(machine, settings=settings(fuzz, max_examples=max(1, STEPS // LENGTH), stateful_step_count=LENGTH))  # type: ignore[no-untyped-call]
    sys.stdout.write(f"{machine.taken} steps, {len(machine.fresh.known)} answers of fresh projects\n")
    assert machine.taken > STEPS // 2
