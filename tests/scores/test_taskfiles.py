"""Metrics that a task file gives, against what lm-eval makes of the same file."""

from __future__ import annotations

from typing import Any

import pytest

from workbench.scores.statistics import RATIOS
from workbench.scores.tasks import DEFAULT_METRICS, listed_metrics


def test_defaults_are_those_of_lm_eval() -> None:
    from lm_eval.api.registry import DEFAULT_METRIC_REGISTRY

    assert {kind: list(metrics) for kind, metrics in DEFAULT_METRICS.items()} == DEFAULT_METRIC_REGISTRY


@pytest.mark.parametrize("kind", DEFAULT_METRICS)
def test_metrics_without_aggregation_are_taken_as_lm_eval_takes_them(kind: str) -> None:
    """Every metric that lm-eval registers for the output type, named without aggregation and direction."""
    from lm_eval.api import metrics  # noqa: F401  registers the aggregations
    from lm_eval.api.registry import aggregation_registry, get_metric_aggregation, is_higher_better

    names = {
        "multiple_choice": ["acc", "acc_norm", "acc_bytes", "f1", "mcc", "brier_score"],
        "generate_until": ["exact_match", "bleu", "chrf", "ter"],
        "loglikelihood": ["perplexity", "acc"],
        "loglikelihood_rolling": ["bits_per_byte", "word_perplexity", "byte_perplexity"],
    }[kind]
    registered = {function: name for name, function in aggregation_registry.items()}
    how = {name: registered[get_metric_aggregation(name)] for name in names}
    by_item = ("mean", "brier_score", *RATIOS)
    kept = tuple(sorted(names, key=lambda name: how[name] not in by_item))  # those of a whole corpus come last
    found, lower, ratios = listed_metrics({"output_type": kind, "metric_list": [{"metric": name} for name in names]})
    assert found == kept
    assert lower == {name for name in kept if not is_higher_better(name)}
    assert ratios == {name: how[name] for name in kept if how[name] not in ("mean", "brier_score")}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"metric_list": [{"metric": "error", "aggregation": "mean", "higher_is_better": False}]}, (("error",), {"error"}, {})),
        ({"output_type": "multiple_choice", "metric_list": [{"metric": "perplexity"}]}, ((), set(), {})),  # lm-eval computes none
        ({"process_results": "f", "metric_list": [{"metric": "ppl", "aggregation": "perplexity", "higher_is_better": False}]},
         (("ppl",), {"ppl"}, {"ppl": "perplexity"})),
        ({"filter_list": [{"name": "a"}, {"name": "b"}]}, (("exact_match", "exact_match,b"), set(), {})),
    ],
)  # fmt: skip
def test_listed_metrics(config: dict[str, Any], expected: tuple[Any, ...]) -> None:
    assert listed_metrics(config) == expected
