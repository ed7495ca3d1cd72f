"""Read JSON that the workbench or lm-eval has written: every defect ends in an error that names the file and the place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

from workbench.errors import WorkbenchError


def read_text(path: Path, hint: str | None = None) -> str:
    """Return a file's text.

    Raises:
        WorkbenchError: The file cannot be read, or it is not UTF-8.
    """
    try:
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise WorkbenchError(f"{path}: cannot be read: {error.strerror or error}", hint) from error
    except UnicodeDecodeError as error:
        raise WorkbenchError(f"{path}: byte {error.start} is not UTF-8", hint) from error


def parse(text: str, place: str, hint: str | None = None, *, constants: bool = False) -> Any:
    """Parse strict JSON: NaN, infinities, numbers beyond float64 and lone surrogates are refused.

    Args:
        text: The JSON text.
        place: File, with the line where the file has one document a line; the error begins with it.
        hint: What the user can do.
        constants: Accept NaN and infinities, which documents of lm-eval's sample files may hold.

    Raises:
        WorkbenchError: The text is not strict JSON.
    """
    try:
        found = json.loads(text, parse_constant=None if constants else _refuse, parse_float=float if constants else _float)
        if "\\u" in text:
            json.dumps(found, ensure_ascii=False).encode("utf-8")
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}" if "\n" in text.strip() else f"column {error.colno}"
        raise WorkbenchError(f"{place}: not JSON: {error.msg} at {where}", hint) from error
    except RecursionError as error:
        raise WorkbenchError(f"{place}: the JSON is nested too deeply", hint) from error
    except UnicodeEncodeError as error:
        raise WorkbenchError(f"{place}: a string holds half of a surrogate pair, which is not Unicode text", hint) from error
    except ValueError as error:  # constants, numbers with thousands of digits
        raise WorkbenchError(f"{place}: not JSON: {error}", hint) from error
    return found


def read(path: Path, hint: str | None = None) -> Any:
    """Return the strict JSON document of a file. Raises WorkbenchError as `read_text` and `parse` do."""
    return parse(read_text(path, hint), str(path), hint)


def mapping(path: Path, hint: str | None = None) -> dict[str, Any]:
    """Return the JSON object of a file. Raises WorkbenchError as `read` does, and where the document is no object."""
    found = read(path, hint)
    if not isinstance(found, dict):
        raise WorkbenchError(f"{path}: expected a JSON object, found {type(found).__name__}", hint)
    return found


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a JSON number")


def _float(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"{text[:20]} is beyond the largest float64")
    return value
