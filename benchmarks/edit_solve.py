"""Measure the linear solve of a closed-form edit for thousands of facts, against the system that grows with the facts, in the same run.

    python benchmarks/edit_solve.py
    python benchmarks/edit_solve.py --facts 200 --most 400 --blocks 1      a quick look

Keys, their spread behind contexts and wanted changes are random, with a spectrum like that of text; no model is needed. For each width
both sides solve the same facts in turn: the workbench (`workbench.edit.closed_form.solver`), and one system of facts x contexts and one of facts,
solved whole, as it did before (`reference` below). `difference` is the largest difference of the two updates on the keys,
as a share of the largest wanted change. Then the workbench solves `--most` facts.

CPU seconds of one thread; peak resident memory above what the keys and changes themselves take. Results go to
benchmarks/results/edit-solve.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import torch
from edit import cpu
from edit import peak as measured_peak
from edit_setup import one_thread
from record import parser_of, write_results
from torch import Tensor

from workbench.edit.closed_form.moments import Moments
from workbench.edit.closed_form.preset import of_moments
from workbench.edit.closed_form.solver import CHUNK, KeyMetric, solve

WIDTHS = ((384, 96), (1536, 576))
"""Inputs and outputs of the projection: the trained fixture's and the starter base's."""
CONTEXTS = 3
LAMBDA, MU = 0.05, 1.0


def main() -> None:
    """Measure both widths and write the results file."""
    parser = parser_of(__doc__, "edit-solve")
    parser.add_argument("--facts", type=int, default=2000, help="number of facts that both sides solve")
    parser.add_argument("--most", type=int, default=10_000, help="number of facts that the workbench solves")
    parser.add_argument("--blocks", type=int, default=3, help="number of times that both sides solve, in turn")
    options = parser.parse_args()
    one_thread()
    rows = [measured(width, outputs, options) for width, outputs in WIDTHS]
    write_results(options.out, {"contexts": CONTEXTS, "rows": rows})


def measured(width: int, outputs: int, options: argparse.Namespace) -> dict[str, Any]:
    """Measure one width: both sides in turn, then the largest number of facts."""
    metric = text_metric(width)
    few = Facts(metric, options.facts, width, outputs)
    workbench_seconds: list[float] = []
    reference_seconds: list[float] = []
    peaks: tuple[list[int | None], list[int | None]] = ([], [])
    for _ in range(options.blocks):
        seconds, (update, peak) = cpu(lambda: measured_peak(lambda: workbench(few, metric)))
        other_seconds, (reference_update, reference_peak) = cpu(lambda: measured_peak(lambda: reference(few, metric)))
        workbench_seconds.append(round(seconds, 3))
        reference_seconds.append(round(other_seconds, 3))
        for peaks_of, value in zip(peaks, (peak, reference_peak), strict=True):
            peaks_of.append(value)
        difference = float(((update - reference_update) @ few.keys.double().T).abs().max() / few.changes.abs().max())
    many = Facts(metric, options.most, width, outputs)
    seconds, (_, peak) = cpu(lambda: measured_peak(lambda: workbench(many, metric)))
    row = {
        "inputs": width,
        "outputs": outputs,
        "facts": options.facts,
        "seconds": workbench_seconds,
        "reference_seconds": reference_seconds,
        "ratio": round(sum(reference_seconds) / sum(workbench_seconds), 1),
        "peak": most(peaks[0]),
        "reference_peak": most(peaks[1]),
        "difference": difference,
        "most": options.most,
        "most_seconds": round(seconds, 3),
        "most_peak": peak,
    }
    print(row, flush=True)
    return row


def most(peaks: list[int | None]) -> int | None:
    """Return the largest of some peaks; None if the system does not report them."""
    return max((p for p in peaks if p is not None), default=None)


def text_metric(width: int) -> KeyMetric:
    """Return MEMIT's metric of second moments whose eigenvalues fall like those of text: 1/(1 + i/16)."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))[0]
    values = (1 / (1 + torch.arange(width, dtype=torch.float64) / 16)).flip(0)
    return of_moments(Moments(basis, values, 10 * width, {}), LAMBDA, 0.0)


class Facts:
    """Random facts, float32: keys [n, width] and value changes [n, outputs]; the spread over contexts is generated on demand."""

    def __init__(self, metric: KeyMetric, count: int, width: int, outputs: int) -> None:
        generator = torch.Generator().manual_seed(1)
        assert metric.basis is not None
        self.root = (metric.basis * metric.diagonal.sqrt()).float()
        self.keys = torch.randn(count, width, generator=generator) @ self.root.T
        self.changes = torch.randn(count, outputs, generator=generator)

    def spread(self) -> Iterator[Tensor]:
        """Yield columns [width, ·] of a tenth of a key's length, in chunks of facts."""
        for start in range(0, len(self.keys), CHUNK):
            rows = (1 + CONTEXTS) * min(CHUNK, len(self.keys) - start)
            generator = torch.Generator().manual_seed(2 + start)
            yield 0.1 * self.root @ torch.randn(self.root.shape[1], rows, generator=generator)


def workbench(facts: Facts, metric: KeyMetric) -> Tensor:
    """Return ΔW [outputs, width] as an edit solves it."""
    left, right = solve(facts.keys, metric.after_all(facts.spread(), MU), MU).update(facts.changes)
    return left @ right


def reference(facts: Facts, metric: KeyMetric) -> Tensor:
    """Return the same by Woodbury's identity with all columns of the spread at once, and a system with one row per fact."""
    spread, keys = torch.cat(list(facts.spread()), 1).double(), facts.keys.double().T
    through = plain(metric, spread)
    right = torch.cholesky_solve(through.T, ridged(spread.T @ through)).T
    product = plain(metric, keys)
    product = product - right @ (spread.T @ product)
    factor = torch.cholesky_solve(product.T, ridged(keys.T @ product))
    return facts.changes.double().T @ factor


def plain(metric: KeyMetric, x: Tensor) -> Tensor:
    """Return G x of a metric without written keys."""
    assert metric.basis is not None
    product: Tensor = metric.basis @ ((metric.basis.T @ x) / metric.diagonal[:, None])
    return product


def ridged(gram: Tensor) -> Tensor:
    """Return the Cholesky factor of a Gram matrix with its ridge."""
    factor: Tensor = torch.linalg.cholesky((gram + gram.T) / 2 + MU * torch.eye(len(gram), dtype=gram.dtype))
    return factor


if __name__ == "__main__":
    main()
