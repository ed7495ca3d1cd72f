"""Tables of the page on scoring: scorers and greedy texts beside lm-eval's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cells import block, table

SCORING = "benchmarks/results/eval.json"


@block("scoring", SCORING)
def scoring_block(found: dict[str, Any]) -> str:
    """Scorers beside lm-eval's HFLM on the same requests, and whole processes beside its command line."""
    rows = []
    for task, kinds in (("long", ("packed",)), ("letters", ("packed", "prefix")), ("story", ("packed",))):
        own = found["in_process"][task]
        rows += [
            [
                f"`{task}`, `{kind}`",
                str(own["requests"]),
                f"{own[kind]['token_ratio']}",
                f"{own[kind]['time_ratio']}",
                f"{own[kind]['time_ratio_default']}",
                f"{own[kind]['over_bare']}",
            ]
            for kind in kinds
        ]
    heads = [
        "task, scorer",
        "requests",
        "tokens, HFLM over ours",
        "CPU s, HFLM over ours",
        "the same with logits_cache",
        "CPU s over a bare forward",
    ]
    check, processes = found["in_process"]["check"], found["processes"]
    processes = processes if isinstance(processes, list) else [processes]
    note = (
        f"{found['items']} items a task, {found['dtype']}, batch size {found['batch_size']}, one thread. `long`: five choices of several tokens after a passage; `letters`: four "
        "letters after five examples; `story`: running text. HFLM with the settings above; with `logits_cache` its default, whose values are wrong where "
        f"choices share tokens. Largest difference of a log-likelihood in the check: {check['max_difference']:.2g} nats (tolerance {check['tolerance']:.2g})."
    )
    calls = "Whole processes, on `long` and `letters`, composing included: " + " ".join(
        f"{whole['configurations']} configurations (controls included) take {whole['seconds']:.0f} CPU s by one `workbench eval` and "
        f"{whole['lm_eval_seconds']:.0f} by as many calls of `lm_eval` on written checkpoints ({len(whole['lm_eval_calls'])} calls measured, "
        f"their mean counted for each), {whole['ratio']} times as much; the same `workbench eval` again takes {whole['again']:.1f} CPU s."
        for whole in processes
    )
    return "\n\n".join([table(heads, rows, left=1), note, *_texts(found), calls])


def _texts(found: Mapping[str, Any]) -> list[str]:
    """Greedy texts beside HFLM's, if they were measured."""
    if "texts" not in found:
        return []
    heads = ["texts", "number", "CPU s, HFLM over ours", "equal to HFLM's", "HFLM's own, one by one, equal to its batches'"]
    rows = [
        [f"{prompts}, {dtype}", *(str(row[key]) for key in ("texts", "time_ratio", "equal", "hflm_equal"))]
        for dtype, by_prompts in found["texts"].items()
        for prompts, row in by_prompts.items()
    ]
    return [
        table(heads, rows, left=1),
        "Sums, without and after five worked ones, batch size 32, up to 24 new tokens, which end at a line break.",
    ]
