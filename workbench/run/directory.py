"""Run directories: one per recipe key. Results are written completely or not at all, and interrupted runs resume.

runs/<name>-<key10>/    (<name>-<stamp10> until all inputs have been read once)
    recipe.yaml      the recipe
    run.json         status, resolved inputs, steps, digests and versions; status "done" is written last
    workbench-manifest.json    size and SHA-256 of every file, written before that; see `manifest`
    log.jsonl        events
    model/           the checkpoint (model.partial/ while it is written)
    adapter/         with `form: adapter`, the PEFT adapter instead
    configuration/   for a recipe that ends in a memory or a router, this with the model or a reference to the base instead
    edits/<step>/    the result of each edit, a PEFT adapter
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from workbench.ground.errors import GateFailedError, WorkbenchError, nearest, shell
from workbench.ground.events import Event, Events
from workbench.ground.files import json_text, write_json, write_text
from workbench.ground.holding import BusyError, held
from workbench.ground.manifest import MANIFEST, Harm, described, harm, is_sealed, made_again, seal, set_aside
from workbench.run.record import RunRecord

if TYPE_CHECKING:
    from workbench.resolve.resolved import Resolved

RECORD, LOG = "run.json", "log.jsonl"
UNSEALED = (
    f"an earlier version wrote this run without {MANIFEST}, so its files cannot be checked; `runs verify` compares its tensors"
)

OURS = frozenset(
    {RECORD, "recipe.yaml", LOG, MANIFEST, "model", "model.partial", "adapter", "configuration", "edits", ".lock", ".holder"}
)
"""Names of files and folders in a run directory."""
_KEYED = re.compile(r".+-[0-9a-f]{10}")


@dataclass(frozen=True)
class RunDirectory:
    """One run directory."""

    path: Path

    @property
    def name(self) -> str:
        """The directory's name."""
        return self.path.name

    @property
    def model(self) -> Path:
        """The finished checkpoint."""
        return self.path / "model"

    @property
    def partial(self) -> Path:
        """The checkpoint while it is written."""
        return self.path / "model.partial"

    @property
    def adapter(self) -> Path:
        """The finished adapter, if the recipe's output is one."""
        return self.path / "adapter"

    @property
    def configuration(self) -> Path:
        """The finished configuration directory, if the recipe ends in a memory or a router."""
        return self.path / "configuration"

    @property
    def result(self) -> Path:
        """The finished model, adapter or configuration."""
        return next((p for p in (self.adapter, self.configuration) if p.is_dir()), self.model)

    @property
    def record(self) -> RunRecord | None:
        """Content of run.json; None if the file is missing or damaged."""
        try:
            return self.read_record()
        except (WorkbenchError, OSError):
            return None

    def read_record(self) -> RunRecord:
        """Return the content of run.json.

        Raises:
            WorkbenchError: If the file is damaged.
            FileNotFoundError: If there is no such file.
        """
        return RunRecord.read(self.path / RECORD, "Run its recipe again: files that are complete are verified and reused.")

    @property
    def status(self) -> str:
        """Status of the run: started, failed, done or damaged."""
        return self.record.status if self.record else "damaged"

    @property
    def digest(self) -> str | None:
        """Digest of the configuration, or of an adapter's files; None if the run is not finished."""
        return self.record.output.digest if self.record and self.record.output else None

    @property
    def done(self) -> bool:
        """True if the run has finished successfully. `harm` says whether its files are still as it wrote them."""
        return self.status == "done" and self.digest is not None

    @property
    def sealed(self) -> bool:
        """True if the run has a manifest, or its record says that it had one. Earlier versions wrote none."""
        return is_sealed(self.path) or bool(self.record and self.record.manifest)

    def harm(self, *, digests: bool = False) -> list[Harm]:
        """Return what differs between a finished run and its manifest; with `digests`, every file is read and compared."""
        if self.sealed and not is_sealed(self.path):
            return [Harm(MANIFEST, "the manifest of the run", "nothing")]
        missing = [] if self.result.is_dir() else [Harm("model", "a folder", "nothing")]
        return harm(self.path, digests=digests) or missing

    def require_whole(self, events: Events, *, digests: bool = False) -> None:
        """Check that the run has finished and that its files are as it wrote them.

        Args:
            events: Hears of a run without a manifest, which cannot be checked.
            digests: Compare the contents too, which reads every file.

        Raises:
            WorkbenchError: If the run has not finished.
            GateFailedError: If a file is missing, changed or was added.
        """
        if not self.done:
            raise WorkbenchError(
                f"{self.path}: the run is not finished (status {self.status})",
                f"Run its recipe again to resume it; {shell('workbench', 'runs', 'show', self.name)} says why a run failed.",
            )
        if found := self.harm(digests=digests):
            raise GateFailedError(
                f"{self.path}: {described(found)}",
                f"{made_again(sizes_differ=bool(self.harm()))} If you changed a file on purpose: {shell('workbench', 'runs', 'verify', self.name)} --accept FILE",
            )
        if not self.sealed:
            events({"stage": "run", "text": f"{self.name}: {UNSEALED}"})

    def finish(self, record: dict[str, object]) -> None:
        """Seal all files of the run, then replace run.json."""
        text = json_text({**record, "manifest": MANIFEST}, indent=2)
        seal(self.path, coming={RECORD: text.encode()}, open=[LOG])
        write_text(self.path / RECORD, text)

    def set_aside(self, events: Events) -> None:
        """Move the files of a finished run that is no longer whole to another place, so that it can be made again.

        Args:
            events: Hears of the files that differ, and of the place.
        """
        if found := self.harm():
            place = set_aside(self.path, last=RECORD)
            events({"stage": "run", "text": f"finished before, but {described(found)}: moved to {place}, and made again"})

    def write(self, record: dict[str, object]) -> None:
        """Replace run.json."""
        write_json(self.path / RECORD, record, indent=2)

    def log(self, event: Event) -> None:
        """Append an event to log.jsonl."""
        with (self.path / LOG).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"time": round(time.time(), 3), **event}) + "\n")

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Lock the directory for a `with` block.

        Raises:
            BusyError: If another process holds the lock; the message names the process, its host, and since when.
        """
        hint = "Wait for it with `workbench run --wait`, or stop it: the same command then resumes the run."
        with held(self.path / ".lock", self.path, "writes this run", hint):
            yield

    def wait(self) -> None:
        """Block until no other process holds the lock. The directory may be renamed or removed in the meantime."""
        try:
            file = (self.path / ".lock").open("rb")
        except FileNotFoundError:
            return
        with file:
            try:
                from fcntl import LOCK_NB, LOCK_SH, flock
            except ImportError:
                with FileLock(str(self.path / ".lock")):
                    return
            while True:  # a call that blocks would lose a Ctrl-C that arrives just before it
                try:
                    flock(file, LOCK_SH | LOCK_NB)
                    return
                except BlockingIOError:
                    time.sleep(0.1)

    def size(self) -> int:
        """Return the size of the directory in bytes, without the targets of links and the note of who writes it."""
        files = (f for f in self.path.rglob("*") if f.is_file() and not f.is_symlink() and f.name != ".holder")
        return sum(f.lstat().st_size for f in files)


@dataclass(frozen=True)
class SeenRun(RunDirectory):
    """A run as it was when its run.json was read, which is read once."""

    record: RunRecord | None = None

    @cached_property
    def broken(self) -> list[Harm]:
        """Return what differs between a finished run and its manifest."""
        return self.harm() if self.done else []

    @property
    def seal(self) -> str:
        """Say whether its files are as sealed: "whole", "broken", "not sealed" (of an earlier version), or "" for one that is not finished."""
        return "broken" if self.broken else "" if not self.done else "whole" if self.sealed else "not sealed"


@contextmanager
def hold(find: Callable[[], RunDirectory], wait: bool, events: Events) -> Iterator[RunDirectory]:
    """Lock a run directory for a `with` block.

    Args:
        find: Returns the directory. It is called again after each wait, because a finished run renames its directory.
        wait: Wait until the other process ends, whether or not it succeeds.
        events: Receives an event if there is a process to wait for.

    Raises:
        BusyError: If another process holds the directory and `wait` is not set.
    """
    with ExitStack() as stack:
        while True:
            run = find()
            try:
                stack.enter_context(run.lock())
                break
            except BusyError as busy:
                if not wait:
                    raise
                events({"stage": "run", "text": f"{busy.message}: waiting for it"})
            run.wait()
        yield run


def run_for(runs: Path, name: str, key: str) -> RunDirectory:
    """Return the run directory of a recipe's name and key."""
    return RunDirectory(runs / f"{name}-{key[:10]}")


def move_run(run: RunDirectory, to: RunDirectory, events: Events) -> RunDirectory:
    """Rename a run directory to its final name. If that name has a finished run, keep it and delete this one."""
    if to.path == run.path:
        return run
    if to.done:
        to.set_aside(events)
    if to.done:
        shutil.rmtree(run.path)
        return to
    shutil.rmtree(to.path, ignore_errors=True)
    (run.path / ".holder").unlink(missing_ok=True)
    run.path.rename(to.path)
    return to


def list_runs(
    runs: Path, read: Callable[[Path], RunRecord | None] = lambda file: RunDirectory(file.parent).record
) -> list[SeenRun]:
    """Return all run directories, newest first; `read` returns the content of a run.json."""
    every = []
    for file in sorted(runs.glob(f"*/{RECORD}")):
        with suppress(FileNotFoundError):  # another process removes it
            every.append(SeenRun(file.parent, read(file)))
    return sorted(every, key=lambda run: run.record.created if run.record else "", reverse=True)


def find_run(runs: Path, name: str) -> RunDirectory:
    """Find a run by its directory, its name, or the start of its name.

    Raises:
        WorkbenchError: If no run or several runs match.
    """
    direct = Path(name)
    if (direct / RECORD).is_file():
        return RunDirectory(direct.resolve())
    every = list_runs(runs)
    exact = [run for run in every if run.name == name]
    matches = exact or [run for run in every if run.name.startswith(name)]
    if len(matches) == 1:
        return RunDirectory(matches[0].path)
    if matches:
        raise WorkbenchError(
            f"'{name}' matches {len(matches)} runs: {', '.join(run.name for run in matches[:4])}", "Give more of the name."
        )
    raise WorkbenchError(
        f"no run '{name}' in {runs}. {nearest(name, [run.name for run in every])}", "`workbench runs ls` lists all runs."
    )


def removable(runs: Path, name: str) -> RunDirectory:
    """Find a run by name, start of a name, or directory, and check that it can be deleted.

    Raises:
        WorkbenchError: If there is no such run, the directory is a link or not directly in `runs`, or `workbench run` has not
            written it.
    """
    run = find_run(runs, name)
    for path in (Path(name), runs / name, run.path):
        if path.is_symlink():
            raise WorkbenchError(
                f"{path} is a link to {path.readlink()}, but `runs rm` removes only run directories",
                f"rm {shlex.quote(str(path))}",
            )
    if run.path.resolve().parent != runs.resolve():
        raise WorkbenchError(
            f"{name}: not a directory directly in the runs folder {runs}",
            f"If it is a run in another runs folder, give that folder: "
            f"workbench runs rm {shlex.quote(run.name)} --runs-dir {shlex.quote(str(run.path.parent))}",
        )
    _check_ours(run)
    return run


def _check_ours(run: RunDirectory) -> None:
    """Raise WorkbenchError if `workbench run` has not written this directory, or if it contains other files."""
    keep = "Nothing was removed. To delete the directory anyway, use `rm -r`."
    record = run.record
    written = record is not None and record.version == 1 and None not in (record.name, record.recipe)
    damaged = record is None and _KEYED.fullmatch(run.name) is not None and (run.path / "recipe.yaml").is_file()
    if not written and not damaged:
        raise WorkbenchError(f"{run.path}: its {RECORD} is not the record of a run", keep)
    if others := sorted(child.name for child in run.path.iterdir() if not _is_ours(child)):
        shown = ", ".join(others[:4]) + (f" and {len(others) - 4} more" if len(others) > 4 else "")
        raise WorkbenchError(f"{run.path}: contains files that are not part of a run: {shown}", keep)


def _is_ours(child: Path) -> bool:
    """Return True if a run writes files of this name, including temporary names of RECORD and .holder."""
    return child.name in OURS or any(child.name.startswith(f".{name}.") for name in (RECORD, ".holder"))


def remove_run(run: RunDirectory) -> int:
    """Delete a run directory and return the freed bytes.

    Raises:
        WorkbenchError: If `workbench run` has not written the directory, or a process holds its lock.
    """
    _check_ours(run)
    size = run.size()
    with run.lock():
        for child in run.path.iterdir():
            if child.name in (".lock", ".holder"):
                continue
            shutil.rmtree(child) if child.is_dir() and not child.is_symlink() else child.unlink()
    shutil.rmtree(run.path)
    return size


def run_of(resolved: Resolved, runs: Path) -> RunDirectory:
    """Return the run directory of a recipe. Its name has the stamp of the files until the inputs have been read once."""
    stamped = run_for(runs, resolved.recipe.name, resolved.stamp)
    if not resolved.known:
        return stamped
    keyed = run_for(runs, resolved.recipe.name, resolved.run_key)
    return stamped if stamped.path.is_dir() and not keyed.path.is_dir() else keyed
