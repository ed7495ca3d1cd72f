"""Facts that probably ask one question in other words, by the similarity of a sentence encoder."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

from workbench.advice.facts import FactsReport, finding, read_checked
from workbench.edit.memories.retrieval import SentenceEncoder
from workbench.facts.facts import Fact, fact_of, folded
from workbench.facts.questions import INVERSES, RELATIONS, Relation, place_of, prompts_of, relation_names_of
from workbench.facts.stream import Start
from workbench.ground.errors import WorkbenchError
from workbench.ground.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

NOBODY = "it"
"""Word that stands for every subject, so that only the questions are compared."""
REJECTED = 0.999
"""Share of pairs of two different relations below the threshold."""
WORDINGS = 4
"""Prompts of each known relation from which the threshold is set."""

_EXPECTED = "Give the directory of a sentence encoder with config.json, model.safetensors and its tokenizer."
_REPAIR = "Keep one of the two, unless they ask different things."


class WordingCheck:
    """Compare the questions of facts, with a threshold that is set for the encoder.

    The similarity is the cosine of two prompts with the subject replaced by NOBODY. The threshold is the value below which the share
    REJECTED of the pairs of wordings of two different known relations lies, so it needs no file and no setting.

    Attributes:
        threshold: Similarity from which two prompts probably ask one question.
    """

    def __init__(self, folder: Path) -> None:
        """Load the encoder, and set the threshold.

        Args:
            folder: Directory of transformers' AutoModel with its tokenizer.

        Raises:
            WorkbenchError: If the directory has no model that can be loaded.
        """
        self._encoder = _loaded(folder)
        self._vectors: dict[str, Tensor] = {}
        self.threshold = self._threshold()

    def similarity(self, first: Fact, fact: Fact) -> float:
        """Return the cosine of two facts' prompts without their subjects; 0 if both relations are known, and different."""
        names, others = set(relation_names_of(first)), set(relation_names_of(fact))
        if names and others and not names & others:
            return 0.0
        return float(self._vector(first.prompt) @ self._vector(fact.prompt))

    def conflicts(self, facts: Sequence[Fact], found: Sequence[tuple[str, str]]) -> Iterator[tuple[Fact, Fact, float]]:
        """Yield (fact, earlier fact, similarity) for facts about one subject that probably have two answers to one question.

        Facts without a subject are not compared.

        Args:
            facts: The facts, in the file's order.
            found: Places of pairs that are reported already.
        """
        reported = {frozenset(pair) for pair in found}
        by_subject: dict[str, list[Fact]] = defaultdict(list)
        for fact in facts:
            if fact.subject is not None:
                by_subject[folded(fact.subject)].append(fact)
        for group in by_subject.values():
            for first, fact in combinations(group, 2):
                if frozenset((fact.place, first.place)) in reported or not _differ(first, fact):
                    continue
                if (similarity := self.similarity(first, fact)) >= self.threshold:
                    yield fact, first, similarity

    def _threshold(self) -> float:
        """Return the threshold from the wordings of known relations."""
        prompts = [(relation.name, text) for relation in RELATIONS for text in _chosen(relation)]
        inverse = {frozenset(pair[:2]) for pair in INVERSES}
        vectors = torch.stack([self._vector(text) for _, text in prompts])
        cosines = vectors @ vectors.T
        different = [
            float(cosines[i, j])
            for i, j in combinations(range(len(prompts)), 2)
            if prompts[i][0] != prompts[j][0] and frozenset((prompts[i][0], prompts[j][0])) not in inverse
        ]
        return float(torch.tensor(different, dtype=torch.float64).quantile(REJECTED))

    def _vector(self, prompt: str) -> Tensor:
        """Return the vector of a prompt without its subject."""
        if prompt not in self._vectors:
            fact = fact_of({"prompt": prompt, "subject": NOBODY, "target": "-"}, "")
            self._vectors[prompt] = self._encoder.fact(fact)["vector"]
        return self._vectors[prompt]


def _chosen(relation: Relation) -> list[str]:
    """Return a few prompts of a relation, spread over all of them."""
    prompts = prompts_of(relation)
    return prompts[:: max(1, len(prompts) // WORDINGS)][:WORDINGS]


def _differ(first: Fact, fact: Fact) -> bool:
    """Return True if two facts have different prompts and different answers."""
    answers = {folded(text) for text in (first.target, *first.aliases)}
    others = {folded(text) for text in (fact.target, *fact.aliases)}
    return folded(first.prompt) != folded(fact.prompt) and answers.isdisjoint(others)


def compare_wordings(report: FactsReport, path: Path, encoder: Path, *, stream: bool | Start = False) -> FactsReport:
    """Add a warning of the kind "wording" for each pair of facts that probably have two answers to one question.

    Args:
        report: The report of `check_facts` on the file; pairs in it are not reported again.
        path: The file.
        encoder: Directory of the sentence encoder.
        stream: Whether the file is read in order, or the stream that it continues.

    Raises:
        WorkbenchError: If the directory has no encoder.
    """
    check = WordingCheck(encoder)
    found = [(one.place, one.other) for one in report.findings if one.other is not None]
    findings = [
        finding(fact, "wording", "warning", described(fact, first, similarity), _REPAIR, first.place, round(similarity, 4))
        for fact, first, similarity in check.conflicts(read_checked(path, report.file, stream=stream).facts, found)
    ]
    counts = {**report.counts, **({"wording": len(findings)} if findings else {})}
    added = {"findings": [*report.findings, *findings], "counts": counts}
    return report.model_copy(update={**added, "encoder": str(encoder), "wording_threshold": round(check.threshold, 4)})


def described(fact: Fact, first: Fact, similarity: float) -> str:
    """Return the description of a pair that `WordingCheck.conflicts` finds."""
    return (
        f"probably asks the same question as {place_of(first, fact)} {first.text!r} (similarity {similarity:.2f}), "
        f"but answers {fact.text!r} with {fact.target!r} instead of {first.target!r}"
    )


def _loaded(folder: Path) -> SentenceEncoder:
    """Return the encoder of a directory."""
    from safetensors import SafetensorError

    require_encoder(folder)
    try:
        return SentenceEncoder(folder)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise WorkbenchError(f"encoder {folder}: {error}", _EXPECTED) from error


def require_encoder(folder: Path) -> None:
    """Check that a directory looks like a model, without loading it.

    Raises:
        WorkbenchError: If it has no config.json.
    """
    if not (folder / "config.json").is_file():
        raise WorkbenchError(f"encoder {folder}: {'no config.json' if folder.is_dir() else 'no such directory'}", _EXPECTED)
