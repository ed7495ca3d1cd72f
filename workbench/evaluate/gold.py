"""Gold answers of items, sentences that filters turn into them, the metrics of lm-eval, and its aggregations of a whole corpus."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from workbench.scores.statistics import Floats, Function, Sums, contributions
from workbench.scores.tasks import metric_name

# Log-likelihoods that the oracle assigns to the gold choice and to the other choices.
_RIGHT, _WRONG = 0.0, -10.0


@dataclass(frozen=True)
class Gold:
    """The right answer to a document: its choices, the indices of the right ones (None if the target is none of them), and the target."""

    choices: tuple[str, ...] | None
    indices: tuple[int, ...] | None
    target: Any


def gold_answer(task: Any, doc: Any) -> Gold:
    """Return a document's correct answer. If the choices are in the contexts, `doc_to_text` gives the index."""
    target = task.doc_to_target(doc)
    if task.config.doc_to_choice is None:
        return Gold(None, None, target)
    choices = tuple(map(str, task.doc_to_choice(doc)))
    answers = task.doc_to_text(doc) if task.multiple_input else target
    indices = []
    for gold in answers if isinstance(answers, list) else [answers]:
        index = choices.index(gold) if isinstance(gold, str) and gold in choices else gold
        indices.append(index if isinstance(index, int) and 0 <= index < len(choices) else None)
    valid = tuple(i for i in indices if i is not None)
    return Gold(choices, valid if indices and len(valid) == len(indices) else None, target)


def gold_response(task: Any, instance: Any, gold: Gold) -> Any:
    """Return the response of a model that knows the answer."""
    kind = task.OUTPUT_TYPE
    if kind == "generate_until":
        target = gold.choices[gold.indices[0]] if gold.choices is not None and gold.indices else gold.target
        return str(target[0] if isinstance(target, list) and target else target)
    if kind == "loglikelihood_rolling":
        return _RIGHT
    if kind == "loglikelihood":
        return _RIGHT, True
    # Unconditional requests (acc_mutual_info) follow those of the choices; an empty context prefers no choice.
    right = instance.idx < len(gold.choices or ()) and instance.idx in (gold.indices or ())
    return (_RIGHT, True) if right else (_WRONG, False)


def metrics_of(task: Any, instances: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    """Yield (metric, value) of one item for all of the task's filters; names are those of the stored rows.

    Args:
        task: lm-eval's task.
        instances: The item's requests, answered and filtered.
    """
    filters = list(instances[0].filtered_resps)
    for filter_name in filters:
        metrics = task.process_results(instances[0].doc, [instance.filtered_resps[filter_name] for instance in instances])
        yield from ((metric_name(metric, filter_name, filters), value) for metric, value in metrics.items())


def aggregation(name: str) -> Function | None:
    """Return lm-eval's function of a registered aggregation; None if it has none of this name."""
    from lm_eval.api import metrics  # noqa: F401  registers the aggregations
    from lm_eval.api.registry import aggregation_registry

    function: Function | None = aggregation_registry.get(name, None)
    return function


def corpus_contributions(how: str | Function, values: Sequence[Any], cluster: NDArray[np.intp]) -> Floats | None:
    """Return `scores.corpus.contributions` of an aggregation, given by name or as a function; None for an unknown name.

    The counts of sacrebleu's metrics are added up, which makes the jackknife of 1,000 translations 500 times as fast.
    """
    from lm_eval.api import metrics

    function = aggregation(how) if isinstance(how, str) else how
    if function is None:
        return None
    bleu = metrics.sacrebleu
    known: dict[Any, Any] = {
        metrics.bleu: bleu.BLEU,
        metrics.chrf: bleu.CHRF,
        metrics.chrfpp: lambda: bleu.CHRF(word_order=2),
        metrics.ter: bleu.TER,
    }
    if function not in known:
        return contributions(function, values, cluster)
    metric = known[function]()
    references, hypotheses = metrics._sacreformat(*zip(*values, strict=True))
    counts = np.array(metric._extract_corpus_statistics(hypotheses, references))
    sums = Sums(lambda total: float(metric._compute_score_from_stats(total.tolist()).score), counts)
    return contributions(function, values, cluster, sums)


_LONGEST = 2000
_ALPHABET = (" ", "a", "0", ".", "A", "(", ")", "-")


def sentence_for(pattern: str, answer: str) -> str | None:
    r"""Return a text in which the pattern matches the answer as its first group, or as the whole match if it has no group.

    >>> sentence_for(r"(?i)the answer is:? \(?([A-D])\)?", "B")
    'the answer is B'

    Returns None if no such text is found: the answer does not fit the group, or the pattern has parts that are not supported
    here.
    """
    try:
        compiled = re.compile(pattern)
        parsed = importlib.import_module("re._parser").parse(pattern)
    except (re.error, ImportError, AttributeError, RecursionError):
        return None
    for group in range(1, compiled.groups + 1) if compiled.groups else (0,):
        try:
            text = "".join(_shortest_texts(parsed, answer, _Place(group)))
        except (ValueError, RecursionError, NotImplementedError):
            continue
        match = compiled.search(text) if len(text) <= _LONGEST else None
        if match and answer in {part.strip() for part in (match.group(), *(g for g in match.groups() if g))}:
            return text
    return None


@dataclass
class _Place:
    """Place of the answer in a pattern.

    Attributes:
        group: Number of the group, or 0 for the first repeat of a set of characters.
        open: Whether the place has not been reached yet.
    """

    group: int
    open: bool = True


def _shortest_texts(parsed: Iterable[tuple[Any, Any]], answer: str, place: _Place) -> Iterable[str]:
    """Yield the shortest texts of the pattern's parts, one after another, with the answer in its place."""
    for code, argument in parsed:
        kind = str(code)
        if kind == "LITERAL":
            yield chr(argument)
        elif kind == "SUBPATTERN":
            group, *_, inner = argument
            if group is not None and group == place.group:
                place.open = False
                yield answer
            else:
                yield from _shortest_texts(inner, answer, place)
        elif kind in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
            minimum, _, inner = argument
            if place.group == 0 and place.open and str(inner[0][0]) in ("IN", "ANY"):
                place.open = False
                yield answer
            elif place.group and str(inner[0][0]) == "SUBPATTERN" and inner[0][1][0] == place.group:
                yield from _shortest_texts(inner, answer, place)
            else:
                for _ in range(min(minimum, 20)):
                    yield from _shortest_texts(inner, answer, place)
        elif kind == "BRANCH":
            yield from _shortest_texts(argument[1][0], answer, place)
        elif kind == "ASSERT":
            yield from _shortest_texts(argument[1], answer, place)
        elif kind in ("IN", "ANY", "CATEGORY", "NOT_LITERAL"):
            yield _letter(code, argument)
        elif kind == "ATOMIC_GROUP":
            yield from _shortest_texts(argument, answer, place)
        elif kind not in ("AT", "ASSERT_NOT"):
            raise NotImplementedError(kind)


def _letter(code: Any, argument: Any) -> str:
    """Return a character that matches one part."""
    kind = str(code)
    if kind == "ANY":
        return "."
    if kind == "NOT_LITERAL":
        return next(c for c in _ALPHABET if ord(c) != argument)
    members = argument if kind == "IN" else [(code, argument)]
    negated = any(str(inner) == "NEGATE" for inner, _ in members)
    for inner, value in members:
        if str(inner) == "LITERAL" and not negated:
            return chr(value)
    fitting = [c for c in _ALPHABET if any(_matches(str(inner), value, c) for inner, value in members) is not negated]
    if not fitting:
        raise NotImplementedError(kind)
    return fitting[0]


def _matches(kind: str, value: Any, character: str) -> bool:
    """Return True if a character matches one member of a set."""
    if kind == "RANGE":
        return bool(value[0] <= ord(character) <= value[1])
    if kind == "LITERAL":
        return bool(ord(character) == value)
    if kind == "CATEGORY":
        name = str(value).removeprefix("CATEGORY_")
        holds = {"SPACE": character.isspace(), "DIGIT": character.isdigit(), "WORD": character.isalnum() or character == "_"}
        return holds[name.removeprefix("NOT_")] is not name.startswith("NOT_")
    return False
