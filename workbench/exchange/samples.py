"""Conversion of lm-eval's `samples_TASK_DATE.jsonl` files to rows and items of the score store.

The format is that of lm-eval 0.4.13 (`EvaluationTracker.save_results_samples`): one line per document and filter, with `arguments` as
{"gen_args_0": {"arg_0": context, "arg_1": continuation or settings}}, `resps` as nested lists of strings, `target` as a string,
and one key per metric, named in `metrics`.
"""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from operator import is_not
from pathlib import Path
from typing import Any

from workbench.exchange.reported import Reported
from workbench.ground.errors import WorkbenchError, nearest
from workbench.ground.files import bytes_digest
from workbench.ground.jsondoc import parse, text_of
from workbench.scores.files import SHARES, Row, margin_of, wrong_value
from workbench.scores.plan import item_ids
from workbench.scores.statistics import RATIOS, Compute, UndefinedError, brier_score, codes
from workbench.scores.store import Metric
from workbench.scores.suite import MARGIN
from workbench.scores.tasks import AGGREGATIONS, BRIER, MEANS, metric_name

_ASKED, _ANSWERED = ("doc_id", "doc", "target", "arguments"), ("resps", "filter", "metrics")
_UNREAD = (*_ASKED, "filtered_resps", "doc_hash", "prompt_hash", "target_hash")
_EXPECTED = "Expected a file written by lm_eval --log_samples (0.4.13)."
_OWN = "is aggregated by the task's own function, which is not in the files"
_NUMBER = re.compile(r"-?[0-9]{1,9}")


@dataclass(frozen=True, slots=True)
class Document:
    """Hold what a line of a file of samples asks; runs on the same documents share it.

    Attributes:
        requests: Context and continuation or settings, without unconditional requests (acc_mutual_info).
        kind: lm-eval's output type.
        hashes: Hashes of the document, the requests and the target.
    """

    doc_id: int
    doc: Any
    target: object
    requests: list[list[object]]
    kind: str
    hashes: list[str]

    @classmethod
    def of(cls, line: Mapping[str, Any]) -> Document:
        """Read the document of a line."""
        requests = [list(request.values()) for request in line["arguments"].values()]
        requests = [request for request in requests if request[0] != "" or len(requests) == 1]
        kind = "multiple_choice" if len(requests) > 1 else "loglikelihood"
        if len(requests[0]) < 2:
            kind = "loglikelihood_rolling"
        elif isinstance(requests[0][1], Mapping):
            kind = "generate_until"
        parts = (line["doc"], line["arguments"], line["target"])
        hashes = [bytes_digest(json.dumps(part, sort_keys=True).encode())[:16] for part in parts]
        return cls(line["doc_id"], line["doc"], line["target"], requests, kind, hashes)


Answered = tuple[Document, Mapping[str, Any]]
"""A line of a file of samples: the document, and a mapping with the model's responses and a value for each metric."""


@dataclass
class Seen:
    """Hold what the last file of samples of a task asked, so that the next run on the same documents shares it."""

    documents: dict[str, Document] = field(default_factory=dict)
    """Documents by the digest of their text."""
    asked: tuple[str | None, list[Document], list[list[str | None]], list[Row]] = (None, [], [], [])
    """The field of clusters; the documents in order; their names, clusters and hashes; their items."""


@dataclass(frozen=True)
class TaskSamples:
    """The samples of a task.

    Attributes:
        kind: lm-eval's output type.
        metrics: Means and ratios; the first one is the default primary metric.
        ratios: Aggregation by metric, for metrics that are no means.
        items: Prompts, choices and gold answers.
        rows: Answers and metrics, in the order of `items`.
        identity: Content that must be equal for two runs to be comparable.
        notes: Metrics that were ignored, with the reason.
    """

    task: str
    file: Path
    kind: str
    metrics: tuple[str, ...]
    ratios: Mapping[str, str]
    items: list[Row]
    rows: list[Row]
    identity: list[Any]
    notes: tuple[str, ...]
    reported: Reported

    @property
    def lower(self) -> list[str]:
        """Metrics where lower is better."""
        return [m for m in self.metrics if self.reported.is_higher(m) is False]


def read_samples(
    task: str,
    file: Path,
    cluster: str | None = None,
    reported: Reported | None = None,
    compute: Compute | None = None,
    seen: dict[str, Seen] | None = None,
) -> TaskSamples:
    """Read a file of samples, and compare its metrics with the results file of the same run.

    Args:
        task: Name of the task.
        file: The file.
        cluster: Field of the documents with their cluster; default: `cluster` if all documents have it, else each item is its own cluster.
        reported: Content of the results file.
        compute: Computes metrics of a whole corpus by lm-eval's functions; default: these are left out.
        seen: What the last file of each task asked; takes what this one asks.

    Raises:
        WorkbenchError: If the file is not a file of lm-eval's samples or is empty, filters cover different documents, no metric has a value
            that can be compared, documents lack the cluster field, or a metric differs from the results file.
    """
    reported, mine = reported or Reported(), Seen() if seen is None else seen.setdefault(task, Seen())
    lines = _lines(file, mine)
    filters = list(dict.fromkeys(line["filter"] for _, line in lines))
    by_filter = {f: {doc.doc_id: line for doc, line in lines if line["filter"] == f} for f in filters}
    documents = {doc.doc_id: doc for doc, line in lines if line["filter"] == filters[0]}
    first = by_filter[filters[0]]
    if any(other.keys() != first.keys() for other in by_filter.values()) or sum(map(len, by_filter.values())) != len(lines):
        raise WorkbenchError(
            f"{file}: a document occurs twice, or is missing under a filter ({len(lines)} lines, {len(first)} documents, {len(filters)} filters)",
            "The file comes from an interrupted or repeated run: run lm_eval again into an empty folder.",
        )
    docs = [documents[key] for key in sorted(first)]
    kinds = {doc.kind for doc in docs}  # a document of multiple choice may have a single one
    kind = "multiple_choice" if "multiple_choice" in kinds else kinds.pop()
    field, known, contents, items = mine.asked
    if field != cluster or len(known) != len(docs) or any(map(is_not, known, docs)):
        ids, clusters = _ids(docs, task), _clusters(docs, file, cluster)
        contents = [[i, c, *doc.hashes] for i, c, doc in zip(ids, clusters, docs, strict=True)]
        items = [_item(task, kind, i, c or i, doc) for i, c, doc in zip(ids, clusters, docs, strict=True)]
        mine.asked = cluster, docs, contents, items
    rows = [_answer(task, kind, item, (doc, first[doc.doc_id]), file) for item, doc in zip(items, docs, strict=True)]
    names: list[str] = []
    left_out: list[str] = []
    ratios: dict[str, str] = {}
    for filter_name, filtered in by_filter.items():
        sample = filtered[docs[0].doc_id] if filter_name == filters[0] else next(iter(filtered.values()))
        for metric in sample["metrics"]:
            name, how = metric_name(metric, filter_name, filters), reported.aggregation(metric)
            try:
                values = _values(metric, how, [filtered[doc.doc_id].get(metric) for doc in docs], items, compute)
                _agree(values, items, how, reported, f"{metric},{filter_name}", f"{file}: '{name}' of '{task}'")
            except UndefinedError as error:
                left_out.append(f"{name} {error}")
                continue
            names.append(name)
            if how not in MEANS and not isinstance(values[0], float):
                ratios[name] = how
            for row, value in zip(rows, values, strict=True):
                row["metrics"][name] = value
    if not names:
        raise WorkbenchError(
            f"{file}: no metric can be compared: {'; '.join(left_out) or 'the file has none'}",
            "Use a task with a metric such as acc, exact_match, f1, bleu or perplexity.",
        )
    if kind == "multiple_choice" and _add_margins(items, rows):
        names.append(MARGIN)
    notes = tuple(f"{task}: left out: {reason}" for reason in left_out)
    return TaskSamples(
        task, file, kind, tuple(names), ratios, items, rows, [task, kind, filters, names, contents], notes, reported
    )


def _values(metric: str, how: str, values: Sequence[Any], items: Sequence[Row], compute: Compute | None) -> list[Any]:
    """Return a metric's values in the rows of the items: numbers, [numerator, weight] of a ratio, or [contribution].

    A task's own aggregation is not in the files. Its metric is read as a mean, which `_agree` then compares.
    """
    shares = None if how in (*MEANS, *RATIOS) or not compute else compute(how, values, codes([item["cluster"] for item in items]))
    if shares is not None:
        return [[float(share)] for share in shares]
    numbers = [_value(metric, how, value) for value in values]
    if None in numbers:
        if how in AGGREGATIONS.values() and how not in (*MEANS, *RATIOS, "bypass"):
            raise UndefinedError(f"needs lm-eval's function '{how}': pip install 'brick-workbench[eval]'")
        if how not in (*AGGREGATIONS.values(), "mean"):
            raise UndefinedError(_OWN)
        raise UndefinedError("has no number for every item")
    return numbers


def _agree(values: Sequence[Any], items: Sequence[Row], how: str, reported: Reported, key: str, where: str) -> None:
    """Compare a metric with the results file, if there is one."""
    if reported.file is None:
        return
    metric, expected = key.partition(",")[0], reported.values.get(key)
    if expected is None:
        raise UndefinedError(f"is not in {reported.file.name}")
    unknown = how not in (*MEANS, *RATIOS) and isinstance(values[0], float)
    guessed = metric not in (*reported.aggregations, *AGGREGATIONS, *SHARES)
    kind = None if unknown or how in MEANS else how
    found = Metric.of(values, codes([item["cluster"] for item in items]), kind).value
    same = math.isclose(found, expected, rel_tol=1e-6, abs_tol=1e-9)
    difference = f"{reported.file.name} has {expected:.6g}, the {kind or 'mean'} of the samples is {found:.6g}"
    if unknown and (not same or len({*values}) == 1):  # equal values have equal means, smallest and largest values
        raise UndefinedError(f"{_OWN} ({difference})")
    if not same and guessed:
        raise UndefinedError(f"is not aggregated by the mean ({difference})")
    if not same:
        raise WorkbenchError(
            f"{where}: {difference} (aggregation: {how})",
            "The two files are not of one run: run lm_eval again into an empty folder.",
        )


def _lines(file: Path, seen: Seen) -> list[Answered]:
    """Return the parsed lines of a file of samples; all must have requests of one type."""
    lines, first_kind, documents, known = list[Answered](), "", dict[str, Document](), dict(seen.documents)
    # splitlines() would also split at other line separators, which JSON strings may contain.
    for number, text in enumerate(text_of(file).split("\n"), 1):
        if not text.strip():
            continue
        line, key = _sample(text, f"{file}:{number}", known)
        known[key] = documents[key] = line[0]  # each filter has a line for each document
        kind = line[0].kind.replace("multiple_choice", "loglikelihood")
        if first_kind not in ("", kind):
            raise WorkbenchError(
                f"{file}:{number}: requests are of type {kind}, in earlier lines of type {first_kind}", _EXPECTED
            )
        first_kind = kind
        lines.append(line)
    if not lines:
        raise WorkbenchError(f"{file}: the file has no lines", _EXPECTED)
    seen.documents = documents
    return lines


def _sample(text: str, place: str, seen: Mapping[str, Document]) -> tuple[Answered, str]:
    """Parse a line, and return it with the digest of what it asks. lm-eval writes that before the responses, so that it is parsed once for all runs."""
    asked, _, rest = text.partition(', "resps": ')
    key = bytes_digest(asked.encode())
    document, line = seen.get(key), None
    with suppress(WorkbenchError):  # a line that is not two such objects is parsed as a whole
        head = {} if document else parse(f"{asked}}}", place, infinite=True)
        if document or head.keys() == {*_ASKED}:
            line = parse(f'{{"resps": {rest}', place, infinite=True)
            line = {**head, **line} if line.keys().isdisjoint(_ASKED) else None
    if line is None:
        key, document, line = place, None, parse(text, place, _EXPECTED, infinite=True)
    if problem := _problem(line, document):
        raise WorkbenchError(f"{place}: {problem}", _EXPECTED)
    return (document or Document.of(line), {name: value for name, value in line.items() if name not in _UNREAD}), key


def _problem(line: Any, document: Document | None) -> str | None:
    """Return the reason why a JSON value is not a line of lm-eval's sample files, or None; what a known document asks is not checked again."""
    if missing := [key for key in (*(() if document else _ASKED), *_ANSWERED) if not isinstance(line, dict) or key not in line]:
        return f"missing keys: {', '.join(missing)}"
    if not document and (not isinstance(line["doc_id"], int) or isinstance(line["doc_id"], bool)):
        return f"expected a number under 'doc_id', found {json.dumps(line['doc_id'])[:60]}"
    if not isinstance(line["filter"], str):
        return f"expected a string under 'filter', found {json.dumps(line['filter'])[:60]}"
    if not isinstance(line["metrics"], list) or not all(isinstance(metric, str) for metric in line["metrics"]):
        return f"expected a list of names under 'metrics', found {json.dumps(line['metrics'])[:60]}"
    if not document:
        arguments = line["arguments"]
        if not isinstance(arguments, dict) or list(arguments) != [f"gen_args_{i}" for i in range(len(arguments))]:
            return f"expected gen_args_0, gen_args_1, ... under 'arguments', found {json.dumps(arguments)[:60]}"
        for request in arguments.values():
            parts = list(request.values()) if isinstance(request, dict) else []
            if not parts or not isinstance(parts[0], str) or not all(isinstance(part, (str, dict)) for part in parts[1:2]):
                return f"expected a context and a continuation or settings in 'arguments', found {json.dumps(request)[:60]}"
        if len({tuple(type(part) for part in list(request.values())[:2]) for request in arguments.values()}) > 1:
            return f"expected requests of one type in 'arguments', found {json.dumps(arguments)[:60]}"
        if len(arguments) != 1 and not any(next(iter(request.values())) for request in arguments.values()):
            return "'arguments' has no request with a context"
    for metric in line["metrics"]:
        value = _value(metric, AGGREGATIONS.get(metric, "mean"), line.get(metric))
        if value is not None and (expected := wrong_value(metric, value)):
            return f"document {document.doc_id if document else line['doc_id']}: {metric} is {json.dumps(value)[:60]}, expected {expected}"
    return None


def _ids(docs: Sequence[Document], task: str) -> list[str]:
    """Return the documents' `id` values if all documents have a unique one, else hashes of their content."""
    ids = [doc.doc.get("id") if isinstance(doc.doc, Mapping) else None for doc in docs]
    if None not in ids and len({str(i) for i in ids}) == len(ids):
        return [str(i) for i in ids]
    contents = [dict(doc.doc) if isinstance(doc.doc, Mapping) else {"doc": doc.doc} for doc in docs]
    return item_ids([{k: v for k, v in doc.items() if k != "id"} for doc in contents], task, bundled=True)


def _clusters(docs: Sequence[Document], file: Path, field: str | None) -> list[str | None]:
    """Return the cluster of each document, or None if each item is its own cluster."""
    values = [doc.doc.get(field or "cluster") if isinstance(doc.doc, Mapping) else None for doc in docs]
    if None not in values:
        return [str(v) for v in values]
    if field is None or field == "id":
        return [None] * len(docs)
    fields = list(docs[0].doc) if isinstance(docs[0].doc, Mapping) else []
    raise WorkbenchError(
        f"{file}: document {values.index(None)} has no field '{field}'. {nearest(field, fields)}",
        "--cluster FIELD must be a field of all documents; without the option each item is its own cluster.",
    )


def _item(task: str, kind: str, identity: str, cluster: str, document: Document) -> Row:
    """Return the item of a document: prompt, choices and gold answer."""
    requests = document.requests
    choices: list[str] | None = None
    if kind == "multiple_choice":
        endings = [str(request[1]) for request in requests]
        if len(endings) > 1 == len(set(endings)):  # the choices are in the contexts
            choices = [str(request[0]) for request in requests]
        else:
            choices = [e.removeprefix(" ") for e in endings] if all(e.startswith(" ") for e in endings) else endings
    gold: Any = str(document.target)
    if choices is not None:
        if _NUMBER.fullmatch(gold):
            gold = int(gold)
        elif gold in choices:
            gold = choices.index(gold)
    return {"task": task, "id": identity, "cluster": cluster, "prompt": str(requests[0][0]), "choices": choices, "gold": gold}


def _answer(task: str, kind: str, item: Row, line: Answered, file: Path) -> Row:
    """Return the row of a document with the model's answer, without metrics."""
    row: Row = {"task": task, "id": item["id"], "metrics": {}, "response": None, "loglikelihoods": None}
    count, answers = len(line[0].requests), line[1]["resps"]
    try:
        if kind == "generate_until":
            row["response"] = str(answers[0][0])
        else:
            row["loglikelihoods"] = [_loglikelihood(response) for response in answers[:count]]
            if len(row["loglikelihoods"]) != count:
                raise ValueError
    except (ValueError, IndexError, TypeError, KeyError, SyntaxError, RecursionError, MemoryError):
        raise WorkbenchError(
            f"{file}: document {line[0].doc_id}: expected responses of type {kind} under 'resps', found {str(answers)[:80]}",
            _EXPECTED,
        ) from None
    return row


def _loglikelihood(response: Any) -> float:
    """Parse a log-likelihood: `[["-1.5", "False"]]`, or `["-1.5"]` for rolling requests."""
    while isinstance(response, list):
        response = response[0]
    text = response if isinstance(response, str) else str(response)
    value = float(ast.literal_eval(text)[0]) if text[:1] == "(" else float(text)
    if not math.isfinite(value):
        raise ValueError
    return value


def _value(metric: str, how: str, value: Any) -> float | list[float] | None:
    """Return a metric's number, or [numerator, weight] of a ratio; None for anything else."""
    if how in RATIOS:
        pair = value if isinstance(value, list) else [value, 1]
        return [float(v) for v in pair] if len(pair) == 2 and all(map(_is_number, pair)) else None
    if metric == BRIER and isinstance(value, list) and len(value) == 2:  # (right choice, probabilities)
        right, shares = value
        well_formed = (
            isinstance(right, int) and isinstance(shares, list) and all(map(_is_number, shares)) and 0 <= right < len(shares)
        )
        return brier_score(right, [float(p) for p in shares]) if well_formed else None
    return float(value) if _is_number(value) else None


def _is_number(value: Any) -> bool:
    try:
        return not isinstance(value, (list, dict)) and value is not None and math.isfinite(float(value))
    except (TypeError, ValueError, OverflowError):
        return False


def _add_margins(items: Sequence[Row], rows: Sequence[Row]) -> bool:
    """Add the margin of the gold choice to all rows; return False and add none if a gold choice is not known."""
    margins = [margin_of(row, item) for row, item in zip(rows, items, strict=True)]
    if None in margins:
        return False
    for row, margin in zip(rows, margins, strict=True):
        row["metrics"][MARGIN] = margin
    return True
