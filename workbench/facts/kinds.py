"""Kinds of questions by which facts are scored."""

from __future__ import annotations

from typing import Literal, get_args

ACCURACIES = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info")  # metrics of lm-eval: whether the best choice is a correct one
WRITTEN = "exact_match"  # for a choice: whether greedy decoding writes exactly it, so that guessing scores 0
FactKind = Literal[
    "efficacy",
    "preferred",
    "paraphrase",
    "preferred-paraphrase",
    "neighbours",
    "neighbours-right",
    "neighbours-strict",
    "preferred-neighbours",
    "portability",
    "generated",
    "generated-paraphrase",
    "entropy",
    "text",
]


FACT_KINDS: tuple[FactKind, ...] = get_args(FactKind)
