"""Data of the local tasks: read beside the YAML file, whatever the working directory, nothing cached on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets


def jsonl(config_source: str, data_files: dict[str, str], **_: Any) -> dict[str, datasets.Dataset]:
    """The jsonl files of a task, split by split; lm-eval passes `config_source`, the path of the YAML file."""
    folder = Path(config_source).parent
    return {
        split: datasets.Dataset.from_list(
            [json.loads(line) for line in (folder / name).read_text("utf-8").splitlines() if line.strip()]
        )
        for split, name in data_files.items()
    }
