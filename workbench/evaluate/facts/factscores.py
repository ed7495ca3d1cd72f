"""Scores of edited facts, as lm-eval tasks call them (`process_results`). The file is copied beside the tasks and needs nothing but Python."""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

Doc = Mapping[str, Any]
_EDGES = string.punctuation + string.whitespace + "\u2018\u2019\u201c\u201d\u2026"


def preferred(doc: Doc, results: Sequence[tuple[float, bool]]) -> dict[str, float]:
    """Return 1 as `token_mean_preferred` if the first choice has the smaller mean negative log-likelihood of a token than the second.

    That is ES, PS and NS of Meng et al. 2022 (ROME), with the document's counts of tokens. `token_mean_magnitude` is exp(-NLL) of the first minus that of the second, `token_mean_margin` the difference of the means in nats.
    """
    first, second = (-float(value) / count for (value, _), count in zip(results, doc["tokens"], strict=True))
    return {
        "token_mean_preferred": float(first < second),
        "token_mean_magnitude": math.exp(-first) - math.exp(-second),
        "token_mean_margin": second - first,
    }


def generated(doc: Doc, results: Sequence[str]) -> dict[str, float]:
    """Return 1 as `exact_match` if the text, up to where it stops by itself, is the answer, and as `starts_with` if it begins with it.

    The document's `aliases` are right answers too.
    """
    exact = begins = False
    for answer in (doc["answer"], *doc.get("aliases", ())):
        wanted, found = plain(answer), plain(stopped(results[0], answer))
        exact |= found == wanted
        begins |= found.startswith(wanted) and not found[len(wanted) : len(wanted) + 1].isalnum()
    return {"exact_match": float(exact), "starts_with": float(begins)}


def chat(doc: Doc, results: Sequence[str]) -> dict[str, float]:
    """Return 1 as `says` if the text has the answer, as whole words, anywhere; as `starts_with` if it begins with it."""
    found, answers = plain(results[0]), [plain(answer) for answer in (doc["answer"], *doc.get("aliases", ()))]
    says = any(re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", found) for answer in answers)
    return {"says": float(says), "starts_with": generated(doc, results)["starts_with"]}


def entropy(_doc: Doc, results: Sequence[str]) -> dict[str, float]:
    """Entropy of the 2- and 3-grams of a text in bits, weighted 2/3 and 4/3 and then averaged (Zhang et al. 2018; ROME's "fluency").

    Low where a text repeats itself. Words and punctuation marks are the tokens, where the papers take nltk's.
    """
    tokens = re.findall(r"\w+|[^\w\s]", results[0])
    return {"ngram_entropy": (2 / 3 * _bits(tokens, 2) + 4 / 3 * _bits(tokens, 3)) / 2}


def stopped(text: str, answer: str) -> str:
    """A text up to its first line break or full stop; a full stop within the answer ends nothing."""
    line = text.split("\n", 1)[0]
    return line if "." in answer else line.split(".", 1)[0]


def plain(text: str) -> str:
    """Without case, and without blanks and punctuation at the ends; blanks inside as one."""
    return " ".join(text.casefold().split()).strip(_EDGES)


def _bits(tokens: Sequence[str], n: int) -> float:
    counts = Counter(zip(*(tokens[i:] for i in range(n)), strict=False))
    total = sum(counts.values())
    return -sum(count / total * math.log2(count / total) for count in counts.values())
