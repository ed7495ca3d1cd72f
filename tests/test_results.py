"""Results as documents: undefined numbers, absent fields, older files, and numbers that keep their kind."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from workbench.ground.errors import WorkbenchError
from workbench.ground.results import JsonObject, Measured, Number, OpenJsonObject, Result, absent


class Row(JsonObject):
    """A row."""

    value: Number
    low: Measured
    note: str | None = absent()
    reason: str | None = None


class Table(Result):
    """A result whose second version calls its rows `rows`."""

    version: int = 2
    rows: list[Row]
    means: dict[str, Measured] = absent()

    @classmethod
    def migrate(cls, data: dict[str, Any]) -> dict[str, Any]:
        if data.get("version") == 1:
            data |= {"version": 2, "rows": data.pop("lines")}
        return data


def test_undefined_numbers_are_null_absent_fields_are_left_out_and_whole_numbers_stay_whole() -> None:
    table = Table(rows=[Row(value=1, low=-math.inf), Row(value=1.0, low=0.5, note="n", reason="r")], means={"a": math.nan})
    rows = '[{"value": 1, "low": null, "reason": null}, {"value": 1.0, "low": 0.5, "note": "n", "reason": "r"}]'
    assert json.dumps(table.to_dict()) == f'{{"version": 2, "rows": {rows}, "means": {{"a": null}}}}'
    assert "means" not in Table(rows=[]).to_dict()


def test_a_result_is_read_as_it_was_written(tmp_path: Path) -> None:
    table = Table(rows=[Row(value=2, low=math.inf, reason="r")])
    table.write(tmp_path / "table.json")
    assert Table.read(tmp_path / "table.json") == table


def test_files_of_other_versions_are_read(tmp_path: Path) -> None:
    old = {"version": 1, "lines": [{"value": 1, "low": None, "gone": 3}], "also gone": True}
    assert Table.of(old, "old.json") == Table(rows=[Row(value=1, low=None)])
    assert old["lines"], "the caller's data stay"


def test_a_damaged_result_is_named_with_its_place(tmp_path: Path) -> None:
    (tmp_path / "table.json").write_text('{"version": 2, "rows": [{"low": 1}]}')
    with pytest.raises(WorkbenchError, match=r"table\.json: rows\.0\.value: Field required") as error:
        Table.read(tmp_path / "table.json", "Run it again.")
    assert error.value.hint == "Run it again."


def test_a_schema_says_what_is_always_there() -> None:
    schema = Table.model_json_schema(mode="serialization")
    assert schema["required"] == ["version", "rows"]
    assert schema["$defs"]["Row"]["required"] == ["value", "low", "reason"]
    assert schema["$defs"]["Row"]["properties"]["value"]["type"] == "number"


def test_an_open_part_keeps_other_fields() -> None:
    class Task(OpenJsonObject):
        n: int

    assert Task.model_validate({"n": 1, "acc": 0.5}).to_dict() == {"n": 1, "acc": 0.5}
