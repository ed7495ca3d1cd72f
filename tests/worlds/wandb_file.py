"""Records of the file in which wandb keeps an offline run: LevelDB's log format, with a protocol buffer as each record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_BLOCK = 32768
_HEADER = 7
_LAST_PIECES = (1, 4)  # a whole record, or the last piece of one


def read_run(path: Path) -> tuple[Any, dict[str, Any], list[dict[str, Any]]]:
    """Return the run's record, its config, and the rows of its history."""
    from wandb.proto.wandb_internal_pb2 import Record

    run, config, history = None, {}, []
    for text in _records(path.read_bytes()):
        record = Record.FromString(text)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run = record.run
            config |= {item.key: json.loads(item.value_json) for item in run.config.update}
        elif kind == "history":
            rows = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            history.append(rows)
    return run, config, history


def _records(data: bytes) -> list[bytes]:
    assert data[:4] == b":W&B"
    found, pieces, at = [], b"", _HEADER
    while at < len(data):
        if _BLOCK - at % _BLOCK < _HEADER:  # a header never spans two blocks
            at += _BLOCK - at % _BLOCK
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        pieces += data[at + _HEADER : at + _HEADER + length]
        at += _HEADER + length
        if kind in _LAST_PIECES:
            found.append(pieces)
            pieces = b""
    return found
