"""Checks of a suite before it decides anything: its data, its prompts, and whether right answers get full marks. No model is loaded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from workbench import jsondoc
from workbench.bricks.brick import STARTER
from workbench.bricks.hub import HEADERS
from workbench.bricks.locate import resolve_base
from workbench.errors import WorkbenchError
from workbench.evaluate import build_plan
from workbench.models.architecture import max_positions
from workbench.models.tokenizer import load_tokenizer
from workbench.project import CACHE
from workbench.scores.groups import expanded
from workbench.scores.plan import ScorePlan
from workbench.scores.statistics import FEW_CLUSTERS, MANY_CLUSTERS
from workbench.scores.suite import Suite, load_suite
from workbench.scores.tasks import task_index

if TYPE_CHECKING:
    from workbench.evaluate.oracle import Asked, AskedTask

_UNKNOWN_POSITIONS = 2048  # what HFLM takes where neither model nor tokenizer says it


@dataclass(frozen=True)
class SuiteCheck:
    """One check of one task.

    Attributes:
        status: ok | warning | failed.
        found: What was found.
        hint: What repairs it.
    """

    task: str
    check: str
    status: str
    found: str
    hint: str | None = None


@dataclass(frozen=True)
class SuiteReport:
    """All checks of a suite, and example prompts by task."""

    suite: str
    base: str
    checks: list[SuiteCheck]
    examples: dict[str, list[dict[str, Any]]]

    @property
    def failed(self) -> list[SuiteCheck]:
        """What has to be repaired."""
        return [check for check in self.checks if check.status == "failed"]

    def document(self) -> dict[str, Any]:
        """`suite check --json`."""
        return {
            "suite": self.suite,
            "base": self.base,
            "ok": not self.failed,
            "checks": [asdict(c) for c in self.checks],
            "examples": self.examples,
        }


@dataclass(frozen=True)
class Reader:
    """The tokenizer and positions of a base."""

    path: Path
    positions: int
    dtype: str


def find_base(base: str | None, project: Path) -> str:
    """The base whose tokenizer counts. Errors: none given and no starter base."""
    if base:
        return base
    if (project / STARTER / "config.json").is_file():
        return STARTER
    raise WorkbenchError(
        "no base to take the tokenizer from",
        f"--base DIR or --base org/name; without it {STARTER} is used: workbench brick fetch starter",
        2,
    )


def read_base(base: str, project: Path) -> Reader:
    """Tokenizer, longest input and dtype of a base, from headers. Errors: as a recipe's base."""
    reference = str(Path(base).resolve()) if Path(base).is_dir() else base
    checkpoint, _ = resolve_base(reference, project, HEADERS)
    positions = max_positions(checkpoint.config)
    if not positions:
        settings = checkpoint.path / "tokenizer_config.json"
        longest = jsondoc.optional(settings).get("model_max_length")
        positions = int(longest) if isinstance(longest, (int, float)) and 1 <= longest < 1e9 else _UNKNOWN_POSITIONS
    dtype = next((str(spec.dtype) for spec in checkpoint.specs.values() if spec.is_float), "float32")
    return Reader(checkpoint.path, positions, dtype.removeprefix("torch."))


def show_suite(name: str, project: Path, base: str | None) -> dict[str, Any]:
    """Tasks, items, clusters, metrics and plan of a suite; without a base the plan's digest is not known.

    `chance` is None where it is taken from the choices of the scored items, or is not known.
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
        with TemporaryDirectory() as folder:  # items and metrics do not depend on the tokenizer; the digest does
            (Path(folder) / "tokenizer.json").write_text("{}", "utf-8")
            plan = _plan(suite, project, folder, "float32")
    document, suite = plan.document(), plan.suite
    for task, facts in document["tasks"].items():
        facts |= {
            "clusters": len({item.cluster for item in plan.items[task]}),
            "cluster": suite.cluster_of(task),
            "role": suite.role_of(task),
            "chance": suite.chance_of(task, plan.kinds[task], plan.primary(task)),
            "owner": suite.owners.get(task),
            "bundled": task in plan.bundled,
        }
    return document if reader else {**document, "plan": None, "tokenizer": None, "dtype": None}


def _plan(suite: Suite, project: Path, tokenizer: Any, dtype: str, limit: int | None = None) -> ScorePlan:
    return build_plan(
        suite, tokenizer, tasks_dir=project / "evals" / "tasks", dtype=dtype, limit=limit, memo=project / CACHE / "tasks"
    )


def check_suite(name: str, project: Path, base: str | None = None, limit: int | None = None) -> SuiteReport:
    """Check a suite task by task; a task that cannot be read fails its first check, and the others go on.

    Args:
        base: Directory or hub id whose tokenizer counts; default: the starter base.
        limit: At most so many items a task.

    Errors: unknown suite, no base.
    """
    from workbench.evaluate.oracle import ask

    suite, found = _expanded(load_suite(name, project), project), find_base(base, project)
    reader = read_base(found, project)
    count = _counter(reader.path)
    checks: list[SuiteCheck] = []
    examples, ids = {}, {}
    for task in suite.tasks:
        try:
            plan = _plan(_alone(suite, task), project, reader.path, reader.dtype, limit)
            asked = ask(plan, task)
        except WorkbenchError as error:
            checks.append(SuiteCheck(task, "data", "failed", error.message, error.hint))
            continue
        # A limit is for the other checks: it would leave fewer clusters than the suite has.
        whole = _plan(_alone(suite, task), project, reader.path, reader.dtype) if limit else plan
        checks += _checks(plan, whole, task, asked, reader, count)
        ids[task] = {item.id for item in whole.items[task]}
        step = max(1, len(asked.items) // 3)
        examples[task] = [_example(item) for item in asked.items[::step][:3]]
    if not any(check.check == "data" and check.status == "failed" for check in checks):
        try:  # what only shows with all tasks together
            _plan(suite, project, reader.path, reader.dtype)
            checks += _contrasts(suite, ids)
        except WorkbenchError as error:
            checks.append(SuiteCheck(suite.suite, "suite", "failed", error.message, error.hint))
    return SuiteReport(suite.suite, found, checks, examples)


def _expanded(suite: Suite, project: Path) -> Suite:
    """Return the suite with groups replaced by their tasks; a group that cannot be read stays, and fails its first check."""
    from workbench.evaluate.tasks import groups_of

    tasks_dir = project / "evals" / "tasks"
    try:
        return expanded(suite, groups_of(suite, task_index(tasks_dir), tasks_dir))
    except WorkbenchError:
        return suite


def _alone(suite: Suite, task: str) -> Suite:
    """The suite with one task, so that one task's errors do not hide another's."""
    fields = suite.model_dump(exclude_unset=True)
    for key, value in fields.items():
        if isinstance(value, dict):
            fields[key] = {t: v for t, v in value.items() if t == task}
    fields.pop("contrasts", None)
    return Suite.model_validate({**fields, "tasks": (task,)})


def _counter(path: Path) -> Callable[[Sequence[str]], list[int]]:
    tokenizer = load_tokenizer(path)
    return lambda texts: [len(ids) for ids in tokenizer(list(texts))["input_ids"]] if texts else []


def _checks(
    plan: ScorePlan, whole: ScorePlan, name: str, task: AskedTask, reader: Reader, count: Callable[[Sequence[str]], list[int]]
) -> Iterator[SuiteCheck]:
    """All checks of a task that could be read."""
    items = task.items
    number = f"{len(items)} items" if plan is whole else f"{len(items)} of {len(whole.items[name])} items"
    yield SuiteCheck(name, "data", "ok", f"{number}, ids unique, {plan.kinds[name]}, primary {plan.primary(name)}")
    yield _clusters(whole, name)
    if items[0].choices is not None:
        yield _choices(name, items)
    yield _oracle(plan, name, task)
    yield _length(name, plan.kinds[name], items, reader, count)
    yield _shots(name, task)
    yield from _prompts(name, items, plan.kinds[name])


def _contrasts(suite: Suite, ids: Mapping[str, set[str]]) -> Iterator[SuiteCheck]:
    """The two tasks of a contrast are paired by their items' ids; what has no partner is left out of it."""
    for name, contrast in suite.contrasts.items():
        of, minus = ids[contrast.of], ids[contrast.minus]
        alone = sorted(of ^ minus)
        found = f"{len(of & minus)} items of {contrast.of} and {contrast.minus} have the same id"
        if alone:
            yield SuiteCheck(name, "contrast", "warning" if of & minus else "failed", f"{found}; without a partner: {_some(alone)}",
                        "Give the items of both tasks the same ids, and both tasks the same limit.")  # fmt: skip
        else:
            yield SuiteCheck(name, "contrast", "ok", found)


def _clusters(plan: ScorePlan, name: str) -> SuiteCheck:
    k = len({item.cluster for item in plan.items[name]})
    found = f"{k} clusters by '{plan.suite.cluster_of(name)}'"
    hint = f"Make items from more templates or passages, or write `cluster: {{{name}: id}}` if every item stands alone."
    if k < FEW_CLUSTERS:
        return SuiteCheck(name, "clusters", "failed", f"{found}: below {FEW_CLUSTERS} no verdict is given", hint)
    if k < MANY_CLUSTERS:
        return SuiteCheck(name, "clusters", "warning", f"{found}: below {MANY_CLUSTERS} only large differences are found", hint)
    return SuiteCheck(name, "clusters", "ok", found)


def _choices(name: str, items: Sequence[Asked]) -> SuiteCheck:
    outside = [item.id for item in items if item.golds is None]
    equal = [item.id for item in items if len(set(item.choices or ())) < len(item.choices or ())]
    if outside:
        return SuiteCheck(name, "choices", "failed", f"gold is none of the choices in {_some(outside)}",
                     "doc_to_target has to give an index from 0, or the text of one choice: correct these items.")  # fmt: skip
    if equal:
        return SuiteCheck(
            name, "choices", "failed", f"two choices are equal in {_some(equal)}", "Make the choices of these items distinct."
        )
    sizes = sorted({len(item.choices or ()) for item in items})
    return SuiteCheck(name, "choices", "ok", f"{' or '.join(map(str, sizes))} choices, distinct, gold among them")


def _oracle(plan: ScorePlan, name: str, task: AskedTask) -> SuiteCheck:
    """Gold answers score 1, or 0 where lower is better: the headline metric has to, the others are told of."""
    head = plan.primary(name)
    wrong: dict[str, list[Asked]] = {}
    seen: set[str] = set()
    for item in task.items:
        for metric in plan.metrics[name]:
            if metric in item.metrics:
                seen.add(metric)
                if abs(item.metrics[metric] - (0.0 if metric.partition(",")[0] in task.lower else 1.0)) > 1e-6:
                    wrong.setdefault(metric, []).append(item)
    if not seen:
        return SuiteCheck(name, "gold answers", "ok", "no metric has full marks (log-likelihood of a text)")
    hint = "The filters or metrics do not accept the answer that doc_to_target gives: compare filter_list, until and metric_list with the data's answers."
    if head in wrong:
        item = wrong[head][0]
        return SuiteCheck(name, "gold answers", "failed", f"{head} of the gold answer is not {0 if head.partition(',')[0] in task.lower else 1} in "
                     f"{_some([i.id for i in wrong[head]])}: target {item.target[:60]!r} scores {item.metrics[head]:g}", hint)  # fmt: skip
    if wrong:
        listed = ", ".join(f"{metric} in {len(found)} items" for metric, found in wrong.items())
        return SuiteCheck(name, "gold answers", "warning", f"{head} ok; no full marks: {listed}", hint)
    return SuiteCheck(name, "gold answers", "ok", f"full marks in {', '.join(m for m in plan.metrics[name] if m in seen)}")


def _length(
    name: str, kind: str, items: Sequence[Asked], reader: Reader, count: Callable[[Sequence[str]], list[int]]
) -> SuiteCheck:
    """The longest input: context with continuation, or with all tokens that may be generated. Rolling requests are cut into windows."""
    if kind == "loglikelihood_rolling":
        return SuiteCheck(name, "length", "ok", f"texts are scored in windows of {reader.positions} tokens")
    texts = [context + continuation for item in items for context, continuation in item.requests]
    owners = [item for item in items for _ in item.requests]
    # The last token of a continuation is predicted, not read.
    sizes = [n + (item.generated if kind == "generate_until" else -1) for n, item in zip(count(texts), owners, strict=True)]
    longest = max(range(len(sizes)), key=sizes.__getitem__)
    parts = f" ({items[0].generated} of them generated)" if kind == "generate_until" else ""
    found = f"longest input {sizes[longest]} of {reader.positions} tokens{parts}"
    if sizes[longest] > reader.positions:
        over = [item.id for n, item in zip(sizes, owners, strict=True) if n > reader.positions]
        return SuiteCheck(name, "length", "failed", f"{found}: {_some(list(dict.fromkeys(over)))} would be cut from the left",
                     "Shorten these items, ask for fewer examples (num_fewshot) or fewer tokens (max_gen_toks), or take a base with more positions.")  # fmt: skip
    return SuiteCheck(name, "length", "ok", found)


def _shots(name: str, task: AskedTask) -> SuiteCheck:
    if not task.shots:
        return SuiteCheck(name, "few-shot", "ok", "no examples in the prompts")
    both = [pair for pair in dict.fromkeys(task.test_docs) if pair in task.shot_docs]
    if both:
        return SuiteCheck(name, "few-shot", "failed", f"{len(both)} test documents are in the pool of {len(task.shot_docs)} examples, first {both[0][0][:60]!r}",
                     "Give the task a `fewshot_split` of its own, without test documents.")  # fmt: skip
    return SuiteCheck(
        name, "few-shot", "ok", f"{task.shots} examples from {len(task.shot_docs)} documents, none of them a test document"
    )


def _prompts(name: str, items: Sequence[Asked], kind: str) -> Iterator[SuiteCheck]:
    """Blanks at the end of contexts, and prompts that occur twice."""
    if kind == "loglikelihood_rolling":
        return
    blank = [item.id for item in items if any(context != context.rstrip() and context.strip() for context, _ in item.requests)]
    if blank:
        yield SuiteCheck(name, "blanks", "warning", f"contexts end in a blank in {_some(blank)}",
                    "Tokenizers put the blank into the next word: end doc_to_text without it and use target_delimiter.")  # fmt: skip
    else:
        yield SuiteCheck(name, "blanks", "ok", "no context ends in a blank")
    times = Counter(item.requests for item in items)
    twice = [item.id for item in items if times[item.requests] > 1]
    if twice:
        yield SuiteCheck(name, "duplicates", "warning", f"the same prompt and choices in {_some(twice)}",
                    "Equal items count as several: take the copies out, or put them into one cluster.")  # fmt: skip
    else:
        yield SuiteCheck(name, "duplicates", "ok", "no prompt occurs twice")


def _some(ids: Sequence[str]) -> str:
    shown = ", ".join(ids[:3])
    return f"{len(ids)} item{'s' if len(ids) > 1 else ''} ({shown}{', …' if len(ids) > 3 else ''})"


def _example(item: Asked) -> dict[str, Any]:
    return {"id": item.id, "prompt": item.requests[0][0], "choices": list(item.choices) if item.choices is not None else None,
            "continuation": item.requests[0][1] or None, "target": item.target}  # fmt: skip


def list_suites(project: Path) -> Iterable[Mapping[str, Any]]:
    """The suites of a project, by name; one that cannot be read is listed with its error."""
    for path in sorted((project / "evals" / "suites").glob("*.yaml")):
        try:
            suite = load_suite(path.stem, project)
            yield {"suite": suite.suite, "tasks": list(suite.tasks), "description": suite.description, "error": None}
        except WorkbenchError as error:
            yield {"suite": path.stem, "tasks": [], "description": "", "error": error.message}
