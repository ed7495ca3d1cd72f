"""Rates that simulations measure, and the file in which `benchmarks/error_rates.py` collects them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def measured(claim: str, rate: float, **case: Any) -> float:
    """Return a rate, and write it down where a file is named for it."""
    if path := os.environ.get("WORKBENCH_ERROR_RATES"):
        with Path(path).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"claim": claim, "rate": round(rate, 4), **case}) + "\n")
    return rate
