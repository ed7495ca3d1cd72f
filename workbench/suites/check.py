"""Checks of a suite before it is used: its data, its prompts, and full scores for correct answers. No model is loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from pydantic import JsonValue

from workbench.bricks.brick import STARTER
from workbench.bricks.hub import HEADERS
from workbench.bricks.locate import resolve_base
from workbench.evaluate import build_plan
from workbench.evaluate.taskchecks import ExamplePrompt, SuiteCheck, checked, checks_of, example, some
from workbench.ground import jsondoc
from workbench.ground.errors import UsageError, WorkbenchError
from workbench.ground.project import cache_of
from workbench.ground.results import JsonObject, Number
from workbench.models.architecture import max_positions
from workbench.models.prompts import load_tokenizer
from workbench.scores.groups import expanded
from workbench.scores.plan import ScorePlan
from workbench.scores.suite import Suite, load_suite
from workbench.scores.tasks import task_index

_UNKNOWN_POSITIONS = 2048  # HFLM's default if neither model nor tokenizer gives a length


class SuiteRow(JsonObject):
    """A suite of the project."""

    suite: str
    """Name of the suite."""
    tasks: list[str]
    """Its tasks."""
    description: str
    """Description of the suite."""
    error: str | None
    """Error, if the suite cannot be read."""


class ShownTask(JsonObject):
    """A task of a suite."""

    n: int
    """Number of items."""
    kind: str
    """lm-eval's output type, such as multiple_choice or generate_until."""
    metrics: list[str]
    """Metrics of the task."""
    primary: str
    """Metric that is compared."""
    lower: list[str]
    """Metrics for which lower is better."""
    ratios: dict[str, str]
    """Metric that is not a mean over items -> lm-eval's aggregation."""
    filters: list[str]
    """lm-eval's filters of the responses."""
    clusters: int
    """Number of clusters: items that belong together."""
    cluster: str
    """Field of the documents that names an item's cluster."""
    role: str
    """skill, retention, guarded or other."""
    chance: Number | None
    """Score of guessing; null if it depends on the choices of the scored items."""
    owner: str | None
    """Brick that teaches the task."""
    bundled: bool
    """Whether lm-eval bundles the task; false for a task of the project."""


class ShownSuite(JsonObject):
    """A suite and its plan."""

    version: Literal[1]
    """Version of the format."""
    suite: dict[str, JsonValue]
    """All fields of the suite file, with their defaults."""
    plan: str | None
    """Digest of the plan; null without a base."""
    tokenizer: str | None
    """Digest of the base's tokenizer, if the suite uses its chat template: it is then part of the plan. Else null."""
    scorer: str
    """Scorer of log-likelihoods."""
    dtype: str | None
    """Dtype of the scoring; null without a base."""
    batch_size: int
    """Requests per forward pass."""
    partial: bool
    """Whether a limit cut the items."""
    versions: dict[str, str]
    """Library -> version."""
    tasks: dict[str, ShownTask]
    """Task -> its items and metrics."""
    groups: list[dict[str, JsonValue]]
    """Groups of tasks with their aggregates."""


class SuiteReport(JsonObject):
    """Checks of a suite. With a failed check, the exit code is 3."""

    suite: str
    """Name of the suite."""
    base: str
    """Base whose tokenizer was used."""
    ok: bool
    """Whether no check failed."""
    checks: list[SuiteCheck]
    """All checks."""
    examples: dict[str, list[ExamplePrompt]]
    """Task -> up to three prompts."""

    @property
    def failed(self) -> list[SuiteCheck]:
        """Checks that failed."""
        return [check for check in self.checks if check.status == "failed"]

    @property
    def warned(self) -> list[str]:
        """What would repair the checks that only warn."""
        return [f"{check.task}, {check.check}: {check.hint}" for check in self.checks if check.status == "warning"]


@dataclass(frozen=True)
class Reader:
    """Tokenizer folder, number of positions and dtype of a base."""

    path: Path
    positions: int
    dtype: str


def find_base(base: str | None, project: Path) -> str:
    """Return the base whose tokenizer is used.

    Raises:
        WorkbenchError: If none is given and the starter base is missing.
    """
    if base:
        return base
    if (project / STARTER / "config.json").is_file():
        return STARTER
    raise UsageError(
        "no base for the tokenizer",
        f"Give --base DIR or --base org/name, or fetch the default {STARTER}: workbench brick fetch starter",
    )


def read_base(base: str, project: Path) -> Reader:
    """Return tokenizer, longest input and dtype of a base, from headers.

    Raises:
        WorkbenchError: If the base cannot be read.
    """
    reference = str(Path(base).resolve()) if Path(base).is_dir() else base
    checkpoint, _ = resolve_base(reference, project, HEADERS)
    positions = max_positions(checkpoint.config)
    if not positions:
        settings = checkpoint.path / "tokenizer_config.json"
        longest = jsondoc.optional(settings).get("model_max_length")
        positions = int(longest) if isinstance(longest, (int, float)) and 1 <= longest < 1e9 else _UNKNOWN_POSITIONS
    dtype = next((spec.dtype_name for spec in checkpoint.specs.values() if spec.is_float), "float32")
    return Reader(checkpoint.path, positions, dtype)


def show_suite(name: str, project: Path, base: str | None) -> ShownSuite:
    """Return tasks, items, clusters, metrics and plan of a suite; without a base, the plan's digest is not known.

    `chance` is None if it depends on the choices of the scored items, or is not known.
    """
    suite = load_suite(name, project)
    try:
        reader = read_base(find_base(base, project), project)
    except WorkbenchError:
        if base:
            raise
        reader = None
    if reader:
        plan = _plan(suite, project, reader.path, reader.dtype)
    else:
        with TemporaryDirectory() as folder:  # the digest depends on the tokenizer; items and metrics do not
            (Path(folder) / "tokenizer.json").write_text("{}", "utf-8")
            plan = _plan(suite, project, folder, "float32")
    document, suite = plan.record().to_dict(), plan.suite
    for task, facts in document["tasks"].items():
        facts |= {
            "clusters": len({item.cluster for item in plan.items[task]}),
            "cluster": suite.cluster_of(task),
            "role": suite.role_of(task),
            "chance": suite.chance_of(task, plan.kinds[task], plan.primary(task)),
            "owner": suite.owners.get(task),
            "bundled": task in plan.bundled,
        }
    return ShownSuite.model_validate(document if reader else {**document, "plan": None, "tokenizer": None, "dtype": None})


def _plan(suite: Suite, project: Path, tokenizer: Any, dtype: str, limit: int | None = None) -> ScorePlan:
    return build_plan(
        suite, tokenizer, tasks_dir=project / "evals" / "tasks", dtype=dtype, limit=limit, memo=cache_of(project) / "tasks"
    )


def check_suite(name: str, project: Path, base: str | None = None, limit: int | None = None) -> SuiteReport:
    """Check a suite task by task. A task that cannot be read fails its first check, and the others are still checked.

    Args:
        name: Name of the suite.
        project: Project folder.
        base: Directory or hub ID of the base whose tokenizer is used. Default: the starter base.
        limit: Largest number of items per task.

    Raises:
        WorkbenchError: If the suite is unknown or there is no base.
    """
    from workbench.evaluate.oracle import build_task

    suite, base_name = _expanded(load_suite(name, project), project), find_base(base, project)
    reader = read_base(base_name, project)
    count = _counter(reader.path)
    checks: list[SuiteCheck] = []
    examples, ids = {}, {}
    for task in suite.tasks:
        try:
            plan = _plan(suite.only({task}), project, reader.path, reader.dtype, limit)
            built = build_task(plan, task)
        except WorkbenchError as error:
            checks.append(checked(task, "data", "failed", error.message, error.hint))
            continue
        # Clusters are counted without the limit.
        full_plan = _plan(suite.only({task}), project, reader.path, reader.dtype) if limit else plan
        checks += checks_of(plan, full_plan, task, built, reader.positions, count)
        ids[task] = {item.id for item in full_plan.items[task]}
        step = max(1, len(built.items) // 3)
        examples[task] = [example(item) for item in built.items[::step][:3]]
    if not any(check.check == "data" and check.status == "failed" for check in checks):
        try:  # errors that only appear with all tasks together
            _plan(suite, project, reader.path, reader.dtype)
            checks += _contrasts(suite, ids)
        except WorkbenchError as error:
            checks.append(checked(suite.suite, "suite", "failed", error.message, error.hint))
    ok = all(check.status != "failed" for check in checks)
    return SuiteReport(suite=suite.suite, base=base_name, ok=ok, checks=checks, examples=examples)


def _expanded(suite: Suite, project: Path) -> Suite:
    """Return the suite with groups replaced by their tasks; a group that cannot be read is kept, and fails its first check."""
    from workbench.evaluate.tasks import groups_of

    tasks_dir = project / "evals" / "tasks"
    try:
        return expanded(suite, groups_of(suite, task_index(tasks_dir), tasks_dir))
    except WorkbenchError:
        return suite


def _counter(path: Path) -> Callable[[Sequence[str]], list[int]]:
    tokenizer = load_tokenizer(path)
    return lambda texts: [len(ids) for ids in tokenizer(list(texts))["input_ids"]] if texts else []


def _contrasts(suite: Suite, ids: Mapping[str, set[str]]) -> Iterator[SuiteCheck]:
    """Check that the tasks of each contrast have items with equal IDs; items without a partner are not compared."""
    for name, contrast in suite.contrasts.items():
        of, minus = ids[contrast.of], ids[contrast.minus]
        unmatched = sorted(of ^ minus)
        text = f"{len(of & minus)} items of {contrast.of} and {contrast.minus} have the same id"
        if unmatched:
            yield checked(
                name,
                "contrast",
                "warning" if of & minus else "failed",
                f"{text}; without a partner: {some(unmatched)}",
                "Give the items of both tasks the same ids, and both tasks the same limit.",
            )
        else:
            yield checked(name, "contrast", "ok", text)


def list_suites(project: Path) -> Iterable[SuiteRow]:
    """Yield the suites of a project by name; one that cannot be read is listed with its error."""
    for path in sorted((project / "evals" / "suites").glob("*.yaml")):
        try:
            suite = load_suite(path.stem, project)
            yield SuiteRow(suite=suite.suite, tasks=list(suite.tasks), description=suite.description, error=None)
        except WorkbenchError as error:
            yield SuiteRow(suite=path.stem, tasks=[], description="", error=error.message)
