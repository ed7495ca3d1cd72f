"""A state machine of a project whose files, cache and runs change between commands, each of which must say what a new project says.

It changes files in the ways in which a stat is no content (old times, the same size, another inode, links), damages what the package has
written, interrupts runs, and compares every command with the oracle of `worlds.changing`.
"""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import pytest

from worlds.changing import (
    LINKS,
    RECIPES,
    USES,
    Changing,
    Fresh,
    compared,
    differences,
    keys,
    outcome,
    part_of,
    planned,
    run,
    scored,
    scored_and_compared,
)
from worlds.commands import document
from worlds.file_changes import BREAKING, DAMAGES, WAYS, damage, whole, write
from worlds.tiny import edit_json

from workbench.ground.errors import GateFailedError
from workbench.ground.manifest import MANIFEST, read_manifest
from workbench.run.directory import RunDirectory
from workbench.run.execute import verify_run

LENGTH = 20
"""Steps of one history."""
SEED = 0
RECIPES_EACH = 3
"""Recipes of one history: every recipe has its turn in three histories."""
COMPARED = ("digests", "configurations", "said", "tasks", "edits", "bricks")
"""Folders of the cache whose contents are compared at each use; of the others, sizes."""
ACTS = {
    "change_and_ask": 24, "ask_again": 1, "exchange": 2, "damage_cache": 6, "damage_run": 1, "downgrade": 2, "interrupt": 5, "plan": 1,
    "compare": 1, "verify": 1,
}  # fmt: skip
"""What a step does -> how often."""
RARE = ("tokenizer", "config", "generation", "template", "adapter", "links")
"""Parts that few results depend on: they change twice as often as the others, whatever number of files they are in."""
KEEN = {
    "tokenizer": ("taught", "spoken", "measured", "union"),
    "template": ("spoken", "taught", "union", "mix"),
    "texts": ("taught", "spoken", "measured"),
}
"""Part -> recipes whose weights depend on it, where not all do that read its files."""
OWNERS = {
    "edits": "taught",
    "said": "taught",
    "factsuites": "taught",
    "bricks": "spoken",
    "gguf": "packed",
    "tokenizers": "union",
}
"""Folder of the cache -> the recipe that reads it, where only one does."""
MISSED = (AssertionError, pytest.fail.Exception)
"""What a step raises where the package is wrong."""


class Stopped(Exception):
    """A run is stopped here."""


class Changes:
    """One history of a project: changes, and commands.

    Args:
        world: The project as it is laid out.
        fresh: What commands say in new projects.
        place: An empty folder, or that of the last history.
        seed: Decides what happens.
        number: Number of the history, which decides its recipes, and whether it has tasks.
        decks: Contents of each file that have not had their turn, in this or an earlier history.
    """

    def __init__(self, world: Changing, fresh: Fresh, place: Path, seed: int, number: int, decks: dict[str, list[bytes]]) -> None:
        self.world, self.fresh, self.random = world, fresh, Random(f"{seed} {number}")
        self.project = place / "project"
        shutil.rmtree(self.project, ignore_errors=True)
        shutil.copytree(world.path, self.project, symlinks=True)
        self.broken: str | None = None
        self.did: list[str] = []
        self.decks = decks
        turn, first = divmod(RECIPES_EACH * number, len(RECIPES))
        self.recipes = Random(f"{seed} turn {turn}").sample([*RECIPES], len(RECIPES))[first : first + RECIPES_EACH]
        self.tasks = number % 2 == 1
        self.parts: dict[str, list[str]] = {}
        for name in (*world.contents, *LINKS):
            if (self.tasks and part_of(name) == "evals") or any(reads(recipe, name) for recipe in self.recipes):
                self.parts.setdefault("links" if name in LINKS else part_of(name), []).append(name)

    def begin(self) -> None:
        """Ask once, so that what follows meets full caches."""
        for recipe in self.recipes:
            self.ask(run, recipe)
            if self.tasks:
                self.ask(scored, recipe)

    def step(self) -> None:
        """Change something, or ask for something."""
        act = self.random.choices([*ACTS], [*ACTS.values()])[0]
        getattr(self, act)(self.random.choice(self.recipes))

    @property
    def runs(self) -> list[RunDirectory]:
        """The finished runs."""
        return [found for path in sorted((self.project / "runs").glob("*-*")) if (found := RunDirectory(path)).done]

    # Changes of the user's files.

    def change(self, reader: str | None = None) -> str:
        """Change a file or a link, or one that a recipe reads, the rare parts of a model as often as the large ones.

        A file that was broken before is whole again.
        """
        found = {part: [n for n in names if reader is None or reads(reader, n)] for part, names in self.parts.items()}
        parts = [part for part, names in found.items() if names]
        parts += [part for part in RARE if part in parts]
        name = self.random.choice(found[self.random.choice(parts)])
        self.restore()
        if name in LINKS:
            link = self.project / name
            (target,) = {*LINKS[name]} - {str(link.readlink())}
            link.unlink()
            link.symlink_to(target)
            self.did.append(f"{name} -> {target}")
            return name
        way = self.random.choice((*WAYS, *BREAKING))
        content = self.next_content(name)
        self.did.append(f"{name} {way}: content {self.world.contents[name].index(content)}")
        if way in BREAKING:
            self.broken = name
        if way == "deleted":
            (self.project / name).unlink()
        else:
            write(self.project / name, content[: len(content) // 2] if way == "truncated" else content, way)
        return name

    def next_content(self, name: str) -> bytes:
        """Deal another content of a file; all have their turn before one comes again, so that none is seldom tried."""
        contents, now = self.world.contents[name], (self.project / name).read_bytes()
        deck = self.decks.setdefault(name, [])
        if not [content for content in deck if content != now]:
            deck += self.random.sample(contents, len(contents))
        content = next(content for content in deck if content != now)
        deck.remove(content)
        return content

    def change_and_ask(self, _: str) -> None:
        """Change something, and ask commands that read it."""
        name = self.change()
        readers = [recipe for recipe in self.recipes if reads(recipe, name)] or self.recipes
        keen = [recipe for recipe in readers if recipe in KEEN.get(part_of(name), ())]
        recipe = self.random.choice(keen or readers)
        if part_of(name) != "evals":
            self.ask(run, recipe)
        if part_of(name) == "evals" or (self.tasks and self.random.random() < (0.8 if part_of(name) in RARE else 0.3)):
            self.ask(scored, recipe)

    def restore(self) -> None:
        """Make the one broken file whole."""
        if self.broken is not None:
            (self.project / self.broken).write_bytes(self.world.contents[self.broken][0])
            self.broken = None

    def exchange(self, recipe: str) -> None:
        """Exchange two files, or two folders, by renaming: inodes and times go with the content."""
        what = self.random.choice(["model.safetensors", ""])
        self.restore()
        one, two, aside = self.project / "tuned" / what, self.project / "other" / what, self.project / "aside"
        one.rename(aside)
        two.rename(one)
        aside.rename(two)
        self.did.append(f"tuned and other exchanged {what}")
        self.ask(run, self.random.choice([recipe for recipe in self.recipes if "tuned" in USES[recipe]] or [recipe]))

    # Changes of what the package wrote.

    def forget_runs(self) -> None:
        """Remove the finished runs, as `runs rm` does, so that the cache is read again."""
        for found in self.runs:
            shutil.rmtree(found.path)
        self.did.append("runs removed")

    def damage_cache(self, recipe: str) -> None:
        """Damage the files of one name in a folder of the cache, or remove the folder."""
        cache, how = self.project / ".workbench", self.random.choice(DAMAGES)
        if not (folders := sorted(path.name for path in cache.glob("*"))):
            return
        often = [name for name in 3 * folders if name == "digests" or OWNERS.get(name) in self.recipes]
        folder = cache / self.random.choice([*folders, *often])
        # without its manifest, a result is one of an earlier version, which is trusted
        inner = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST]
        # names of entries have times and inodes in them: what is drawn is the same in every process
        names = sorted({"/".join(path.parts[1:]) for path in inner})
        if not names:
            return
        name = self.random.choice([*names, *names, None])
        how = "cut" if how == "same size" and folder.name not in COMPARED else how
        for path in [path for path in inner if name is not None and "/".join(path.parts[1:]) == name]:
            damage(folder / path, how)
        if name is None:
            shutil.rmtree(folder)
        self.did.append(f"{folder.name} of the cache, file {name}: {how}")
        if self.random.random() < 0.8:
            self.forget_runs()
        owner = OWNERS.get(folder.name, "")
        command = scored if folder.name in ("tasks", "configurations", "factsuites") else run
        self.ask(command, owner if owner in self.recipes else recipe)

    def damage_run(self, _: str) -> None:
        """Damage a finished run, which every command notices that says so."""
        how, runs = self.random.choice(["deleted", "cut", "added", "manifest", "same size"]), self.runs
        if not runs:
            return
        found = self.random.choice(runs)
        if found.harm() or not found.sealed:
            return
        sealed = read_manifest(found.path)
        assert sealed is not None
        name = self.random.choice(sorted(n for n in sealed.files if n not in ("run.json", "README.md") and "README" not in n))
        self.did.append(f"{found.name}/{name}: {how}")
        file, before = found.path / name, (found.path / name).read_bytes()
        if how == "added":
            (found.path / "model" / "more").parent.mkdir(exist_ok=True)
            (found.path / "model" / "more").write_bytes(b"")
        elif how == "manifest":
            (found.path / MANIFEST).unlink()
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

    def downgrade(self, recipe: str) -> None:
        """Make documents look like those of an earlier version, and ask for what reads them."""
        what = self.random.choice(["run", "scores", "configurations", "tasks"])
        self.did.append(f"{what} of an earlier version")
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
            rows = {k: row for k, row in (json.loads(file.read_bytes()) if whole(file) else {}).items() if isinstance(row, dict)}
            if rows:
                other = {"digest": "0" * 32, "libraries": {"torch": "1.0"}}
                edit_json(file, xxh3=None, **{k: {**row, **other} for k, row in rows.items()})
        for file in (cache / "tasks").glob("*.json") if what == "tasks" else ():
            if whole(file) and (known := json.loads(file.read_bytes())):
                edit_json(file, xxh3=None, format="task-1", source={**known["source"], "digest": "0" * 32})
        self.ask(run if what == "run" else scored, recipe)

    # Commands.

    def ask(self, command: Callable[[Path, str], Any], recipe: str) -> None:
        """Run a command whose output depends on the user's files alone."""
        self.did.append(f"{command.__name__} {recipe}")
        self.agree(outcome(self.project, command, recipe), command, recipe)

    def ask_again(self, recipe: str) -> None:
        """Run a command whatever was changed."""
        self.ask(self.random.choice((keys, run, scored)), recipe)

    def agree(self, found: Any, command: Callable[[Path, str], Any], recipe: str) -> None:
        """Compare with a fresh project."""
        wrong = differences(found, self.fresh.says(self.project, command, recipe))
        assert not wrong, f"{command.__name__} {recipe}:\n" + "\n".join(wrong[:12])

    def plan(self, recipe: str) -> None:
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

    def compare(self, recipe: str) -> None:
        """Compare stored scores: those of the files as they are, or none."""
        found = outcome(self.project, compared, recipe)
        if "error" in found and found["error"].startswith("not scored yet"):
            return
        expected = self.fresh.says(self.project, scored_and_compared, recipe)
        if "error" not in found or "error" not in expected:  # scoring refuses broken files in other words
            self.agree(found, scored_and_compared, recipe)

    def interrupt(self, recipe: str) -> None:
        """Stop a run at one of its last events, the last one between the result and its final name; change something, and run."""
        event, told = self.random.choice([0, 3, 6, 99, 99]), [0]

        def stop(found: Any) -> None:
            told[0] += found["stage"] == "write" or found.get("text") == "done"
            if found.get("text") == "done" or told[0] > event:
                raise Stopped

        if self.random.random() < 0.7:
            self.change(recipe)
        with suppress(Stopped):
            outcome(self.project, lambda project, name: run(project, name, stop), recipe)
        self.did.append(f"run {recipe} stopped at event {event}")
        if self.random.random() < 0.7:
            self.change(recipe)
        self.ask(run, recipe)

    def verify(self, _: str) -> None:
        """Verify all runs: those that are not broken have what they wrote, whatever happened to their inputs."""
        for found in self.runs:
            if not found.harm():
                verify_run(found)


def reads(recipe: str, name: str) -> bool:
    """Whether a recipe reads a file, or what is behind a link."""
    used = {"base", f"recipes/{recipe}.yaml", *USES[recipe].split()}
    return name in used or name.split("/")[0] in used


def take_steps(world: Changing, place: Path, steps: int, seed: int = SEED) -> Iterator[int]:
    """Take steps in histories, yielding the number of each that is taken. What a step raises says how it came to that."""
    fresh, history, decks = Fresh(place), None, dict[str, list[bytes]]()
    gc.freeze()  # each training collects garbage, which takes half a second where all modules are looked through
    try:
        for number in range(steps):
            if history is None or number % LENGTH == 0:
                history = Changes(world, fresh, place, seed, number // LENGTH, decks)
                history.begin()
            history.step()
            yield number + 1
    except MISSED as error:
        error.add_note(f"seed {seed}: {'; '.join(history.did if history else ())}")
        raise
    finally:
        gc.unfreeze()
