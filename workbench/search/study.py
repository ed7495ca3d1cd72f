"""The study on disk: candidates, their processes and their scores. Several processes can share it, and a killed process loses nothing."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Literal, TypedDict

import optuna
from filelock import FileLock, Timeout
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, TrialState

from workbench.ground import jsondoc
from workbench.ground.errors import WorkbenchError
from workbench.recipe.space import Values
from workbench.search.result import Loss, TrialRow
from workbench.search.samplers import EXCESS, Tried, grid, make_sampler, next_soup, starts, suggest
from workbench.search.space import Space

Arm = Literal["search", "random"]
ARMS: tuple[Arm, ...] = ("search", "random")
JOURNAL = "journal.log"
_DONE = (TrialState.COMPLETE, TrialState.FAIL)
# Beginning of every line of Optuna's journal.
_ENTRY = b'{"op_code":'
_KEY, _OWNER, _VALUES, _RESULT = "key", "owner", "values", "result"


class TrialResult(TypedDict, total=False):
    """Entry of the journal on a finished candidate, without its scores; `TrialRow` describes the fields."""

    digest: str
    stage: int
    stopped: bool
    items: int
    beaten_by: str | None
    seconds: dict[str, float]
    error: str
    guarded: list[dict[str, object]]


@dataclass(frozen=True)
class Trial:
    """A candidate that this process works on.

    Attributes:
        arm: "search" or "random".
        number: Number within its arm, from 0.
        values: Value by dimension.
    """

    arm: Arm
    number: int
    values: Values
    _trial: optuna.Trial = field(repr=False)

    @property
    def name(self) -> str:
        """Displayed name, such as "trial-7" or "random-3"."""
        return _name(self.arm, self.number)


@dataclass(frozen=True)
class Others:
    """Unfinished candidates of other processes.

    Attributes:
        running: Number of those whose process still runs.
        abandoned: Number of those whose process is gone.
    """

    running: int
    abandoned: int


class Study:
    """The candidates of a search.

    Args:
        folder: Folder of the search, with its locks and by default its journal.
        space: Dimensions of the search.
        sampler: Name of the sampler.
        objectives: Number of objectives.
        key: Digest of everything that decides scores; a journal belongs to one key.
        lambdas: Values to try first if lambda is a dimension.

    Raises:
        WorkbenchError: If the journal belongs to another search or is damaged.
    """

    def __init__(
        self,
        folder: Path,
        space: Space,
        *,
        sampler: str,
        objectives: int,
        key: str,
        lambdas: Sequence[float] = (),
    ) -> None:
        self.folder, self.space, self.sampler = folder, space, sampler
        self.guarded = False
        """True if the sampler avoids candidates that lose too much on a guarded task."""
        self.file = folder / JOURNAL
        (folder / "workers").mkdir(parents=True, exist_ok=True)
        self._worker = uuid.uuid4().hex
        self._alive = FileLock(folder / "workers" / f"{self._worker}.lock")
        self._alive.acquire()
        self._studies: dict[Arm, optuna.Study] = {}
        with self._locked(), self._readable():
            if self.file.exists():
                _mend(self.file)
            store = JournalStorage(JournalFileBackend(os.fspath(self.file), _WriteLock(self.file)))
            for arm in ARMS:
                study = optuna.create_study(
                    storage=store, study_name=arm, directions=["maximize"] * objectives, load_if_exists=True
                )
                known = study.user_attrs.get(_KEY)
                if known is None:
                    study.set_user_attr(_KEY, key)
                elif known != key:
                    raise WorkbenchError(
                        f"{self.file}: the file has the candidates of another search (key {str(known)[:12]}, this recipe has {key[:12]})",
                        "Move the file away and run the search again.",
                    )
                # A killed process may have added only some of the first candidates.
                first = starts(space, lambdas) if arm == "search" and sampler not in ("grid", "greedy") else []
                for values in first[len(study.trials) :]:
                    study.enqueue_trial(dict(values))
                self._studies[arm] = study

    def close(self) -> None:
        """Release unfinished candidates of this process, so that another process can take them."""
        self._alive.release()
        (self.folder / "workers" / f"{self._worker}.lock").unlink(missing_ok=True)

    def claim(self, arm: Arm, number: int | None) -> Trial | None:
        """Return the next candidate: one whose process is gone, or a new one; None if `number` candidates were started.

        The values of a new candidate depend only on the candidates before it, not on interruptions of the search.
        """
        study = self._studies[arm]
        with self._locked(), self._readable():
            trials = study.get_trials(deepcopy=False)
            abandoned = next((t for t in trials if t.state == TrialState.RUNNING and not self._lives(t)), None)
            if abandoned is None:
                begun = [t for t in trials if t.state != TrialState.WAITING]
                if number is not None and len(begun) >= number:
                    return None
                if self.sampler == "grid" and arm == "search" and len(begun) >= prod(map(len, grid(self.space).values())):
                    return None
                if self.sampler == "greedy" and arm == "search" and len(begun) == len(trials):
                    soup = next_soup(self.space, [_tried(t) for t in trials])
                    if soup is None:
                        return None
                    study.enqueue_trial(dict(soup))
                    trials = study.get_trials(deepcopy=False)
            index = (
                abandoned.number if abandoned else next((t.number for t in trials if t.state == TrialState.WAITING), len(trials))
            )
            seed = self.space.recipe.fields.seed + (arm == "random")
            study.sampler = make_sampler(
                "random" if arm == "random" else self.sampler, self.space, seed, index, guarded=self.guarded
            )
            trial = optuna.Trial(study, abandoned._trial_id) if abandoned else study.ask()
            trial.set_user_attr(_OWNER, self._worker)
            values = trial.user_attrs.get(_VALUES) or suggest(trial, self.space)
            if not isinstance(values, dict):
                raise TypeError(f"values of candidate {trial.number} are {values!r:.60}")
            trial.set_user_attr(_VALUES, values)
        return Trial(arm, trial.number, values, trial)

    def finish(self, trial: Trial, scores: Sequence[float] | None, result: TrialResult) -> None:
        """Record a candidate's scores; None means that it failed, with the reason in `result`."""
        study = self._studies[trial.arm]
        with self._readable():
            trial._trial.set_user_attr(_RESULT, result)
            if "guarded" in result:
                losses = map(Loss.model_validate, result["guarded"])
                trial._trial.set_user_attr(EXCESS, max(map(_excess, losses)))
            if scores is None:
                study.tell(trial._trial, state=TrialState.FAIL)
            else:
                study.tell(trial._trial, list(scores))

    def finished(self, *arms: Arm) -> list[TrialRow]:
        """Return all finished candidates of some arms (default: all arms), in order; higher scores are better for every objective."""
        with self._readable():
            return [
                _record(arm, t) for arm in arms or ARMS for t in self._studies[arm].get_trials(deepcopy=False) if t.state in _DONE
            ]

    def others(self) -> Others:
        """Count the unfinished candidates of other processes."""
        with self._locked(), self._readable():
            trials = [t for study in self._studies.values() for t in study.get_trials(deepcopy=False)]
            unfinished = [t for t in trials if t.state == TrialState.RUNNING and t.user_attrs.get(_OWNER) != self._worker]
            running = sum(map(self._lives, unfinished))
        return Others(running, len(unfinished) - running)

    def importances(self) -> list[dict[str, float]]:
        """Return for each objective the share of the variation in scores that each dimension explains (PED-ANOVA).

        It is empty if too few candidates are finished.
        """
        study = self._studies["search"]
        with self._readable():
            done = [t for t in study.get_trials(deepcopy=False) if t.state == TrialState.COMPLETE]
            return [_importances(study, i) if len(done) >= 4 else {} for i in range(len(study.directions))]

    def _lives(self, t: FrozenTrial) -> bool:
        """Return True if the process that works on a candidate still runs and holds its lock."""
        owner = t.user_attrs.get(_OWNER)
        if owner is None:
            return False  # killed between two lines of `claim`
        if owner == self._worker:
            return True
        lock = FileLock(self.folder / "workers" / f"{owner}.lock")
        try:
            with lock.acquire(timeout=0):
                return False
        except Timeout:
            return True

    def _readable(self) -> AbstractContextManager[None]:
        return _readable(self.file)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with FileLock(self.folder / "study.lock"):
            yield


def _name(arm: Arm, number: int) -> str:
    return f"{'trial' if arm == 'search' else 'random'}-{number}"


def _excess(loss: Loss) -> float:
    """Return by how much a loss on a guarded task exceeds its tolerance; positive exactly if it is harmful."""
    beyond = loss.loss - (loss.tolerance or 0.0)
    return max(beyond, 1e-9) if loss.harmful else min(beyond, 0.0)


def _tried(t: FrozenTrial) -> Tried:
    """Return a candidate as the greedy soup sees it; one that waits has the values that it was queued with."""
    values = t.user_attrs.get(_VALUES) or t.system_attrs.get("fixed_params") or {}
    return Tried(values, t.values[0] if t.state == TrialState.COMPLETE and t.values else None, t.state == TrialState.FAIL)


def _importances(study: optuna.Study, objective: int) -> dict[str, float]:
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    def less_is_better(trial: FrozenTrial) -> float:
        return -float(trial.values[objective])

    try:
        shares = get_param_importances(study, evaluator=PedAnovaImportanceEvaluator(), target=less_is_better)
    except (ValueError, RuntimeError):  # all scores are equal, or no dimension is in all candidates
        return {}
    return {name: round(float(share), 4) for name, share in shares.items()}


def _mend(file: Path) -> None:
    """Remove an incomplete last line that a killed process left, to which the next line would be appended.

    A file that was not written by a search is not changed.
    """
    hint = "Move the file away and run the search again."
    with FileLock(f"{file}.write"), file.open("r+b") as stream:
        raw = stream.read()
        complete = raw.rfind(b"\n") + 1
        for number, line in enumerate(raw[:complete].split(b"\n")[:-1], 1):
            place = f"{file}:{number}: the file is not a journal of a search"
            entry = jsondoc.as_object(jsondoc.parse(line, place, hint, infinite=True), place, hint)
            if type(entry.get("op_code")) is not int or not isinstance(entry.get("worker_id"), str):
                raise WorkbenchError(place, hint)
        rest = raw[complete:]
        if not rest.startswith(_ENTRY[: len(rest)]):
            raise WorkbenchError(
                f"{file}: the file is not a journal of a search: its last line is not an entry of a journal", hint
            )
        if rest:
            stream.truncate(complete)


class _WriteLock(JournalFileOpenLock):
    """A lock that is released when its process ends. Optuna's own lock file stays for 30 s after a process is killed."""

    def __init__(self, file: Path) -> None:
        super().__init__(os.fspath(file))
        self._file = file
        self._lock = FileLock(f"{file}.write")

    def acquire(self) -> bool:
        """Wait until no other process writes to the journal, and remove half a line that one left which was killed while it wrote."""
        self._lock.acquire()
        with self._file.open("r+b") as stream:
            end = stream.seek(0, os.SEEK_END)
            stream.seek(max(end - 1, 0))
            if stream.read() not in (b"", b"\n"):
                stream.seek(0)
                stream.truncate(stream.read().rfind(b"\n") + 1)
        return True

    def release(self) -> None:
        """Release the lock."""
        self._lock.release()


def recorded(folder: Path) -> list[TrialRow]:
    """Return the finished candidates of a search in progress from its folder, of which nothing is changed."""
    file = folder / JOURNAL
    if not file.is_file():
        return []
    with _readable(file):
        store = JournalStorage(JournalFileBackend(os.fspath(file)))
        arms = [(arm, known._study_id) for known in store.get_all_studies() for arm in ARMS if arm == known.study_name]
        return [_record(arm, t) for arm, study in arms for t in store.get_all_trials(study, deepcopy=False, states=_DONE)]


def _record(arm: Arm, t: FrozenTrial) -> TrialRow:
    """Return a finished candidate."""
    fields = {
        "arm": arm,
        "number": t.number,
        "name": _name(arm, t.number),
        "values": t.user_attrs.get(_VALUES, {}),
        "scores": list(t.values) if t.state == TrialState.COMPLETE and t.values else None,
    }
    return TrialRow.model_validate({**fields, **t.user_attrs.get(_RESULT, {})})


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    """Convert exceptions of Optuna on a damaged journal to WorkbenchError."""
    try:
        yield
    except (WorkbenchError, OSError):
        raise
    except Exception as error:
        raise WorkbenchError(
            f"{file}: the file is damaged, its candidates cannot be read ({type(error).__name__}: {str(error)[:120]})",
            "Move the file away and run the search again. Candidates that were already scored are not scored twice.",
        ) from error
