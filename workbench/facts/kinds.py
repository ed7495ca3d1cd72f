"""Kinds of questions that are asked about facts."""

from __future__ import annotations

from typing import Literal, get_args

ACCURACIES = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info")  # lm-eval's: whether the choice that scores best is a gold one


WRITTEN = "exact_match"  # of a choice: whether the model would write it unasked, among all texts, so that guessing scores 0


FactKind = Literal[
    "efficacy",
    "preferred",
    "paraphrase",
    "preferred-paraphrase",
    "neighbours",
    "neighbours-right",
    "preferred-neighbours",
    "portability",
    "generated",
    "generated-paraphrase",
    "entropy",
    "text",
]


FACT_KINDS: tuple[FactKind, ...] = get_args(FactKind)
