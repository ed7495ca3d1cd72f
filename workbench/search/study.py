"""The study on disk: candidates, who works on them, what they scored. Several processes may share one; a killed one loses nothing."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import optuna
from filelock import FileLock, Timeout
from optuna.storages import JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, TrialState

from workbench import jsondoc
from workbench.errors import WorkbenchError
from workbench.search.samplers import grid, make_sampler, starts, suggest
from workbench.search.space import Space

Arm = Literal["search", "random"]
ARMS: tuple[Arm, ...] = ("search", "random")
JOURNAL = "journal.log"
# How Optuna begins every line of a journal.
_ENTRY = b'{"op_code":'
_KEY, _OWNER, _VALUES, _RESULT = "key", "owner", "values", "result"


@dataclass(frozen=True)
class Trial:
    """A candidate that this process works on.

    Attributes:
        arm: search, or random.
        number: In its arm, from 0.
        values: Dimension -> value.
    """

    arm: Arm
    number: int
    values: dict[str, Any]
    _trial: optuna.Trial = field(repr=False)

    @property
    def name(self) -> str:
        """As people call it: "trial-7", "random-3"."""
        return f"{'trial' if self.arm == 'search' else 'random'}-{self.number}"


class Study:
    """Candidates of a search.

    Args:
        folder: Of the search; locks lie there, and the journal where no other storage is named.
        space: What is searched.
        sampler: Which sampler draws.
        objectives: How many.
        seed: Of the draws.
        key: Digest of all that decides scores: a storage belongs to one.
        storage: A journal file, or with the suffix .db an SQLite file.
        lambdas: Tried first, where lambda is a dimension.

    Errors: a storage of another search.
    """

    def __init__(
        self, folder: Path, space: Space, *, sampler: str, objectives: int, seed: int, key: str, storage: Path | None = None,
        lambdas: Sequence[float] = (),
    ) -> None:  # fmt: skip
        self.folder, self.space, self.sampler, self.seed = folder, space, sampler, seed
        self.file = storage or folder / JOURNAL
        (folder / "workers").mkdir(parents=True, exist_ok=True)
        self._worker = uuid.uuid4().hex
        self._alive = FileLock(folder / "workers" / f"{self._worker}.lock")
        self._alive.acquire()
        self._studies: dict[Arm, optuna.Study] = {}
        with self._locked(), self._readable():
            check_storage(self.file, key)
            store = _open(self.file)
            for arm in ARMS:
                study = optuna.create_study(
                    storage=store, study_name=arm, directions=["maximize"] * objectives, load_if_exists=True
                )
                if _KEY not in study.user_attrs:
                    study.set_user_attr(_KEY, key)
                # A process that was killed here may have put only some of them into the study.
                first = starts(space, lambdas) if arm == "search" and sampler != "grid" else []
                for values in first[len(study.trials) :]:
                    study.enqueue_trial(dict(values))
                self._studies[arm] = study

    def close(self) -> None:
        """Give up what this process has not finished: another one may take it."""
        self._alive.release()
        (self.folder / "workers" / f"{self._worker}.lock").unlink(missing_ok=True)

    def claim(self, arm: Arm, number: int | None) -> Trial | None:
        """The next candidate: one whose process is gone, else a new one; None where `number` are begun.

        Which values a new one has depends on the candidates before it alone, not on how often the search was interrupted.
        """
        study = self._studies[arm]
        with self._locked(), self._readable():
            found = study.get_trials(deepcopy=False)
            left = next((t for t in found if t.state == TrialState.RUNNING and not self._lives(t)), None)
            if left is None:
                begun = [t for t in found if t.state != TrialState.WAITING]
                if number is not None and len(begun) >= number:
                    return None
                if self.sampler == "grid" and arm == "search" and len(begun) >= _size(grid(self.space)):
                    return None
            at = left.number if left else next((t.number for t in found if t.state == TrialState.WAITING), len(found))
            study.sampler = make_sampler(
                "random" if arm == "random" else self.sampler, self.space, self.seed + (arm == "random"), at
            )
            trial = optuna.Trial(study, left._trial_id) if left else study.ask()
            trial.set_user_attr(_OWNER, self._worker)
            values = trial.user_attrs.get(_VALUES) or suggest(trial, self.space)
            if not isinstance(values, dict):
                raise TypeError(f"values of candidate {trial.number} are {values!r:.60}")
            trial.set_user_attr(_VALUES, values)
        return Trial(arm, trial.number, values, trial)

    def finish(self, trial: Trial, scores: Sequence[float] | None, result: dict[str, Any]) -> None:
        """Keep what a candidate scored; None for one that could not be scored, `result` then says why."""
        study = self._studies[trial.arm]
        with self._readable():
            trial._trial.set_user_attr(_RESULT, result)
            if scores is None:
                study.tell(trial._trial, state=TrialState.FAIL)
            else:
                study.tell(trial._trial, list(scores))

    def finished(self, *arms: Arm) -> list[dict[str, Any]]:
        """Every candidate of some arms (all if none is named) that is done, in order: arm, number, name, values, scores (None: failed), and
        its result."""
        done = (TrialState.COMPLETE, TrialState.FAIL)
        with self._readable():
            return [
                self._record(arm, t)
                for arm in arms or ARMS
                for t in self._studies[arm].get_trials(deepcopy=False)
                if t.state in done
            ]

    def importances(self) -> list[dict[str, float]]:
        """For every objective dimension -> share of the spread of scores that it explains (PED-ANOVA); empty where too few are done."""
        study = self._studies["search"]
        with self._readable():
            return self._importances(study)

    def _importances(self, study: optuna.Study) -> list[dict[str, float]]:
        done = [t for t in study.get_trials(deepcopy=False) if t.state == TrialState.COMPLETE]
        if len(done) < 4:
            return [{} for _ in study.directions]
        return [_importances(study, i) for i in range(len(study.directions))]

    def _record(self, arm: Arm, t: FrozenTrial) -> dict[str, Any]:
        name = f"{'trial' if arm == 'search' else 'random'}-{t.number}"
        scores = list(t.values) if t.state == TrialState.COMPLETE and t.values else None
        return {"arm": arm, "number": t.number, "name": name, "values": t.user_attrs.get(_VALUES, {}), "scores": scores,
                **t.user_attrs.get(_RESULT, {})}  # fmt: skip

    def _lives(self, t: FrozenTrial) -> bool:
        """Whether the process that works on a candidate still runs: it holds its lock then."""
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

    @contextmanager
    def _readable(self) -> Iterator[None]:
        """Raise WorkbenchError where the storage holds what no search has written: what Optuna raises then is up to it."""
        try:
            yield
        except (WorkbenchError, OSError):
            raise
        except Exception as error:
            raise WorkbenchError(
                f"{self.file}: damaged: its candidates cannot be read ({type(error).__name__}: {str(error)[:120]})",
                "Move the file away: the search then begins again. Candidates that were scored are not scored twice.",
            ) from error

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with FileLock(self.folder / "study.lock"):
            yield


def _importances(study: optuna.Study, objective: int) -> dict[str, float]:
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    def less_is_better(trial: FrozenTrial) -> float:
        return -float(trial.values[objective])

    try:
        shares = get_param_importances(study, evaluator=PedAnovaImportanceEvaluator(), target=less_is_better)
    except (ValueError, RuntimeError):  # all scores alike, or no dimension that all candidates have
        return {}
    return {name: round(float(share), 4) for name, share in shares.items()}


def check_storage(file: Path, key: str) -> None:
    """Errors: a storage whose candidates are those of another search, or that no search has written."""
    if not file.exists():
        return
    if file.suffix != ".db":
        _mend(file)
    try:
        summaries = {s.study_name: s.user_attrs for s in optuna.get_all_study_summaries(_open(file))}
    except Exception as error:  # what a foreign file raises is up to Optuna and its database
        raise WorkbenchError(
            f"{file}: no storage of a search ({type(error).__name__})", "Name another file with --storage."
        ) from error
    if file.suffix != ".db" and file.stat().st_size and not summaries:  # Optuna skips a last line that it cannot read
        raise WorkbenchError(f"{file}: no storage of a search", "Name another file with --storage.")
    known = summaries.get("search", {}).get(_KEY)
    if known is not None and known != key:
        raise WorkbenchError(
            f"{file}: holds the candidates of another search (key {str(known)[:12]}, this recipe's is {key[:12]}): its base, bricks, steps, "
            "space, objectives or items differ",
            "Name another file with --storage, or leave it out: every search has a folder of its own.",
        )


def _mend(file: Path) -> None:
    """Take off a last line that a killed process has not written to its end: the next line would be appended to it, and neither could be
    read. Nothing is changed in a file that no search has written.

    Raises WorkbenchError, with the line, for one that is no entry of a journal.
    """
    hint = "Name another file with --storage, or move this one away: the search then begins again."
    with FileLock(f"{file}.write"), file.open("r+b") as stream:
        raw = stream.read()
        whole = raw.rfind(b"\n") + 1
        for number, line in enumerate(raw[:whole].split(b"\n")[:-1], 1):
            place = f"{file}:{number}: no storage of a search"
            entry = jsondoc.as_object(jsondoc.parse(line, place, hint, infinite=True), place, hint)
            if type(entry.get("op_code")) is not int or not isinstance(entry.get("worker_id"), str):
                raise WorkbenchError(place, hint)
        cut = raw[whole:]
        if not cut.startswith(_ENTRY[: len(cut)]):
            raise WorkbenchError(f"{file}: no storage of a search: its last line is no entry of a journal", hint)
        if cut:
            stream.truncate(whole)


def _open(file: Path) -> Any:
    if file.suffix == ".db":
        return RDBStorage(f"sqlite:///{file.resolve()}", engine_kwargs={"connect_args": {"timeout": 60}})
    return JournalStorage(JournalFileBackend(os.fspath(file), _WriteLock(file)))


class _WriteLock(JournalFileOpenLock):
    """A lock that ends with the process that holds it. Optuna's own is a file, which a killed process leaves behind for 30 s."""

    def __init__(self, file: Path) -> None:
        super().__init__(os.fspath(file))
        self._lock = FileLock(f"{file}.write")

    def acquire(self) -> bool:
        """Wait until no other process writes to the journal."""
        self._lock.acquire()
        return True

    def release(self) -> None:
        """Let other processes write."""
        self._lock.release()


def _size(points: dict[str, list[Any]]) -> int:
    total = 1
    for values in points.values():
        total *= len(values)
    return total
