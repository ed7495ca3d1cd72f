"""Flat tables as pandas data frames."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

from workbench.errors import UsageError, WorkbenchError


def data_frame(tables: Mapping[str, Sequence[Mapping[str, Any]]], name: str) -> Any:
    """Return one of some flat tables as a pandas data frame.

    Args:
        tables: Tables by name; a table is one mapping per row.
        name: Name of the table.

    Raises:
        WorkbenchError: If there is no such table, or pandas is not installed.
    """
    if name not in tables:
        raise UsageError(f"to_pandas({name!r}): no such table", f"Tables: {', '.join(tables)}.")
    try:
        pandas = importlib.import_module("pandas")
    except ModuleNotFoundError:
        raise WorkbenchError("to_pandas needs pandas, which is not installed", "Run `pip install pandas`.") from None
    return pandas.DataFrame(list(tables[name]))
