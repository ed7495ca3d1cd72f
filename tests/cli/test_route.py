"""`route explain` and `route check` on a routed configuration of a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from worlds.commands import call, document, refused
from worlds.project import Project
from worlds.routing import BUILT_IN, outside, prompts, requests, write_prompts

from workbench.ground.errors import WorkbenchError
from workbench.route.deciding.samples import COPIES

RECIPE = "bricks: {one: bricks/one, two: bricks/two}\nsteps: [{route: METHOD, calibration: 'calibration/{brick}.jsonl'}]\n"


@pytest.fixture(scope="module")
def configuration(tmp_path_factory: pytest.TempPathFactory, llama: Path, bricks: Path) -> Path:
    """A routed configuration."""
    project = Project(tmp_path_factory.mktemp("routed"))
    (project.path / "recipes").mkdir()
    (project.path / "base").symlink_to(llama)
    (project.path / "bricks").symlink_to(bricks)
    write_prompts(project.path / "calibration", {"one": 0, "two": 1}, count=32, templates=8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BUILT_IN, requests)
        return Path(project.run(RECIPE.replace("METHOD", "ridge"))["run"]) / "configuration"


def asked(path: Path, rows: list[tuple[str, str | None]]) -> Path:
    path.write_text("".join(json.dumps({"prompt": text, "brick": brick}) + "\n" for text, brick in rows), "utf-8")
    return path


def own(count: int = 16) -> list[tuple[str, str | None]]:
    return [(text, name) for i, name in enumerate(("one", "two")) for text in prompts(i, count=count, templates=8, seed=3)]


def test_explain_says_what_acts_and_why(configuration: Path, tmp_path: Path) -> None:
    text = prompts(1, seed=4)[0]
    found = document("route", "explain", str(configuration), text)
    assert found["text"] == text
    assert found["method"] == "ridge"
    assert found["chosen"] == {"two": 1}
    assert max(found["scores"], key=found["scores"].get) == "two"
    assert sum(found["scores"].values()) == pytest.approx(1, abs=1e-3)
    assert found["confidence"] >= found["threshold"]
    assert (found["layer"], found["window"], found["ties"]) == (2, 16, [])
    assert "".join(token["token"] for token in found["tokens"]) == text
    assert [token["token"].strip() for token in found["tokens"]] == text.split()
    last = found["tokens"][-1]
    assert (last["chosen"], last["best"]) == ("two", "two")
    assert last["confidence"] == pytest.approx(found["confidence"], abs=2e-3)
    page = tmp_path / "page.html"
    shown = call("route", "explain", str(configuration), text, "--html", str(page))
    assert shown.stdout.startswith("ridge: two\n")
    assert "threshold" in shown.stdout
    assert text in shown.stdout.replace("\n", "")
    html = page.read_text("utf-8")
    assert "<script" not in html
    chosen = [token["chosen"] for token in found["tokens"] if token["chosen"]]
    assert html.count('<span class="b0"') + html.count('<span class="b1"') == len(chosen) + len(set(chosen))  # tokens and legend


def test_each_token_has_the_choice_of_the_text_up_to_it(configuration: Path) -> None:
    for number, name in enumerate(("one", "two")):
        words = prompts(number, seed=4)[0].split()
        tokens = document("route", "explain", str(configuration), " ".join(words))["tokens"]
        until = document("route", "explain", str(configuration), " ".join(words[:5]))
        assert tokens[-1]["best"] == name
        assert tokens[4]["confidence"] == pytest.approx(until["confidence"], abs=2e-3)
        assert tokens[4]["best"] == max(until["scores"], key=until["scores"].get)


def test_a_strange_text_goes_to_the_base(configuration: Path) -> None:
    chosen = [document("route", "explain", str(configuration), text)["chosen"] for text in outside(6)]
    assert chosen.count({}) >= 4
    strange = next(text for text, bricks in zip(outside(6), chosen, strict=True) if not bricks)
    assert call("route", "explain", str(configuration), strange).stdout.splitlines()[0] == "ridge: base"


def test_check_counts_right_wrong_and_base(configuration: Path, tmp_path: Path) -> None:
    inside, out = asked(tmp_path / "inside.jsonl", own()), asked(tmp_path / "outside.jsonl", [(t, None) for t in outside(16)])
    found = document("route", "check", str(configuration), "--prompts", str(inside), "--prompts", str(out), "--no-copies")
    row, strange = found["sets"]
    assert (row["set"], row["prompts"], row["with_brick"]) == (str(inside), 32, 32)
    assert row["right"] + row["to_base"] + row["wrong_brick"] == pytest.approx(1)
    assert row["right_score"] >= 0.9
    assert "kept_by_base" not in row
    assert strange["without_brick"] == 16
    assert strange["kept_by_base"] >= 0.5
    for point in found["curve"]:
        assert point["routed"] <= 0.5
        if point["threshold"] <= found["threshold"]:
            assert point["to_base"] <= row["to_base"]
            assert point["routed"] >= 1 - strange["kept_by_base"]
    assert found["curve"][0]["routed"] > found["curve"][-1]["routed"] == 0
    shown = call("route", "check", str(configuration), "--prompts", str(inside), "--prompts", str(out), "--no-copies").stdout
    assert "falsely to base" in shown
    table = found["confusion"][str(inside)]
    assert sum(sum(cells.values()) for cells in table.values()) == 32
    assert table["one"].get("one", 0) + table["two"].get("two", 0) == round(32 * row["right"])
    went = found["confusion"][str(out)]["base"]
    assert went["base"] == round(16 * strange["kept_by_base"])
    wrong = [w for w in found["wrong"] if w["set"] == str(out)]
    assert len(wrong) == min(10, 16 - went["base"])
    assert all(w["brick"] is None and w["chosen"] in ("one", "two") for w in wrong)


def test_check_has_copies_and_prints_tables(configuration: Path, tmp_path: Path) -> None:
    inside = asked(tmp_path / "inside.jsonl", own(4))
    found = document("route", "check", str(configuration), "--prompts", str(inside))
    assert [row["set"] for row in found["sets"]] == [str(inside), *(f"{inside}, {kind}" for kind in COPIES[1:])]
    assert found["curve"] == [], "no prompt is for the base"
    assert list(found["confusion"]) == [str(inside)]
    shown = call("route", "check", str(configuration), "--prompts", str(inside), "--no-copies").stdout
    assert "right score" in shown
    assert "rows are for, columns went to" in shown


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ('{"prompt": "w1", "brick": "tow"}', "asked.jsonl:1: expected the name of a brick or null in 'brick', found 'tow'"),
        ('{"prompt": "w1"}', "asked.jsonl:1: expected the name of a brick or null in 'brick', found ''"),
        ('{"brick": "two"}', "asked.jsonl:1: expected either 'prompt' or 'text', found brick"),
        ("", "asked.jsonl: no prompts, expected 1 or more"),
        ("[1]", "asked.jsonl:1: expected an object, found list"),
    ],
)
def test_bad_files_are_refused(configuration: Path, tmp_path: Path, rows: str, message: str) -> None:
    (tmp_path / "asked.jsonl").write_text(rows + "\n", "utf-8")
    error = refused("route", "check", str(configuration), "--prompts", str(tmp_path / "asked.jsonl"))
    assert message in error.message


def test_what_has_no_router_is_refused(configuration: Path, llama: Path) -> None:
    error = refused("route", "explain", str(llama), "w1 w2")
    assert "has no router, so there is no choice to show" in error.message
    assert "expected a text to explain, found an empty one" in refused("route", "explain", str(configuration), " ").message


def test_files_are_read_before_the_router(cwd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workbench.api.chatting.open_speakers", lambda *_, **__: pytest.fail("opened first"))
    (cwd / "bad.jsonl").write_text('{"brick": "one"}\n', "utf-8")
    for files, told in (
        (("nofile.jsonl",), "nofile.jsonl: no such file"),
        (("bad.jsonl",), "bad.jsonl:1"),
        (("a", "a"), "named twice"),
    ):
        with pytest.raises(WorkbenchError, match=told):
            call("route", "check", "any", *(word for file in files for word in ("--prompts", file)))
