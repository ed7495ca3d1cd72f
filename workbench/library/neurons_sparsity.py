"""`analyze sparsity`: how much of a feed-forward layer a token uses, and what masking the rest costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from workbench.emergent.cett import Cett, cett
from workbench.emergent.labelled import Item, Labelled
from workbench.emergent.losses import Scored
from workbench.emergent.sparsity import INDICATORS, PERCENTS, Distribution, Normalizer, distribution, masked_losses, token_sample
from workbench.files import write_json, write_text
from workbench.library.neurons_masking import TOLERANCE, MaskCurve, mask_curves
from workbench.library.neurons_subject import NeuronSubject
from workbench.tables import csv_records

RECORD = "sparsity.json"


@dataclass(frozen=True)
class SparsityOptions:
    """What the paper leaves open; part of the record.

    Attributes:
        percents: Shares of the neurons to mask, in percent.
        items: Held-out items of each task whose loss is measured.
        tokens: Tokens in the sample of activations.
        normalizer: Maximum that an indicator is divided by.
        scored: Tokens whose loss counts.
        tolerance: Largest rise of the loss, in nats per token, that counts as no loss.
        cett: Cumulative error of tail truncation that no layer may exceed.
        seed: Seed of the sample.
    """

    percents: tuple[float, ...] = PERCENTS
    items: int = 5
    tokens: int = 256
    normalizer: Normalizer = "token_max"
    scored: Scored = "whole"
    tolerance: float = TOLERANCE
    cett: float = 0.2
    seed: int = 0


@dataclass(frozen=True)
class SparsityAnalysis:
    """The sparsity of a model's activations.

    Attributes:
        model: Name of the model.
        digest: Digest of the model.
        file: File of labelled texts, as the user named it.
        data: The texts.
        items: Number of items whose loss was measured.
        distributions: Distribution of each normalized indicator.
        curves: Loss of all items and of each function against the share masked.
        cett: Thresholds of equal truncation error.
        options: The options.
    """

    model: str
    digest: str
    file: str
    data: Labelled
    items: int
    distributions: tuple[Distribution, ...]
    curves: tuple[MaskCurve, ...]
    cett: Cett
    options: SparsityOptions

    def document(self) -> dict[str, Any]:
        """Return the analysis as plain data."""
        return {
            "version": 1,
            "kind": "sparsity",
            "model": self.model,
            "digest": self.digest,
            "data": {"file": self.file, "digest": self.data.digest, "items": self.items, "warnings": list(self.data.warnings)},
            "settings": asdict(self.options),
            "distributions": [d.document() for d in self.distributions],
            "curves": [curve.document() for curve in self.curves],
            "cett": self.cett.document(),
        }

    def write(self, out: Path) -> None:
        """Write sparsity.json and the curves as masking.csv."""
        out.mkdir(parents=True, exist_ok=True)
        rows = [
            {"function": curve.function or "all", "indicator": curve.indicator, **asdict(point)}
            for curve in self.curves
            for point in curve.points
        ]
        write_text(out / "masking.csv", csv_records(rows))
        write_json(out / RECORD, self.document(), indent=1)


def analyze_sparsity(
    subject: NeuronSubject, data: Labelled, shown: str, options: SparsityOptions | None = None
) -> SparsityAnalysis:
    """Measure the distribution of both indicators on a sample of tokens, and the loss of held-out items with neurons masked.

    Args:
        subject: The model.
        data: The labelled texts.
        shown: Name of their file.
        options: The options.

    Raises:
        WorkbenchError: If a share to mask is not between 0 and 100, or no item has a token whose loss counts.
    """
    options = options or SparsityOptions()
    items = some_of_each_task(data.of("heldout"), options.items)
    rows = subject.rows(items)
    masked = masked_losses(
        subject.model,
        subject.sites,
        rows,
        percents=options.percents,
        scored=options.scored,
        progress=lambda done, total: subject.tell(done, total, "masking"),
    )
    sample = token_sample(subject.model, subject.sites, rows, size=options.tokens, seed=options.seed)
    return SparsityAnalysis(
        subject.name,
        subject.digest,
        shown,
        data,
        len(items),
        tuple(distribution(sample, indicator, options.normalizer) for indicator in INDICATORS),
        tuple(mask_curves(masked, items, options.tolerance)),
        cett(sample, options.cett),
        options,
    )


def some_of_each_task(items: Sequence[Item], count: int) -> list[Item]:
    """Return up to `count` items of each task, evenly spaced, in the order of the file."""
    tasks: dict[tuple[str, str], list[int]] = {}
    for number, item in enumerate(items):
        tasks.setdefault((item.function, item.task), []).append(number)
    chosen = sorted(of[i * len(of) // min(count, len(of))] for of in tasks.values() for i in range(min(count, len(of))))
    return [items[number] for number in chosen]
