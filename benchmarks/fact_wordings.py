"""Measure how well `facts check` tells that two prompts ask one question, by forms alone and with a sentence encoder.

    python benchmarks/fact_wordings.py --folder DATA --name all-MiniLM-L6-v2

DATA holds `encoder/` (a sentence encoder), `relations/` (the factual relations of Hernandez et al. 2024: templates, subjects) and
`editing/` (zsRE and WikiBigEdit, as LocFT publishes them). Pairs of one question are two templates of one relation, and a prompt with its
published rephrasing. Pairs of different questions are templates of two relations that a subject has both. The threshold comes from the
prompts of the known relations; its level, the share of their pairs that it rejects, was chosen on the pairs of templates. Results go to benchmarks/results/fact-wordings.json.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from itertools import combinations
from pathlib import Path

import torch
from record import parser_of, write_results

from workbench.advice import fact_wordings
from workbench.advice.fact_wordings import WordingCheck
from workbench.facts.facts import SLOT, Fact, fact_of
from workbench.facts.published import read_facts
from workbench.facts.questions import single_keys_of

Pairs = list[tuple[str, str]]
SETS = {"zsRE": "zsre_500.json", "WikiBigEdit": "wikibigedit_500.json"}


def main() -> None:
    """Measure, and write the results file."""
    parser = parser_of(__doc__, "fact-wordings")
    parser.add_argument("--folder", type=Path, required=True, help="folder with encoder/, relations/ and editing/")
    parser.add_argument("--name", required=True, help="name of the encoder in the results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    started = time.time()
    check = WordingCheck(options.folder / "encoder")
    loading = time.time() - started
    same, different = relation_pairs(options.folder / "relations")
    ways: dict[str, Callable[[str, str], bool]] = {
        "forms": share_a_question,
        "encoder": lambda a, b: check.similarity(fact_with(a), fact_with(b)) >= check.threshold,
        "both": lambda a, b: share_a_question(a, b) or check.similarity(fact_with(a), fact_with(b)) >= check.threshold,
    }
    groups = {
        "relations, one": same,
        "relations, two": different,
        **{name: rephrased(options.folder / "editing" / file) for name, file in SETS.items()},
    }
    rows = [
        {"pairs": group, "way": name, "count": len(pairs), "found": sum(is_same(a, b) for a, b in pairs)}
        for group, pairs in groups.items()
        for name, is_same in ways.items()
    ]
    wrong = sorted(((check.similarity(fact_with(a), fact_with(b)), a, b) for a, b in different), reverse=True)[:8]
    document = {
        "encoder": options.name,
        "threshold": round(check.threshold, 4),
        "rejected": fact_wordings.REJECTED,
        "loading_seconds": round(loading, 1),
        "seconds": round(time.time() - started),
        "rows": rows,
        "highest_of_two_relations": [{"similarity": round(value, 3), "prompts": [a, b]} for value, a, b in wrong],
    }
    write_results(options.out, document)


def relation_pairs(folder: Path) -> tuple[Pairs, Pairs]:
    """Return pairs of templates of one relation, and of two relations that one subject has."""
    relations = [json.loads(path.read_text("utf-8")) for path in sorted(folder.glob("*.json"))]
    templates: dict[str, list[str]] = {}
    of_subject: dict[str, set[str]] = defaultdict(set)
    for relation in relations:
        if relation["properties"]["relation_type"] == "factual":
            texts = {*relation["prompt_templates"], *relation["prompt_templates_zs"]}
            templates[relation["name"]] = sorted(text.replace("{}", SLOT) for text in texts)
            for sample in relation["samples"]:
                of_subject[sample["subject"]].add(relation["name"])
    same = [pair for texts in templates.values() for pair in combinations(texts, 2)]
    shared = sorted({pair for names in of_subject.values() for pair in combinations(sorted(names), 2)})
    return same, [(a, b) for one, two in shared for a in templates[one] for b in templates[two]]


def rephrased(path: Path) -> Pairs:
    """Return the prompts of a published set with their rephrasings, where these name the subject as written."""
    facts = read_facts(path, path.name)
    pairs = [
        (fact.prompt, text.replace(fact.subject or "", SLOT))
        for fact in facts
        for text in fact.paraphrases
        if (fact.subject or SLOT) in text
    ]
    return [pair for pair in distinct(pairs) if pair[1].count(SLOT) == 1]


def distinct(pairs: Iterable[tuple[str, str]]) -> Pairs:
    """Return each pair once."""
    return list(dict.fromkeys(pairs))


def share_a_question(prompt: str, other: str) -> bool:
    """Return True if two prompts ask one question by their form or relation."""
    return bool(set(single_keys_of(fact_with(prompt))) & set(single_keys_of(fact_with(other))))


def fact_with(prompt: str) -> Fact:
    """Return a fact with a prompt."""
    return fact_of({"prompt": prompt, "subject": "x", "target": "y"}, "")


if __name__ == "__main__":
    main()
