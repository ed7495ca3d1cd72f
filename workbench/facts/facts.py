"""Facts as users write them, and the rows of the files that hold them: jsonl, YAML, or a JSON list as in published benchmarks."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from workbench.ground import jsondoc, yamldoc
from workbench.ground.errors import WorkbenchError, refuse_unknown
from workbench.ground.files import json_digest, write_text
from workbench.ground.project import suggestion

ACTION = "action"
"""Field of rows that are no facts but remove one; see `stream`."""
FACTS = "facts.jsonl"
"""The file of facts of an edit or of a memory, in its directory."""
SUFFIXES = (".jsonl", ".json", ".yaml", ".yml")


@dataclass(frozen=True)
class FactRow:
    """One entry of a file.

    Attributes:
        number: Number of the row, starting at 1.
        place: file:line, or the row's number if several rows share a line.
        data: The row's unchecked content, of any type.
    """

    number: int
    place: str
    data: Any


def has_action(row: FactRow) -> bool:
    """Return True if a row of the project's own format has the field `action`."""
    return isinstance(row.data, Mapping) and ACTION in row.data and "target_new" not in row.data


def read_rows(path: Path, label: str, expected: str) -> list[FactRow]:
    """Read the rows of a file, in order.

    Args:
        path: A `.yaml` or `.yml` file with a list, a `.json` file with a list or one value per line, or any other file with one JSON
            value per line.
        label: The file's name in messages.
        expected: A sentence with an example of a row, for hints.

    Raises:
        WorkbenchError: If there is no such file, or if its content is not UTF-8, not JSON or YAML, or not a list.
    """
    if path.is_dir():
        raise WorkbenchError(f"{label}: is a directory, expected a facts file", f"One of {', '.join(SUFFIXES)}.")
    if not path.is_file():
        raise WorkbenchError(f"{label}: no such facts file", suggestion(path) or f"One of {', '.join(SUFFIXES)}.")
    if path.suffix in (".yaml", ".yml"):
        document = yamldoc.load(path, label)
        if not isinstance(document.data, list):
            raise WorkbenchError(f"{label}: expected a list of facts, found {type(document.data).__name__}", expected)
        return [FactRow(i + 1, f"{label}:{document.marks[(i,)][0]}", data) for i, data in enumerate(document.as_texts)]
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise WorkbenchError(f"{label}: not UTF-8 text (byte {error.start})", "Save the file as UTF-8.") from None
    if path.suffix == ".json" and text.lstrip().startswith("["):
        entries = list(_parse_list(text, label))
        # Places are unique: the line if every row has its own line, else the number of the row.
        own_lines = len({line for line, _ in entries}) == len(entries)
        return [
            FactRow(number, f"{label}:{line}" if own_lines else f"{label}, row {number}", data)
            for number, (line, data) in enumerate(entries, 1)
        ]
    return [FactRow(number, f"{label}:{line}", data) for number, (line, data) in enumerate(_parse_lines(text, label), 1)]


def _parse_lines(text: str, label: str) -> Iterator[tuple[int, Any]]:
    """Yield (line, value) for every line of JSON that is not blank."""
    hint = "Write one object per line, or a list in a .json file: [{…}, {…}]."
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, jsondoc.parse(line, f"{label}:{number}", hint)


def _parse_list(text: str, label: str) -> Iterator[tuple[int, Any]]:
    """Yield (line, value) for every element of a JSON list."""
    decoder, line, counted_to = json.JSONDecoder(parse_constant=jsondoc.refuse_constant), 1, 0
    position = _skip_blank(text, text.index("[") + 1)
    while text[position : position + 1] != "]":
        line, counted_to = line + text.count("\n", counted_to, position), position
        try:
            value, end = decoder.raw_decode(text, position)
        except RecursionError:
            raise WorkbenchError(f"{label}:{line}: not JSON: nested too deeply", "A list of objects: [{…}, {…}].") from None
        except ValueError as error:
            raise WorkbenchError(f"{label}:{line}: not JSON: {error}", "A list of objects: [{…}, {…}].") from None
        jsondoc.check(value, text[position:end].encode("utf-8", "surrogatepass"), f"{label}:{line}")
        yield line, value
        position = _skip_blank(text, end)
        if text[position : position + 1] == ",":
            position = _skip_blank(text, position + 1)
        elif text[position : position + 1] != "]":
            line += text.count("\n", counted_to, position)
            actual = repr(text[position : position + 10]) if position < len(text) else "the end of the file"
            raise WorkbenchError(f"{label}:{line}: expected , or ] after an entry, found {actual}", "The file may be incomplete.")


def _skip_blank(text: str, position: int) -> int:
    """Return the next position that is not white space."""
    while position < len(text) and text[position].isspace():
        position += 1
    return position


SLOT = "{subject}"
UNSPACED = re.compile(
    "["
    "\u0e00-\u0fff"  # Thai, Lao, Tibetan
    "\u1000-\u109f\u1780-\u17ff"  # Burmese, Khmer
    "\u2e80-\u312f\u3190-\u9fff"  # Chinese and Japanese with their punctuation, without Hangul: Korean writes spaces
    "\uf900-\ufaff\ufe30-\ufe4f\uff00-\uff9f"  # their compatibility, vertical and full-width forms
    "\U0001b000-\U0001b16f\U00020000-\U0003ffff"  # rare kana and characters
    "]"
)
"""A character of a script that writes no spaces between words."""
_OPEN = re.compile(r"""(?:[(\[{„¿¡@/\\]|(?:^|[\s(\[{])["#]|(?<!\d)(?<!\d\s)[$€£¥])\Z""")
"""A sign that stands before a word without a space; 27", C# and 12 € end what is before them, “ and » open a quotation in some languages only."""
EXPECTED = 'A fact is {"prompt": "The capital of {subject} is", "subject": "Atlantis", "target": "Poseidonis"}.'


@dataclass(frozen=True)
class Probe:
    """A prompt that tests an edit, and the correct answer; None stands for the base's own answer."""

    prompt: str
    target: str | None = None

    @property
    def continuation(self) -> str:
        """The answer with the space that separates it from the prompt; empty if the base's own answer is correct."""
        return joined(self.prompt, self.target) if self.target is not None else ""


@dataclass(frozen=True)
class Fact:
    """A prompt and the answer that an edited model should give.

    Attributes:
        id: Identifies the fact in records; by default a digest of prompt and subject.
        prompt: A text with `{subject}` once, or a text without a subject.
        subject: The subject of the fact.
        target: The continuation of the prompt that the edited model should give.
        target_true: The answer that is true in the world, or that the base gives.
        relation: The relation of the subject to the target; the prompt itself if the file names none.
        paraphrases: Other wordings of the prompt, with the subject filled in.
        neighbours: Prompts whose answers must not change.
        portability: Prompts whose answers follow from the new fact.
        same_subject: Prompts that ask something else about the subject, whose answers must not change.
        translations: The prompt in other languages, with the target in these.
        place: file:line, for messages.
        aliases: Other right wordings of the target, which count in generated answers only.
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
    aliases: tuple[str, ...] = ()
    same_subject: tuple[Probe, ...] = ()
    translations: tuple[Probe, ...] = ()

    @property
    def text(self) -> str:
        """The prompt with the subject filled in."""
        return self.prompt.replace(SLOT, self.subject or "")

    @property
    def continuation(self) -> str:
        """The target with the space that separates it from the prompt."""
        return joined(self.text, self.target)

    @property
    def span(self) -> tuple[int, int] | None:
        """The subject's position in `text`, as (start, end); None without a subject."""
        if self.subject is None:
            return None
        start = self.prompt.index(SLOT)
        return start, start + len(self.subject)

    def document(self) -> dict[str, object]:
        """Return the fact as a row of a facts file."""
        full = {
            "id": self.id,
            "prompt": self.prompt,
            "subject": self.subject,
            "target": self.target,
            "aliases": list(self.aliases),
            "target_true": self.target_true,
            "relation": self.relation,
            "paraphrases": list(self.paraphrases),
            **{
                key: [{"prompt": p.prompt, **({"target": p.target} if p.target is not None else {})} for p in getattr(self, key)]
                for key in ("translations", "neighbours", "same_subject", "portability")
            },
        }
        return {key: value for key, value in full.items() if value}


def joined(prompt: str, answer: str) -> str:
    """Return an answer with the space that separates it from a prompt, if one belongs there.

    None does beside white space, after an opening bracket, quotation mark or sign, and in scripts without spaces between words: after their
    characters and punctuation, and before them in a prompt that has some. An English prompt keeps its space before 東京.
    """
    unspaced = (
        _OPEN.search(prompt) or UNSPACED.fullmatch(prompt[-1:]) or (UNSPACED.fullmatch(answer[:1]) and UNSPACED.search(prompt))
    )
    return answer if unspaced or prompt[-1:].isspace() or answer[:1].isspace() else " " + answer


def write_facts(path: Path, facts: list[Fact]) -> None:
    """Write facts as a jsonl file that `read_facts` reads back unchanged."""
    write_text(path, facts_text(facts))


def facts_text(facts: Iterable[Fact]) -> str:
    """Return the text of a jsonl file of facts."""
    return "".join(json.dumps(fact.document(), ensure_ascii=False) + "\n" for fact in facts)


def fact_of(row: Any, place: str) -> Fact:
    """Return the fact that a row of plain data describes.

    Args:
        row: The row, in the project's own format.
        place: file:line, for messages.

    Raises:
        WorkbenchError: If the row is invalid; see `read_facts`.
    """
    if isinstance(row, Mapping) and "prompt" in row and "target" in row:
        refuse_unknown(row, [field.name for field in fields(Fact) if field.name != "place"], place, "a fact")
    for key in ("prompt", "target"):
        if not isinstance(row, Mapping) or not isinstance(row.get(key), str) or not row[key].strip():
            if not isinstance(row, Mapping):
                raise WorkbenchError(f"{place}: expected a JSON object, one in each row, found {type(row).__name__}", EXPECTED)
            actual = ", ".join(map(str, row))
            if key in row and not isinstance(row[key], str):
                actual = f"{row[key]!r}"  # YAML reads 1950 and 2026-01-01 as a number and a date
            raise WorkbenchError(f"{place}: expected a text in '{key}', found {actual or 'nothing'}", EXPECTED)
    for key in ("subject", "target_true", "relation"):
        if row.get(key) is not None and (not isinstance(row[key], str) or not row[key].strip()):
            raise WorkbenchError(f"{place}: expected a text in '{key}', found {row[key]!r}", EXPECTED)
    subject: str | None = row.get("subject")
    prompt = _prompt(row["prompt"], subject, place)
    identifier = row.get("id")
    if identifier is not None and not isinstance(identifier, (str, int)):
        raise WorkbenchError(f"{place}: expected a text or a number in 'id', found {identifier!r}", EXPECTED)
    name = str(identifier) if identifier is not None else json_digest([prompt, subject])[:8]
    paraphrases = tuple(_fill_subject(text, subject, place) for text in _texts(row, "paraphrases", place))
    return Fact(
        name,
        prompt,
        subject,
        row["target"],
        row.get("target_true"),
        row.get("relation") or prompt,
        paraphrases,
        place=place,
        aliases=_aliases(row, place),
        translations=tuple(replace(p, target=p.target or row["target"]) for p in _probes(row, "translations", place)),
        neighbours=tuple(_probes(row, "neighbours", place)),
        same_subject=tuple(_probes(row, "same_subject", place)),
        portability=tuple(_probes(row, "portability", place)),
    )


def _aliases(row: Mapping[str, object], place: str) -> tuple[str, ...]:
    """Return the target's other wordings, without the target itself."""
    texts, true = _texts(row, "aliases", place), row.get("target_true")
    if isinstance(true, str) and (same := next((text for text in texts if folded(text) == folded(true)), None)):
        raise WorkbenchError(
            f"{place}: the alias {same!r} is the 'target_true', so that the old answer would count as right",
            "Remove it from 'aliases'.",
        )
    return tuple(text for text in dict.fromkeys(texts) if text != row["target"])


def folded(text: str) -> str:
    """Normalize a text for comparison: Unicode form, case, white space and final punctuation."""
    normalized = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return normalized.rstrip(" .,:;?!") or normalized


def name_key(name: str) -> str:
    """Normalize a name for comparison: as `folded`, and "the Gambia" is "Gambia"."""
    return folded(name).removeprefix("the ")


def _prompt(prompt: str, subject: str | None, place: str) -> str:
    """Return the prompt with `{subject}` in the place of its subject."""
    slots = prompt.count(SLOT)
    if subject is None:
        if slots:
            raise WorkbenchError(f"{place}: the prompt has {SLOT}, but there is no 'subject'", EXPECTED)
        return prompt
    if slots == 1:
        return prompt
    if slots:
        raise WorkbenchError(f"{place}: expected {SLOT} once in the prompt, found {slots} times", EXPECTED)
    count = prompt.count(subject)
    if count != 1:
        problem = "is not in the prompt" if not count else f"occurs {count} times in the prompt"
        raise WorkbenchError(
            f"{place}: the subject {subject!r} {problem} {prompt!r}", f"Write {SLOT} once in the prompt instead of the subject."
        )
    return prompt.replace(subject, SLOT)


def _fill_subject(text: str, subject: str | None, place: str) -> str:
    """Return a text with the subject in place of its slot."""
    if SLOT in text and subject is None:
        raise WorkbenchError(f"{place}: {text!r} has {SLOT}, but there is no 'subject'", EXPECTED)
    return text.replace(SLOT, subject or "")


def _texts(row: Mapping[str, object], key: str, place: str) -> list[str]:
    """Return a field that holds a text or a list of texts."""
    value = row.get(key) or []
    value = [value] if isinstance(value, str) else value
    if not isinstance(value, list) or not all(isinstance(text, str) and text.strip() for text in value):
        raise WorkbenchError(f"{place}: expected a list of texts in '{key}', found {value!r}", EXPECTED)
    return value


def _probes(row: Mapping[str, object], key: str, place: str) -> Iterator[Probe]:
    """Yield the test prompts in a field, with their targets."""
    value, subject = row.get(key) or [], row.get("subject")
    assert subject is None or isinstance(subject, str)  # `fact_of` has checked it
    if not isinstance(value, list):
        raise WorkbenchError(f"{place}: expected a list in '{key}', found {value!r}", EXPECTED)
    for entry in value:
        prompt, target = (entry, None) if isinstance(entry, str) else (None, None)
        if isinstance(entry, Mapping):
            refuse_unknown(entry, ("prompt", "target"), place, f"an entry of '{key}'")
            prompt, target = entry.get("prompt"), entry.get("target")
        lacks_target = key == "portability" and target is None
        if not isinstance(prompt, str) or not prompt.strip() or lacks_target or not (target is None or isinstance(target, str)):
            expected = '{"prompt", "target"}' if key == "portability" else 'a prompt, or {"prompt", "target"},'
            raise WorkbenchError(f"{place}: expected {expected} in '{key}', found {entry!r}", EXPECTED)
        yield Probe(_fill_subject(prompt, subject, place), target)


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
    "same-subject",
    "typo",
    "lower-case",
    "behind-text",
    "translated",
    "chat",
    "generated",
    "generated-paraphrase",
    "entropy",
    "text",
]
FACT_KINDS: tuple[FactKind, ...] = get_args(FactKind)
