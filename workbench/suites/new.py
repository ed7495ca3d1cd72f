"""A suite from a file of items: data with ids and clusters, a task file for lm-eval and a suite file."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict

from workbench.evaluate.gate import LOCALDATA
from workbench.facts.facts import joined
from workbench.ground import jsondoc
from workbench.ground.errors import UsageError, WorkbenchError, shell
from workbench.ground.files import write_bytes
from workbench.ground.project import suggestion
from workbench.ground.recognize import expecting
from workbench.ground.results import JsonObject, Number, absent
from workbench.scores.suite import SUITE_NAME
from workbench.suites.check import SuiteReport

Kind = Literal["choice", "exact", "text"]
KINDS: dict[str, str] = {
    "choice": '{"prompt": "…", "choices": ["…", "…"], "answer": "…"}',
    "exact": '{"prompt": "…", "answer": "…"}',
    "text": '{"text": "…"}',
}
"""Kind of items -> an example row."""
ROLES = ("skill", "retention", "guarded", "other")
_LISTED = 20  # bad rows that one error lists
_LONGEST_ANSWER = 200  # bytes of an answer that a model generates
_ROOM = 8  # tokens more than the longest answer can have

TASK = """\
# {rows} of {source}; `workbench suite check {suite}` checks them
task: {task}
custom_dataset: !function localdata.jsonl
dataset_kwargs: {{data_files: {{test: data/{suite}.jsonl}}}}
{kind}metadata: {{version: 1.0}}
"""
CHOICE = """\
output_type: multiple_choice     # the log-likelihood of each choice after the prompt
test_split: test
num_fewshot: 0
doc_to_text: prompt
doc_to_choice: choices
doc_to_target: gold
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
EXACT = """\
output_type: generate_until      # the first line that the model writes is the answer
test_split: test
num_fewshot: 0
doc_to_text: prompt
doc_to_target: answer
generation_kwargs: {{until: ["\\n"], max_gen_toks: {tokens}, do_sample: false}}
filter_list:
  - name: line
    filter:
      - {{function: regex, regex_pattern: '^\\s*(.*?)\\s*$'}}
      - {{function: take_first}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""
TEXT = """\
output_type: loglikelihood_rolling   # how well the model predicts the text
test_split: test
num_fewshot: 0
doc_to_text: ""
doc_to_target: text
metric_list:
  - {metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}
"""
SUITE = """\
# workbench eval RECIPE --suite {plain}
suite: {suite}
description: {description}
tasks: [{task}]
primary: {{{task}: {primary}}}
{chance}cluster: {cluster}
baseline: base
alpha: 0.05
roles: {{{task}: {role}}}
"""
PRIMARY = {"choice": "acc", "exact": "exact_match", "text": "bits_per_byte"}


class _Row(TypedDict, total=False):
    """An item as the task reads it: a text, a prompt with an answer, or a prompt with choices."""

    id: str
    cluster: str
    text: str
    prompt: str
    answer: str
    choices: list[str]
    gold: int


class NewSuite(JsonObject):
    """A suite that was written."""

    suite: str
    """Name of the suite and of its task."""
    kind: Kind
    """Kind of its items."""
    files: list[str]
    """The files that were written."""
    items: int
    """Number of items."""
    clusters: int
    """Number of clusters."""
    cluster: str
    """Field that says which items belong together; "id" if every item stands alone."""
    chance: Number | None
    """Score of guessing; null for texts."""
    dropped: int | None = absent()
    """Number of rows that were dropped because an earlier one has the same question."""


class CreatedSuite(NewSuite):
    """A suite that was created from a file of items. With a failed check, the exit code is 3."""

    check: SuiteReport
    """Checks of the suite, as `suite check` makes them."""


def new_suite(
    name: str,
    data: Path,
    kind: Kind,
    project: Path,
    *,
    cluster: str | None = None,
    role: str = "skill",
    flags: Collection[str] = (),
) -> NewSuite:
    """Write the files of a suite with one task.

    Args:
        name: Name of the suite and of its task.
        data: File of items, one JSON object a line.
        kind: Kind of the items.
        project: Project folder, below which evals/ is written.
        cluster: Field of the rows that says which items belong together; default: "cluster" if a row has it.
        role: Role of the task in comparisons.
        flags: "force" to replace the files of a suite of this name, "drop" to keep the first of several rows with the same question.

    Raises:
        WorkbenchError: If the name is taken or invalid, or a row is bad. The message names every bad row by file and line.
    """
    if not re.fullmatch(SUITE_NAME, name):
        raise UsageError(
            f"'{name}': expected a name of letters, digits, '.', '_' and '-'", "Example: workbench suite new capitals …"
        )
    folder = project / "evals"
    task_file, data_file = folder / "tasks" / f"{name}.yaml", folder / "tasks" / "data" / f"{name}.jsonl"
    suite_file, reader = folder / "suites" / f"{name}.yaml", folder / "tasks" / "localdata.py"
    with expecting(data, "a file of items", "items", "texts", *(["facts"] if data.suffix == ".jsonl" else [])):
        rows, field, dropped = _rows(data, kind, cluster, "drop" in flags)
    chance = sum(1 / len(row["choices"]) for row in rows) / len(rows) if kind == "choice" else 0.0 if kind == "exact" else None
    described = f"{len(rows)} item{'s' if len(rows) > 1 else ''}"
    body = CHOICE if kind == "choice" else TEXT if kind == "text" else EXACT.format(tokens=_tokens(rows))
    if kind == "choice" and all(joined(row["prompt"], choice) == choice for row in rows for choice in row["choices"]):
        body += 'target_delimiter: ""\n'  # lm-eval's own is a space
    quoted = _scalar(name)
    texts = {
        data_file: "".join(json.dumps(row) + "\n" for row in rows),  # line separators within texts stay escaped
        task_file: TASK.format(rows=described, source=_one_line(data.name), suite=name, task=quoted, kind=body),
        suite_file: SUITE.format(
            plain=name,
            suite=quoted,
            task=quoted,
            description=json.dumps(f"{described} of {_one_line(data.name)}", ensure_ascii=False),
            primary=PRIMARY[kind],
            chance=f"chance: {{{quoted}: {chance:.6g}}}\n" if kind == "choice" else "",
            cluster=field,
            role=role,
        ),
    }
    # A file with this content is what an interrupted call has written.
    taken = [p for p, text in texts.items() if p.exists() and not (p.is_file() and p.read_bytes() == text.encode())]
    if taken and "force" not in flags:
        shown = ", ".join(str(path.relative_to(project)) for path in taken)
        raise UsageError(f"{shown}: already exists", "Choose another name, or replace these files with --force.")
    if not reader.exists():
        texts[reader] = LOCALDATA
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, text.encode())
    clusters = len({row["cluster"] for row in rows})
    return NewSuite(
        suite=name,
        kind=kind,
        files=[str(path) for path in texts],
        items=len(rows),
        clusters=clusters,
        cluster=field,
        chance=chance,
        dropped=dropped or None,
    )


def _scalar(name: str) -> str:
    """Return a name as YAML; quoted where it could be read as a number or a Boolean."""
    words = ("y", "n", "yes", "no", "on", "off", "true", "false", "null")
    return name if re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", name) and name.lower() not in words else json.dumps(name)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _tokens(rows: Sequence[_Row]) -> int:
    """Return how many tokens an answer may have: a token is a byte or more."""
    return max(len(row["answer"].encode()) for row in rows) + _ROOM


def _rows(data: Path, kind: Kind, cluster: str | None, drop: bool) -> tuple[list[_Row], str, int]:
    """Return the rows as the task reads them, the field of the suite that holds their clusters, and the number of dropped duplicates."""
    if not data.is_file():
        raise UsageError(f"{data}: no such file of items", suggestion(data) or f"One row a line: {KINDS[kind]}")
    rows: list[_Row] = []
    problems: list[str] = []
    ids: dict[str, int] = {}
    asked: dict[str, int] = {}
    dropped, repeated = 0, False
    lines = list(jsondoc.lines(data, str(data)))
    by = cluster or ("cluster" if any(isinstance(row, dict) and "cluster" in row for _, row in lines) else None)
    for number, row in lines:
        place = f"{data}:{number}"
        try:
            made = _row(row, kind, by)
        except ValueError as error:
            problems.append(f"{place}: {error}")
            continue
        made["id"] = made["id"] or f"{data.stem}-{number:05d}"
        made["cluster"] = made["cluster"] or made["id"]
        question = json.dumps([made.get("text") or made["prompt"], sorted(made.get("choices", ()))])
        if drop and question in asked:
            dropped += 1
            continue
        for what, key, seen in (("id", made["id"], ids), ("question", question, asked)):
            if key in seen:
                shown = f" '{key}'" if what == "id" else ""
                problems.append(f"{place}: the same {what}{shown} as in line {seen[key]}")
                repeated = repeated or what == "question"
            seen.setdefault(key, number)
        rows.append(made)
    if problems:
        more = [f"{data}: {len(problems) - _LISTED} more bad rows"] if len(problems) > _LISTED else []
        also = " --drop-duplicates keeps the first row of each question." if repeated else ""
        raise WorkbenchError("\n".join([*problems[:_LISTED], *more]), f"A row for --kind {kind}: {KINDS[kind]}{also}")
    if not rows:
        raise WorkbenchError(f"{data}: no items", f"One row a line: {KINDS[kind]}")
    return rows, "cluster" if by else "id", dropped


def _row(row: Any, kind: Kind, cluster: str | None) -> _Row:
    """Return one row as the task reads it."""
    if not isinstance(row, dict):
        raise ValueError(f"expected an object, found {jsondoc.kind(row)}")
    made: _Row = {"id": _label(row, "id"), "cluster": _label(row, cluster) if cluster else ""}
    if cluster and not made["cluster"]:
        raise ValueError(f"no '{cluster}', which says which items belong together; give it to every row or to none")
    if kind == "text":
        return {**made, "text": _text(row, "text")}
    made["prompt"] = _prompt(row)
    if kind == "exact":
        return {**made, "answer": _answer(row)}
    choices = row.get("choices")
    if not isinstance(choices, list) or not all(isinstance(c, str) and c.strip() for c in choices):
        raise ValueError("'choices' must be a list of texts that are not blank" if "choices" in row else "no 'choices'")
    if len(choices) < 2:
        raise ValueError(f"{len(choices)} choice{'' if len(choices) == 1 else 's'}, expected two or more")
    if twice := next((c for c in choices if choices.count(c) > 1), None):
        raise ValueError(f"the choice {_shown(twice)} stands twice")
    return {**made, "choices": choices, "gold": _gold(row, choices)}


def _label(row: Mapping[str, object], key: str) -> str:
    """Return an id or a cluster as text; empty if there is none."""
    value = row.get(key)
    if value is None or value == "":
        return ""
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise ValueError(f"'{key}' must be a text or a whole number, found {jsondoc.kind(value)}")
    return str(value)


def _text(row: Mapping[str, object], key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"no '{key}'" if key not in row else f"'{key}' must be a text that is not blank")
    return value


def _prompt(row: Mapping[str, object]) -> str:
    """Return the prompt: `prompt` as it stands, or `question` with a cue for the answer."""
    keys = [key for key in ("prompt", "question") if key in row]
    if len(keys) != 1:
        raise ValueError("both 'prompt' and 'question', expected one of them" if keys else "no 'prompt' and no 'question'")
    if keys == ["question"]:
        return f"Question: {_text(row, 'question').strip()}\nAnswer:"
    return _text(row, "prompt")


def _answer(row: Mapping[str, object]) -> str:
    """Return the answer that a model has to write."""
    value = row.get("answer")
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = json.dumps(value)
    if not isinstance(value, str) or not value.strip():
        raise ValueError("no 'answer'" if value is None else "'answer' must be a text that is not blank, or a number")
    answer = value.strip()
    if "\n" in answer:
        raise ValueError("the answer has several lines, but only the first line that the model writes is read")
    if len(answer.encode()) > _LONGEST_ANSWER:
        raise ValueError(f"the answer has more than {_LONGEST_ANSWER} bytes; exact matches of long texts say little")
    return answer


def _gold(row: Mapping[str, object], choices: Sequence[str]) -> int:
    """Return the index of the right choice, which a row gives as index, as text, or as a letter."""
    found = dict(_golds(row, choices))
    if not found:
        raise ValueError("no 'answer' and no 'gold'")
    if len(set(found.values())) > 1:
        raise ValueError("'answer' and 'gold' name different choices")
    return next(iter(found.values()))


def _golds(row: Mapping[str, object], choices: Sequence[str]) -> Iterator[tuple[str, int]]:
    for key in ("answer", "gold"):
        value = row.get(key)
        if value is None:
            continue
        if isinstance(value, int) and not isinstance(value, bool):
            if not 0 <= value < len(choices):
                raise ValueError(f"'{key}' is {value}, expected an index from 0 to {len(choices) - 1} or the text of a choice")
            yield key, value
        elif isinstance(value, str) and value in choices:
            yield key, choices.index(value)
        elif isinstance(value, str) and re.fullmatch(r"[A-Z]", value) and ord(value) - ord("A") < len(choices):
            yield key, ord(value) - ord("A")
        else:
            raise ValueError(f"'{key}' is {_shown(value)}, which is none of the {len(choices)} choices")


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}…"


def next_steps(made: NewSuite) -> list[str]:
    """Return the commands that use a new suite."""
    return [shell("workbench", "suite", "show", made.suite), f"workbench eval RECIPE --suite {shell(made.suite)}"]
