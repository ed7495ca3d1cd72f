"""Files of the score store: rows of items, and the journal of a task that is being scored."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workbench.ground.errors import WorkbenchError, size
from workbench.ground.files import bytes_digest, gunzip, write_bytes
from workbench.ground.jsondoc import parse
from workbench.scores.suite import MARGIN

Row = dict[str, Any]
Rows = dict[str, list[Row]]  # task -> one row per item, in the plan's order
SHARES = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match", "em")
"""Metrics of lm-eval whose scores of items, and so their means, lie in [0, 1]."""
_LONGEST_ROW = 64 << 20


def is_number(value: Any) -> bool:
    """Return True if a JSON value is a finite number; true and false are not numbers."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= 1.7976931348623157e308


def wrong_value(metric: str, value: Any) -> str | None:
    """Describe the expected value of a metric if the given one is impossible, else return None.

    Args:
        metric: Name as in the stored rows: `acc`, `exact_match,strict`.
        value: A number, [numerator, weight] for a ratio of sums, or [contribution] to a metric of the whole corpus.
    """
    if isinstance(value, list):
        well_formed = len(value) in (1, 2) and all(map(is_number, value)) and (len(value) == 1 or value[1] >= 0)
        return None if well_formed else "a finite number and a weight of at least 0"
    if not is_number(value):
        return "a finite number"
    if metric.partition(",")[0] in SHARES and not 0 <= value <= 1:
        return "a number from 0 to 1"
    return None


def rows_text(rows: Mapping[str, Iterable[Row]]) -> bytes:
    """Return rows as JSON lines, task after task; the rows' digest is computed from these bytes."""
    lines = [row for task in rows.values() for row in task]
    # A call a row costs more than the row. In strings quotes are escaped, so that this text stands between two rows only.
    between, start = '}, {"task": ', '}\n{"task": '
    text = json.dumps(lines, ensure_ascii=False)[1:-1]
    if text.count(between) != len(lines) - 1:
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in lines).encode()
    return f"{text.replace(between, start)}\n".encode()


def write_rows(path: Path, data: bytes) -> None:
    """Write the lines of `rows_text`, or other data, compressed, with equal bytes for equal data."""
    write_bytes(path, gzip.compress(data, 6, mtime=0))


@dataclass(frozen=True)
class Packed:
    """Rows as a file of the store holds them, in little memory: their compressed lines, and the digest of these lines."""

    data: bytes
    digest: str

    @classmethod
    def of(cls, rows: Mapping[str, Iterable[Row]]) -> Packed:
        """Pack rows."""
        text = rows_text(rows)
        return cls(gzip.compress(text, 6, mtime=0), bytes_digest(text))


def read_rows(path: Path, digest: str | None, hint: str, *, answers: bool) -> Rows:
    """Read rows of items, and check them.

    Args:
        path: A `.jsonl.gz` file.
        digest: Expected digest of the lines, from the scores document; None to skip the comparison.
        hint: Hint of the errors.
        answers: True for rows with a configuration's metrics and answers, False for rows with the items' prompts and gold answers.

    Raises:
        WorkbenchError: If the file is missing, truncated or not a gzip file, a line is not a row of this kind, a value is impossible, or the
            digest differs.
    """
    data = _unpack(path, hint)
    rows: Rows = {}
    for number, line in enumerate(io.BytesIO(data), 1):
        if line := line.rstrip(b"\n"):
            place = f"{path}:{number}"
            if len(line) > _LONGEST_ROW:
                raise WorkbenchError(f"{place}: a row of {size(len(line))}, expected at most {size(_LONGEST_ROW)}", hint)
            row = parse(line, place, hint)
            problem = _problem(row, answers)
            if problem:
                raise WorkbenchError(f"{place}: {problem}", hint)
            rows.setdefault(row["task"], []).append(row)
    if digest is not None and bytes_digest(data) != digest:
        raise WorkbenchError(
            f"{path}: the rows changed after scoring: their digest is {bytes_digest(data)}, expected {digest}", hint
        )
    return rows


def unpacked(path: Path) -> bytes | None:
    """Return the content of a compressed file, or None if the file is missing or damaged."""
    try:
        return _unpack(path, "")
    except WorkbenchError:
        return None


def unpacked_json(path: Path) -> Any:
    """Return the JSON of a compressed file, or None if the file is missing or damaged and its content must be computed again."""
    try:
        return parse(_unpack(path, "").decode("utf-8"), str(path))
    except (WorkbenchError, UnicodeDecodeError):
        return None


def _unpack(path: Path, hint: str) -> bytes:
    """Return the content of a compressed file; raise WorkbenchError with `hint` if it cannot be read."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise WorkbenchError(f"{path}: the file does not exist, but the scores refer to it", hint) from None
    except OSError as error:
        raise WorkbenchError(f"{path}: cannot be read: {error}", hint) from error
    return gunzip(data, str(path), hint)


def _problem(row: Any, answers: bool) -> str | None:
    """Return the reason why a JSON value is not a row of the store, or None."""
    if not isinstance(row, dict):
        return f"expected a JSON object, found {type(row).__name__}"
    for key in ("task", "id", *(() if answers else ("cluster", "prompt"))):
        if not isinstance(row.get(key), str):
            return f"expected a string under '{key}', found {json.dumps(row.get(key))[:60]}"
    if not answers:
        choices, gold = row.get("choices"), row.get("gold")
        if choices is not None and not (isinstance(choices, list) and all(isinstance(c, str) for c in choices)):
            return f"expected a list of strings under 'choices', found {json.dumps(choices)[:60]}"
        well_formed = (
            isinstance(gold, (int, str)) or gold is None or (isinstance(gold, list) and all(isinstance(g, int) for g in gold))
        )
        return None if well_formed else f"expected a number or a string under 'gold', found {json.dumps(gold)[:60]}"
    metrics, values = row.get("metrics"), row.get("loglikelihoods")
    if not isinstance(metrics, dict):
        return f"expected an object under 'metrics', found {json.dumps(metrics)[:60]}"
    for metric, value in metrics.items():
        if expected := wrong_value(metric, value):
            return f"item '{row['id']}' of '{row['task']}': {metric} is {json.dumps(value)[:60]}, expected {expected}"
    if values is not None and not (isinstance(values, list) and all(map(is_number, values))):
        return f"expected a list of numbers under 'loglikelihoods', found {json.dumps(values)[:60]}"
    if row.get("response") is not None and not isinstance(row["response"], str):
        return f"expected a string under 'response', found {json.dumps(row['response'])[:60]}"
    return None


class Journal:
    """Answers by request number, one JSON line each, appended while a task is scored.

    Reading stops at the first line that is not an answer, for instance because the process was killed while writing; the requests of this
    and all later lines are scored again.
    """

    def __init__(self, path: Path, digest: str) -> None:
        self.path = path
        self.done: dict[int, Any] = {}
        lines = path.read_bytes().decode("utf-8", "replace").split("\n") if path.is_file() else []
        lines = lines[:-1] if lines and not lines[-1] else lines
        complete = []
        for line in lines:
            answer = _answered(line)
            if answer is None:
                break
            complete.append(line)
            self.done[answer[0]] = answer[1]
        if self.done.pop(-1, digest) != digest:  # another configuration whose digest starts with the same digits
            complete, self.done = [], {}
        if not complete or len(complete) < len(lines):
            write_bytes(path, "".join(f"{line}\n" for line in complete or [json.dumps([-1, digest])]).encode())

    def add(self, answers: Mapping[int, Any]) -> None:
        """Append answers to the file."""
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps([number, answer], ensure_ascii=False) + "\n" for number, answer in answers.items())


def _answered(line: str) -> tuple[int, Any] | None:
    """Parse a line of the journal as (request number, answer); None for other lines."""
    try:
        entry = parse(line, "")
    except WorkbenchError:
        return None
    if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[0], int) or isinstance(entry[0], bool):
        return None
    number, answer = entry
    likelihood = isinstance(answer, list) and len(answer) == 2 and is_number(answer[0]) and isinstance(answer[1], (bool, int))
    texts = isinstance(answer, list) and all(isinstance(text, str) for text in answer)
    return (number, answer) if likelihood or texts or isinstance(answer, str) else None


def margin_of(row: Row, item: Row) -> float | None:
    """Return the margin: the largest log-likelihood of the gold choices minus the largest of the other choices.

    It is read from the row's metrics or computed from its log-likelihoods. The result is None if the gold choice is not known.
    """
    stored = row["metrics"].get(MARGIN)
    if stored is not None:
        return float(stored)
    values, choices, right = row.get("loglikelihoods"), item.get("choices"), gold_of(item)
    if not values or not choices or len(values) != len(choices):
        return None
    best = [v for i, v in enumerate(values) if i in right]
    others = [v for i, v in enumerate(values) if i not in right]
    return float(max(best) - max(others)) if best and others else None


def gold_of(item: Row) -> set[int]:
    """Return the indices of an item's gold choices; empty if they are not known."""
    gold = item.get("gold")
    if isinstance(gold, str) and gold.startswith("["):  # several gold choices as a JSON list
        with contextlib.suppress(ValueError, RecursionError):
            gold = json.loads(gold)
    return {g for g in (gold if isinstance(gold, list) else [gold]) if isinstance(g, int)}
