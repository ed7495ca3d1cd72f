"""A task's requests, built by lm-eval and tokenized once for all configurations that read them alike; answers become rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from workbench.evaluate.gold import corpus_contributions, metrics_of
from workbench.evaluate.measured import SEED, quiet, seeded
from workbench.evaluate.packed import Bounds, PackedLayout, Pair
from workbench.evaluate.tasks import load_tasks
from workbench.ground.errors import WorkbenchError, shell
from workbench.models.prompts import check_template
from workbench.scores.files import Row, margin_of
from workbench.scores.plan import GENERATED, Item, ScorePlan, item_ids
from workbench.scores.statistics import RATIOS, UndefinedError, brier_score, codes
from workbench.scores.suite import MARGIN

if TYPE_CHECKING:
    from workbench.evaluate.hflm import SafeHFLM

_KEPT = 16
_prepared: dict[tuple[Any, ...], dict[str, Requests]] = {}  # requests of the last plans: a search alternates between a few plans
_loaded: dict[str, dict[str, Any]] = {}  # tasks of plans whose requests have not been built yet


@dataclass
class Requests:
    """A task's requests on the plan's items.

    Attributes:
        name: Name of the task.
        task: lm-eval's task.
        items: Items by document number.
        instances: lm-eval's requests.
        pairs: Tokens of all log-likelihood requests, one after another.
        owners: For each pair, the index of its request.
        layouts: Scorer and limits of a forward pass -> layout of the pairs, created when it is first needed.
    """

    name: str
    task: Any
    items: Sequence[Item]
    instances: list[Any]
    pairs: list[Pair] = field(default_factory=list)
    owners: list[int] = field(default_factory=list)
    layouts: dict[tuple[str, Bounds], PackedLayout] = field(default_factory=dict)

    @property
    def generated(self) -> list[int]:
        """Indices of requests that generate text."""
        return [i for i, instance in enumerate(self.instances) if instance.request_type == GENERATED]

    @property
    def drawn(self) -> bool:
        """True if texts are sampled at random."""
        generation_settings = (self.instances[i].args[1] for i in self.generated)
        return any(setting.get("do_sample", float(setting.get("temperature") or 0) > 0) for setting in generation_settings)

    def routed_contexts(self) -> dict[int, list[int]]:
        """Return number of a pair -> the tokens that a router sees: the context, or nothing for a text without a prompt (rolling)."""
        rolling = {i for i, instance in enumerate(self.instances) if instance.request_type == "loglikelihood_rolling"}
        owned = zip(self.pairs, self.owners, strict=True)
        return {i: [] if owner in rolling else context for i, ((context, _), owner) in enumerate(owned)}

    def likelihoods(self, answers: Mapping[int, tuple[float, bool]]) -> dict[int, Any]:
        """Return request -> (log-likelihood, greedy), or the sum over the windows of a rolling request."""
        by_request: dict[int, Any] = {}
        for pair, owner in enumerate(self.owners):
            if self.instances[owner].request_type == "loglikelihood_rolling":
                by_request[owner] = by_request.get(owner, 0.0) + answers[pair][0]
            else:
                by_request[owner] = (answers[pair][0], bool(answers[pair][1]))
        return by_request


def prepared(plan: ScorePlan, lm: Any) -> dict[str, Requests]:
    """Return the requests of every task of a plan, shared by the configurations that have one tokenizer and one length of windows.

    Args:
        plan: The plan.
        lm: lm-eval's model.

    Raises:
        WorkbenchError: If data has changed since the plan was made, or a continuation has no tokens.
    """
    key = (_key(plan), plan.tokenizer_digest, *getattr(lm, "reading", ()))
    if key not in _prepared:
        with quiet(), seeded():
            tasks = _loaded.pop(_key(plan), None) or load_tasks(plan)
            requests = {name: _requests(plan, name, task, lm) for name, task in tasks.items()}
        while len(_prepared) >= _KEPT:
            del _prepared[next(iter(_prepared))]
        _prepared[key] = requests
    return _prepared[key]


def tasks_of(plan: ScorePlan) -> dict[str, Any]:
    """Return lm-eval's tasks of a plan by name, which `prepared` then does not load again.

    Args:
        plan: The plan.
    """
    key = _key(plan)
    for (known, *_), prepared_tasks in _prepared.items():
        if known == key:
            return {name: requests.task for name, requests in prepared_tasks.items()}
    if key not in _loaded:
        while len(_loaded) >= _KEPT:
            del _loaded[next(iter(_loaded))]
        with quiet(), seeded():
            _loaded[key] = load_tasks(plan)
    return _loaded[key]


def _key(plan: ScorePlan) -> str:
    """Return the key of a plan's tasks, which are the same for every scorer."""
    return f"{plan.suite.backend}-{plan.by('hflm').digest}"


def build(
    plan: ScorePlan, name: str, task: Any, template: Callable[..., str] | None = None, tokenizer_name: str = ""
) -> list[Any]:
    """Build lm-eval's requests for a task's items; `doc_id` of a request is the item's index in `plan.items[name]`.

    Args:
        plan: The plan.
        name: Name of the task.
        task: lm-eval's task.
        template: Applies the chat template, if the suite uses it.
        tokenizer_name: Name of the tokenizer, which lm-eval includes in its cache keys.

    Raises:
        WorkbenchError: If data has changed since the plan was made, or the task's templates fail on its data.
    """
    items = plan.items[name]
    ids = item_ids(task.eval_docs, name, bundled=name in plan.bundled)
    planned = {item.id for item in items}
    samples = [i for i, identity in enumerate(ids) if identity in planned]  # sorted, because lm-eval mislabels unsorted samples
    if [ids[i] for i in samples] != [item.id for item in items]:
        raise WorkbenchError(
            f"task '{name}': lm-eval loads other items than those of the plan", "The task's data has changed. Start again."
        )
    task.set_fewshot_seed(seed=SEED)
    chat = plan.suite.chat_template
    try:
        task.build_all_requests(
            samples=samples,
            rank=0,
            world_size=1,
            system_instruction=plan.suite.system_instruction,
            apply_chat_template=chat,
            fewshot_as_multiturn=chat,
            chat_template=template if chat else None,
            tokenizer_name=tokenizer_name if chat else "",
        )
        for doc in {instance.doc_id: instance.doc for instance in task.instances}.values():
            task.doc_to_target(doc)  # the rows need it: a template that fails is found before any model runs
    except Exception as error:  # templates and functions of a task may raise anything
        raise WorkbenchError(
            f"task '{name}': cannot build the prompts: {type(error).__name__}: {str(error)[:300]}",
            f"Compare the templates of the task file with the fields of its data: workbench suite check {shell(plan.suite.suite)}",
        ) from error
    return list(task.instances)


def by_item(instances: Sequence[Any]) -> dict[int, list[Any]]:
    """Return the requests of each item, in lm-eval's order."""
    items: dict[int, list[Any]] = {}
    for instance in sorted(instances, key=lambda instance: (instance.doc_id, instance.idx)):
        items.setdefault(instance.doc_id, []).append(instance)
    return items


def _requests(plan: ScorePlan, name: str, task: Any, lm: Any) -> Requests:
    """Return one task's requests, tokenized if the model gives tokens."""
    chat = plan.suite.chat_template
    if chat:
        check_template(plan.suite.suite, getattr(lm, "tokenizer", None))
    instances = build(plan, name, task, lm.apply_chat_template, lm.tokenizer_name if chat else "")
    requests = Requests(name, task, plan.items[name], instances)
    scored = [i for i, instance in enumerate(requests.instances) if instance.request_type != GENERATED]
    if scored and hasattr(lm, "pairs"):
        _tokenize(requests, scored, lm)
    return requests


def _tokenize(requests: Requests, scored: Sequence[int], lm: SafeHFLM) -> None:
    """Add the tokens of all log-likelihood requests; raise WorkbenchError for a request without tokens to score."""
    for kind in dict.fromkeys(requests.instances[i].request_type for i in scored):
        members = [i for i in scored if requests.instances[i].request_type == kind]
        for owner, pairs in zip(members, lm.pairs([requests.instances[i] for i in members]), strict=True):
            if any(not context or not answer for context, answer in pairs):
                instance = requests.instances[owner]
                raise WorkbenchError(
                    f"task '{requests.name}', item '{requests.items[instance.doc_id].id}': "
                    f"{instance.args[-1]!r} has no tokens to score",
                    "Give every choice some text.",
                )
            requests.pairs += pairs
            requests.owners += [owner] * len(pairs)


def rows_of(plan: ScorePlan, requests: Requests, answers: Mapping[int, Any]) -> tuple[list[Row], list[Row]]:
    """Apply lm-eval's filters and metrics to the answers.

    Args:
        plan: The plan.
        requests: The task's requests.
        answers: Request -> (log-likelihood, greedy), log-likelihood, or text (a list of texts if the task asks for repeats).

    Returns:
        Rows with answers and metrics, and rows with the questions, one per item.
    """
    task, name = requests.task, requests.name
    for i, instance in enumerate(requests.instances):
        repeated = isinstance(answers[i], list)
        instance.resps, instance.filtered_resps = (list(answers[i]) if repeated else [answers[i]]), {}
    task._instances = requests.instances
    answers_by_item: list[Row] = []
    questions: list[Row] = []
    kinds, corpora = plan.ratios.get(name, {}), dict[str, list[Any]]()
    with quiet():
        task.apply_filters()
        for number, members in by_item(requests.instances).items():
            question, answer = _rows(plan, requests, requests.items[number], members)
            for metric, value in metrics_of(task, members):
                if kinds.get(metric, RATIOS[0]) not in RATIOS:
                    corpora.setdefault(metric, []).append(value)
                elif metric in plan.metrics[name]:
                    answer["metrics"][metric] = _stored(value, kinds.get(metric))
            questions.append(question)
            answers_by_item.append(answer)
        for metric, values in corpora.items():
            _contribute(plan, requests, metric, values, answers_by_item)
    return answers_by_item, questions


def _contribute(plan: ScorePlan, requests: Requests, metric: str, values: Sequence[Any], rows: Sequence[Row]) -> None:
    """Add each item's contribution to a metric of the whole corpus; leave out a metric that has no value on these answers."""
    name, function = requests.name, requests.task.aggregation().get(metric.partition(",")[0])
    try:
        if len(values) < len(rows):
            raise UndefinedError(f"has values for only {len(values)} of {len(rows)} items")
        shares = corpus_contributions(function, values, codes([item.cluster for item in requests.items])) if function else None
        if shares is None:
            raise UndefinedError("is not known")
    except UndefinedError as error:
        if metric != plan.primary(name):
            return
        raise WorkbenchError(
            f"task '{name}': lm-eval's aggregation of '{metric}' {error}",
            "Choose another `primary` metric in the suite, or give the metric `aggregation: mean` in the task's file.",
        ) from error
    for row, share in zip(rows, shares, strict=True):
        row["metrics"][metric] = [float(share)]


def _stored(value: Any, ratio: str | None) -> float | list[float]:
    """Return a metric of one item: a number, or numerator and weight of a ratio; other tuples are lm-eval's Brier score."""
    if ratio is None:
        return brier_score(*value) if isinstance(value, tuple) else float(value)
    return [float(value[0]), float(value[1])] if isinstance(value, (tuple, list)) else [float(value), 1.0]


def _rows(plan: ScorePlan, requests: Requests, item: Item, members: Sequence[Any]) -> tuple[Row, Row]:
    """Return the rows of one item: its question, and the answer without the task's metrics."""
    task, name = requests.task, requests.name
    doc = members[0].doc
    choices = list(task.doc_to_choice(doc)) if plan.kinds[name] == "multiple_choice" else None
    gold = task.doc_to_target(doc)
    if choices and isinstance(gold, str) and gold in choices:
        gold = choices.index(gold)
    question = {
        "task": name,
        "id": item.id,
        "cluster": item.cluster,
        "prompt": str(members[0].args[0]),
        "choices": choices,
        "gold": gold if isinstance(gold, (int, str)) else [int(g) for g in gold] if choices else str(gold),
    }
    answer: Row = {"task": name, "id": item.id, "metrics": {}, "response": None, "loglikelihoods": None}
    if members[0].request_type == GENERATED:
        answer["response"] = str(members[0].resps[0])
        return question, answer
    values = [float(m.resps[0][0] if isinstance(m.resps[0], tuple) else m.resps[0]) for m in members]
    if not all(map(math.isfinite, values)):
        raise ArithmeticError(f"item '{item.id}' has log-likelihoods {values}")
    answer["loglikelihoods"] = values[: len(choices)] if choices else values
    if choices and not task.multiple_input and (margin := margin_of(answer, question)) is not None:
        answer["metrics"][MARGIN] = margin
    return question, answer
