"""Remove a quarter of a model's neurons by several criteria and train what is left: the source of a table in docs/growing-results.md.

    python benchmarks/prune_neurons.py
    python benchmarks/prune_neurons.py --arms fitted Wanda-sp --steps 0           without training
    python benchmarks/prune_neurons.py --tiny --steps 2 --limit 4 --calibration 4 --held-out 8   tries the whole on a random model

Arms: `fitted` is `grow: prune` as it is. `Wanda-sp` chooses by ‖activation‖₂ Σ |W|, and `FLAP` by the variance of the activation times
‖W‖² (An et al. 2024, arXiv 2312.11983), without FLAP's biases, which the architecture has no place for. Arms that are not called fitted leave
the outputs of the neurons that remain as they are. All remove the same share of every layer and are then trained by the same steps on the
same texts, if --trained names them. Texts, retention and training are those of prune.py; `other` is the perplexity of the workbench's own plain text. The results file
is written after every arm.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from edit_setup import CPU, make_project, one_thread
from prune import make_tiny, measured, options_of, resolved, timed, write_texts
from record import parser_of, write_results

from workbench.activations.importance import input_statistics
from workbench.activations.labelled import ItemRow
from workbench.activations.losses import losses
from workbench.activations.sites import Site, Tokens, stream
from workbench.evaluate.facts.definitions import bundled_text
from workbench.grow.expansion import smaller
from workbench.models.live import compute, live_model
from workbench.models.prompts import load_tokenizer
from workbench.models.texts import TextRow
from workbench.run.compose import compose

Strengths = Callable[[Any, Sequence[Site], Sequence[TextRow]], list[torch.Tensor]]


def by_moments(score: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]) -> Strengths:
    """Return a criterion from the mean and the mean square of each activation, and the columns of the output matrix [hidden, units]."""

    def strengths(model: Any, sites: Sequence[Site], rows: Sequence[TextRow]) -> list[torch.Tensor]:
        sums = [torch.zeros(2, site.units, dtype=torch.float64) for site in sites]
        tokens = [0] * len(sites)

        def consume(number: int, values: torch.Tensor, batch: Tokens) -> None:
            seen = values[batch.counted].double()
            sums[number] += torch.stack((seen.sum(0), seen.square().sum(0)))
            tokens[number] += len(seen)

        stream(model, sites, [ItemRow(row.tokens, len(row.tokens)) for row in rows], consume, "whole")
        found = zip(sites, sums, tokens, strict=True)
        return [score(total[0] / count, total[1] / count, site.columns().double().T) for site, total, count in found]

    return strengths


WANDA = by_moments(lambda _mean, square, columns: square.sqrt() * columns.abs().sum(0))
FLAP = by_moments(lambda mean, square, columns: (square - mean.square()) * columns.square().sum(0))
CRITERIA: dict[str, Strengths | None] = {
    "fitted": None,
    "not fitted": None,
    "Wanda-sp": WANDA,
    "Wanda-sp, fitted": WANDA,
    "FLAP": FLAP,
    "FLAP, fitted": FLAP,
}


@contextmanager
def chosen_by(arm: str) -> Iterator[None]:
    """Let `grow: prune` choose neurons by the criterion of an arm, and fit them for the arms that are named so."""
    with ExitStack() as patches:
        if not arm.endswith("fitted") or arm.startswith("not"):
            patches.enter_context(patch.object(smaller, "refitted", lambda matrix, _moments, kept: matrix[:, kept].double()))
        if criterion := CRITERIA[arm]:

            def statistics(*given: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
                yield from zip(criterion(*given), (moments for _, moments in input_statistics(*given)), strict=True)

            patches.enter_context(patch.object(smaller, "input_statistics", statistics))
        yield


def main() -> None:
    """Prune, train and measure every arm, and write the results file after each."""
    parser = parser_of(__doc__, "prune-neurons")
    parser.add_argument(
        "--trained", nargs="+", choices=CRITERIA, default=list(CRITERIA), help="arms that are trained; default: all"
    )
    options = options_of(parser, list(CRITERIA), calibration=256)
    one_thread()
    started, rows = time.perf_counter(), list[dict[str, Any]]()
    with tempfile.TemporaryDirectory() as scratch:
        folder = (options.folder or Path(scratch)).resolve()
        base = make_tiny(Path(scratch) / "tiny") if options.tiny else options.base
        tokenizer = load_tokenizer(base)
        plain = [tokenizer(text)["input_ids"][: options.length] for text in bundled_text().split("\n") if text.strip()]
        other = [ItemRow(ids, len(ids)) for ids in plain if len(ids) > 1]
        before: dict[str, Any] | None = None
        for arm in options.arms:
            project = make_project(
                folder / arm.replace(", ", "-").replace(" ", "-"), base, []
            )  # a cache of its own: the recipes are the same
            held_out = write_texts(project, options)
            with chosen_by(arm):
                if before is None:
                    before = state(project, "base", [], held_out, other, options, None)
                rows.append(arm_row(project, arm, held_out, other, options, before))
            print(json.dumps(rows[-1]), flush=True)
            kept = ("share", "steps", "batch_size", "length", "rate", "limit", "calibration", "held_out")
            document: dict[str, Any] = {"base": "the starter base" if base == options.base else "a random tiny model"}
            document |= {name: getattr(options, name) for name in kept}
            document |= {"seconds": round(time.perf_counter() - started)}
            document |= {"before": {key: value for key, value in before.items() if key != "items"}, "rows": rows}
            write_results(options.out, document)


def arm_row(
    project: Path, arm: str, held_out: list[ItemRow], other: list[ItemRow], options: Any, before: dict[str, Any]
) -> dict[str, Any]:
    """Prune in one way, train, and return the measurements of the pruned and of the trained model."""
    pruned = {"grow": "prune", "neurons": options.share, "calibration": "calibration.jsonl", "max_length": options.length}
    pruned["check"] = "tensors"
    record, seconds = timed(project, "pruned", [pruned])
    row: dict[str, Any] = {"arm": arm, "parameters": record["parameters"], "choosing_seconds": seconds}
    row["pruned"] = state(project, "pruned", [pruned], held_out, other, options, before)
    if options.steps and arm in options.trained:
        settings = {"steps": options.steps, "batch_size": options.batch_size, "learning_rate": options.rate}
        trained = {**pruned, "train": {"data": "train.jsonl", "max_length": options.length, **settings}}
        _, row["training_seconds"] = timed(project, "trained", [trained])
        row["trained"] = state(project, "trained", [trained], held_out, other, options, before)
    return row


def state(
    project: Path,
    name: str,
    steps: list[dict[str, Any]],
    held_out: list[ItemRow],
    other: list[ItemRow],
    options: Any,
    before: dict[str, Any] | None,
) -> dict[str, Any]:
    """Return what `measured` finds, and the perplexity of other text."""
    found = measured(project, name, steps, held_out, options, before)
    recipe = resolved(project, name, steps)
    model = compose(recipe, CPU).model
    live = live_model(model.config, compute(model, torch.float32, CPU), recipe.tokenizer_path, CPU)
    return {**found, "other": float(torch.tensor(losses(live, other).mean).exp())}


if __name__ == "__main__":
    main()
