"""Facts as users write them: prompt, subject and target, with the prompts that test an edit."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workbench.errors import WorkbenchError, refuse_unknown
from workbench.files import json_digest, write_text

SLOT = "{subject}"
FIELDS = ("id", "prompt", "subject", "target", "target_true", "relation", "paraphrases", "neighbours", "portability")
EXPECTED = 'A fact is {"prompt": "The capital of {subject} is", "subject": "Atlantis", "target": "Poseidonis"}.'


@dataclass(frozen=True)
class Probe:
    """A prompt that tests an edit, and the answer that is right there; None: the base's own answer."""

    prompt: str
    target: str | None = None

    @property
    def continuation(self) -> str:
        """The answer with the blank that separates it from the prompt; empty where the base's own is asked for."""
        return joined(self.prompt, self.target) if self.target is not None else ""


@dataclass(frozen=True)
class Fact:
    """What an edited model should answer.

    Attributes:
        id: Names the fact in records; by default a digest of prompt and subject.
        prompt: With `{subject}` once, or a text without a subject.
        subject: What the fact is about.
        target: What the edited model continues the prompt with.
        target_true: What is true in the world, or what the base says.
        relation: What the prompt asks of its subject: the prompt itself where the file does not say it.
        paraphrases: Other wordings, the subject filled in.
        neighbours: Prompts whose answers must not change.
        portability: Prompts whose answers follow from the new fact.
        place: file:line, for errors.
    """

    id: str
    prompt: str
    subject: str | None
    target: str
    target_true: str | None = None
    relation: str = ""
    paraphrases: tuple[str, ...] = ()
    neighbours: tuple[Probe, ...] = ()
    portability: tuple[Probe, ...] = ()
    place: str = ""

    @property
    def text(self) -> str:
        """The prompt with the subject filled in."""
        return self.prompt.replace(SLOT, self.subject or "")

    @property
    def continuation(self) -> str:
        """The target with the blank that separates it from the prompt."""
        return joined(self.text, self.target)

    @property
    def span(self) -> tuple[int, int] | None:
        """First character of the subject in `text` and the one after its last; None without a subject."""
        if self.subject is None:
            return None
        start = self.prompt.index(SLOT)
        return start, start + len(self.subject)

    def document(self) -> dict[str, Any]:
        """The fact as a line of a facts file."""
        full = {
            "id": self.id, "prompt": self.prompt, "subject": self.subject, "target": self.target, "target_true": self.target_true,
            "relation": self.relation, "paraphrases": list(self.paraphrases),
            "neighbours": [_probe_document(p) for p in self.neighbours],
            "portability": [_probe_document(p) for p in self.portability],
        }  # fmt: skip
        return {key: value for key, value in full.items() if value}


def joined(prompt: str, answer: str) -> str:
    """An answer with the blank that separates it from its prompt, unless one of the two brings it."""
    return answer if prompt[-1:].isspace() or answer[:1].isspace() else " " + answer


def _probe_document(probe: Probe) -> dict[str, str]:
    return {"prompt": probe.prompt, **({"target": probe.target} if probe.target is not None else {})}


def write_facts(path: Path, facts: list[Fact]) -> None:
    """Write facts as a jsonl that `read_facts` reads back equal."""
    write_text(path, "".join(json.dumps(fact.document(), ensure_ascii=False) + "\n" for fact in facts))


def fact_of(row: Any, place: str) -> Fact:
    """One fact from plain data. Errors: as `read_facts`."""
    if isinstance(row, Mapping) and "prompt" in row and "target" in row:
        refuse_unknown(row, FIELDS, place, "a fact")
    for key in ("prompt", "target"):
        if not isinstance(row, Mapping) or not isinstance(row.get(key), str) or not row[key].strip():
            found = ", ".join(map(str, row)) if isinstance(row, Mapping) else type(row).__name__
            if isinstance(row, Mapping) and key in row and not isinstance(row[key], str):
                found = f"{row[key]!r}"  # YAML reads 1950 and 2026-01-01 as a number and a date
            raise WorkbenchError(f"{place}: expected a text in '{key}', found {found or 'nothing'}", EXPECTED)
    for key in ("subject", "target_true", "relation"):
        if row.get(key) is not None and (not isinstance(row[key], str) or not row[key].strip()):
            raise WorkbenchError(f"{place}: expected a text in '{key}', found {row[key]!r}", EXPECTED)
    subject: str | None = row.get("subject")
    prompt = _prompt(row["prompt"], subject, place)
    given = row.get("id")
    if given is not None and not isinstance(given, (str, int)):
        raise WorkbenchError(f"{place}: expected a text or a number in 'id', found {given!r}", EXPECTED)
    name = str(given) if given is not None else json_digest([prompt, subject])[:8]
    paraphrases = tuple(_filled(text, subject, place) for text in _texts(row, "paraphrases", place))
    return Fact(
        name, prompt, subject, row["target"], row.get("target_true"), row.get("relation") or prompt, paraphrases,
        tuple(_probes(row, "neighbours", place)), tuple(_probes(row, "portability", place)), place,
    )  # fmt: skip


def _prompt(prompt: str, subject: str | None, place: str) -> str:
    """The prompt with its slot. Errors: a slot without a subject, a subject that is not there exactly once."""
    slots = prompt.count(SLOT)
    if subject is None:
        if slots:
            raise WorkbenchError(f"{place}: the prompt has {SLOT}, and there is no 'subject'", EXPECTED)
        return prompt
    if slots == 1:
        return prompt
    if slots:
        raise WorkbenchError(f"{place}: expected {SLOT} once in the prompt, found it {slots} times", EXPECTED)
    count = prompt.count(subject)
    if count != 1:
        found = "is not in the prompt" if not count else f"stands {count} times in the prompt"
        raise WorkbenchError(
            f"{place}: the subject {subject!r} {found} {prompt!r}", f"Write {SLOT} once where the subject stands in the prompt."
        )
    return prompt.replace(subject, SLOT)


def _filled(text: str, subject: str | None, place: str) -> str:
    if SLOT in text and subject is None:
        raise WorkbenchError(f"{place}: a paraphrase has {SLOT}, and there is no 'subject'", EXPECTED)
    return text.replace(SLOT, subject or "")


def _texts(row: Mapping[str, Any], key: str, place: str) -> list[str]:
    value = row.get(key) or []
    value = [value] if isinstance(value, str) else value
    if not isinstance(value, list) or not all(isinstance(text, str) and text.strip() for text in value):
        raise WorkbenchError(f"{place}: expected a list of texts in '{key}', found {value!r}", EXPECTED)
    return value


def _probes(row: Mapping[str, Any], key: str, place: str) -> Iterator[Probe]:
    value = row.get(key) or []
    if not isinstance(value, list):
        raise WorkbenchError(f"{place}: expected a list in '{key}', found {value!r}", EXPECTED)
    for entry in value:
        prompt, target = (entry, None) if isinstance(entry, str) else (None, None)
        if isinstance(entry, Mapping):
            refuse_unknown(entry, ("prompt", "target"), place, f"an entry of '{key}'")
            prompt, target = entry.get("prompt"), entry.get("target")
        needs = key == "portability" and target is None
        if not isinstance(prompt, str) or not prompt.strip() or needs or not (target is None or isinstance(target, str)):
            wanted = '{"prompt", "target"}' if key == "portability" else 'a prompt, or {"prompt", "target"},'
            raise WorkbenchError(f"{place}: expected {wanted} in '{key}', found {entry!r}", EXPECTED)
        yield Probe(prompt, target)
