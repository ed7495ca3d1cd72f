"""Gold answers of items, the metrics that lm-eval computes from answers, and its aggregations of a whole corpus."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from workbench.scores.corpus import Function, Sums, contributions
from workbench.scores.statistics import Floats
from workbench.scores.tasks import metric_name

# Log-likelihoods that the oracle assigns to the gold choice and to the other choices.
_RIGHT, _WRONG = 0.0, -10.0


@dataclass(frozen=True)
class _Gold:
    choices: tuple[str, ...] | None
    indices: tuple[int, ...] | None
    target: Any


def _gold(task: Any, doc: Any) -> _Gold:
    """Return a document's correct answer. If the choices are in the contexts, `doc_to_text` gives the index."""
    target = task.doc_to_target(doc)
    if task.config.doc_to_choice is None:
        return _Gold(None, None, target)
    choices = tuple(map(str, task.doc_to_choice(doc)))
    answers = task.doc_to_text(doc) if task.multiple_input else target
    indices = []
    for gold in answers if isinstance(answers, list) else [answers]:
        index = choices.index(gold) if isinstance(gold, str) and gold in choices else gold
        indices.append(index if isinstance(index, int) and 0 <= index < len(choices) else None)
    valid = tuple(i for i in indices if i is not None)
    return _Gold(choices, valid if indices and len(valid) == len(indices) else None, target)


def _response(task: Any, instance: Any, gold: _Gold) -> Any:
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
