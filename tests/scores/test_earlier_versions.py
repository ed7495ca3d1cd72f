"""Projects of earlier versions: recipes are read, runs and scores are listed, scores are compared or named outdated (docs/concepts-runs.md)."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from worlds.commands import call, document, refused

from workbench.scores.plan import PLAN_FORMAT

# One recipe on the same inputs: what each version left in runs/, without its cache.
PROJECTS = Path(__file__).parent.parent / "fixtures" / "projects"


@pytest.fixture(params=["0.1", "0.2"])
def earlier(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(PROJECTS / "inputs", tmp_path, dirs_exist_ok=True)
    shutil.copytree(PROJECTS / request.param, tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs"


def test_a_project_of_an_earlier_version_opens(earlier: Path) -> None:
    assert document("plan", "half")["steps"][0]["merge"] == "task_arithmetic"
    (run,) = document("runs", "ls")
    assert (run["name"], run["status"]) == ("half-5cd494c299", "done")
    assert "merge-task_arithmetic" in call("runs", "show", "half").stdout
    (plan,) = document("scores", "ls")
    assert [c["name"] for c in plan["configurations"]] == ["base", "half", "one"]
    assert plan["tasks"] == {"pick": 12}
    if plan["outdated"]:
        assert "outdated" in call("scores", "ls").stdout
    for command in ("compare", "report"):
        error = refused(command, "half")
        assert f"half under plan {plan['plan'][:12]} are not compared ({plan['outdated'] or ''}" in error.message
        assert error.hint == "workbench eval half"
    call("eval", "half", "--device", "cpu")
    (half,) = (row for row in document("compare", "half")["rows"] if row["configuration"] == "half")
    assert (half["value"], half["baseline_value"]) == (pytest.approx(10 / 12), pytest.approx(9 / 12))


@pytest.mark.parametrize(
    ("format_", "reason"),
    [
        ("plan-9 of a later version", "scored in plan format plan-9, this version scores in "),
        (PLAN_FORMAT, "another plan: other .*dtype"),
    ],
)
def test_why_scores_of_another_plan_are_not_compared(format_: str, reason: str, earlier: Path) -> None:
    (place,) = (earlier / "scores").iterdir()
    record = json.loads((place / "plan.json").read_text("utf-8"))
    other = place.rename(place.with_name("mini-" + "f" * 12))
    for file in other.glob("*.json"):
        file.write_text(file.read_text("utf-8").replace(record["plan"], "f" * 32), "utf-8")
    changed = {**record, "dtype": "bfloat16", "plan": "f" * 32, "format": format_}
    (other / "plan.json").write_text(json.dumps(changed), "utf-8")
    message = refused("compare", "half").message
    assert re.search(rf"scores of base, half under plan {'f' * 12} are not compared \({reason}", message)
