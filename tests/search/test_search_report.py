"""The report of a search: numbers, places and words of its views; escaping; documents that lack something."""

from __future__ import annotations

import copy
import json
import math
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from worlds.report_page import Page
from worlds.search_document import CONTROLS, make_search
from worlds.search_page import Document, handmade, render, rendered, view_of

from workbench.report.chart import Frame, Scale, spread
from workbench.search.pages.charts import best_so_far, curves, history, hypervolume, importances, pareto
from workbench.search.pages.parallel import parallel
from workbench.search.pages.wording import headline, sentences

MINUS = "\N{MINUS SIGN}"
EVIL = "<img src=x onerror=\"document.title='run'\"></script>|`"


@pytest.fixture(scope="module")
def two() -> Document:
    return make_search(40, objectives=2)


def test_files_and_their_names(one: Document, tmp_path: Path) -> None:
    paths = render(one, tmp_path / "deep" / "report-search.html")
    assert [p.name for p in paths] == ["report-search.html", "report-search.md", "report-search.json"]
    assert json.loads(paths[2].read_text("utf-8")) == json.loads(json.dumps(one))


def test_page_stands_alone_and_its_ids_differ(one: Document, two: Document, tmp_path: Path) -> None:
    for document in (one, two):
        page = Page(rendered(document, tmp_path)[0])
        assert len(page.ids) == len(set(page.ids))
        assert all(r.startswith(("#", "data:")) for r in page.resources)
        linked = {r[1:] for r in page.resources if r.startswith("#")}
        assert linked <= set(page.ids)


def test_headline_and_sentences() -> None:
    view = view_of(handmade())
    assert headline(view).replace("\N{NO-BREAK SPACE}", " ") == (
        "On 8 test items that the search did not use, trial-2 scores 50.0 % and the best control, base, 25.0 %: "
        "+25.0 [+5.0, +45.0] points, cannot tell."
    )
    assert sentences(view) == [
        "On the search items, which selected it, its difference is +40.0 points, 15.0 points more than on the test items: "
        "the search items are too optimistic by that much.",
        "Of 5 candidates of the sampler tpe, 3 were scored on all 8 search items, 1 was stopped early and 1 failed.",
    ]


@pytest.mark.parametrize(
    ("optimism", "words"),
    [
        (0.0, "the same as on the test items."),
        (-0.1, "10.0 points less than on the test items: the search items are not too optimistic."),
    ],
)
def test_optimism_in_words(optimism: float, words: str) -> None:
    document = handmade()
    document["test"]["against"]["trial-2"][0]["optimism"] = optimism
    assert sentences(view_of(document))[0].endswith(words)


def test_table_of_what_was_tested(one: Document, tmp_path: Path) -> None:
    text, markdown = rendered(one, tmp_path)
    head, winner, random, *controls = Page(text).tables["tested-table"]
    assert head == ["Configuration", "search", "test", "optimism", "difference", "verdict"]
    assert winner[0].startswith(f"{one['winner']}winner, mix.merge ")
    assert random[0].startswith("random-")
    assert "best random candidate" in random[0]
    (against,) = one["test"]["against"][one["winner"]]
    row = next(r for r in one["test"]["rows"] if r["name"] == one["winner"])
    assert winner[1:4] == [f"{100 * row['search'][0]:.1f}", f"{100 * row['test'][0]:.1f}", "+2.0"]
    d = against["test"]
    assert winner[4] == f"{100 * d['diff']:+.1f} [{100 * d['low']:+.1f}, {100 * d['high']:+.1f}]"
    assert winner[5].strip() == against["verdict"] == "better"
    assert [c[0] for c in controls] == [
        "task-arithmetic-1best control",
        "base",
        "add",
        "reverse",
        "triage",
        "average",
        "toythe recipe as written",
    ]
    assert [c[4] for c in controls[:2]] == ["\N{EN DASH}", f"{MINUS}64.0"], (
        "a control's difference is that of its score on test items"
    )
    assert f"| {one['winner']} | winner" in markdown


def test_candidates_have_their_own_names_in_the_comparison(one: Document, tmp_path: Path) -> None:
    text, _ = rendered(one, tmp_path)
    names = {row[0] for row in Page(text).tables["rows-table"][1:]}
    assert one["winner"] in names
    assert not [n for n in names if n.startswith("toy-")]
    assert f"toy-{one['winner']}" in {c["name"] for c in one["test"]["comparison"]["configurations"]}


def test_best_so_far_counts_no_estimate() -> None:
    view = view_of(handmade())
    assert best_so_far(view.found.trials, view.objectives[0]) == [(0, 0.4), (2, 0.6)]


def test_history_places() -> None:
    view = view_of(handmade())
    (figure,) = history(view)
    frame = Frame.flowing(Scale(-0.58, 4.58), Scale(0.2 - 0.042, 0.9 + 0.042), 250)
    drawn = str(figure.drawing)
    assert drawn.count('href="#c-round"') == 3
    assert drawn.count('href="#c-round-hollow"') == 1
    assert drawn.count('class="failed"') == 1
    for number, score in ((0, 0.4), (1, 0.9), (2, 0.6), (4, 0.5)):
        assert f'x="{100 * (number + 0.58) / 5.16:.3f}%" y="{8 + 250 * (0.942 - score) / 0.784:.1f}"' in drawn
        assert frame.up(score) == round(8 + 250 * (0.942 - score) / 0.784, 1)
    first, third, last = (f"{1000 * frame.x.share(n):.1f}" for n in (0, 2, 4))
    steps = f'd="M{first} {frame.up(0.4):g}H{third}V{frame.up(0.6):g}H{last}"'
    assert f'class="best" {steps}' in drawn
    assert "stopped early after 4 of 8 items, beaten by base" in drawn
    assert "failed: not finite" in drawn
    assert drawn.count('class="control-line best"') == 2, "over the plot, and to its label"


def test_labels_of_controls_keep_apart() -> None:
    found = spread([100.0, 101.0, 102.0, 10.0], 16, 8, 258)
    assert found == [100.0, 116.0, 132.0, 10.0]
    tight = sorted(spread([258.0] * 30, 16, 8, 258))
    assert tight[0] >= 8
    assert tight[-1] == 258
    assert min(b - a for a, b in pairwise(tight)) == pytest.approx(250 / 29, abs=0.1)


def test_importances_are_bars_of_their_shares(one: Document) -> None:
    (bars,) = importances(view_of(one))
    assert bars.rows == (("mix.lambda", "71 %"), ("mix.merge", "25 %"), ("mix.bricks.triage", "3 %"))
    widths = [float(w) for w in re.findall(r'width="([\d.]+)%" height="14"', str(bars.drawing))]
    assert widths == pytest.approx([100.0, 35.48, 4.70], abs=0.01)


def test_lines_pass_axes_that_a_candidate_does_not_have() -> None:
    found = parallel(view_of(handmade()))
    assert found is not None
    lines = re.findall(r'<g class="mark line[^"]*">.*?</g>', str(found.figure.drawing), re.DOTALL)
    assert len(lines) == 4, "the failed one has no score"
    jumps = [line for line in lines if 'class="jump"' in line]
    assert sorted(re.findall(r"<title>(\S+)", "".join(jumps))) == ["trial-0", "trial-4"]
    # four axes: m, lam, d, score; trial-0 goes from lam (375) to the score (875)
    assert all(re.search(r'class="jump" d="M375 [\d.]+L875 [\d.]+"', line) for line in jumps)
    chosen = next(line for line in lines if "chosen" in line)
    middle = 30 + 8 + 260 * 0.5
    assert f"L625 {middle:g}" in chosen, "0.01 is in the middle of 0.001 to 0.1 on a logarithmic axis"
    assert "s5" in chosen
    assert (found.worst, found.best, found.clipped) == ("40.0", "60.0", False), "the estimate of 90 sets no colour"
    assert found.figure.note.endswith(
        "Thin lines are candidates that were stopped early; their scores are estimates. 1 failed candidate is left out."
    )


def test_a_panel_for_each_dimension() -> None:
    ((objective, (strips, lam, density)),) = curves(view_of(handmade()))
    assert objective.measure == "acc, %"
    assert [f.note for f in (strips, lam, density)] == [
        "4 candidates",
        "4 candidates",
        "2 of 4 candidates \N{MIDDLE DOT} logarithmic",
    ]
    assert str(lam.drawing).count('href="#c-round"') == 3
    assert str(lam.drawing).count('href="#c-round-hollow"') == 1
    frame = Frame.flowing(Scale(1.0 - 0.08, 3.0 + 0.08), Scale(0, 1), 170)
    assert f'x="{frame.across(3.0)}"' in str(lam.drawing)
    assert len(re.findall(r"<title>[ab]</title>", str(strips.drawing))) == 2
    rows = [float(y) for y in re.findall(r'<use href="#c-round(?:-hollow)?" x="[\d.]+%" y="([\d.]+)"', str(strips.drawing))]
    assert sum(8 < y < 38 for y in rows) == 2
    assert sum(38 < y < 68 for y in rows) == 2


def test_an_interval_is_drawn_around_its_score(tmp_path: Path) -> None:
    """In every panel, and within its scale; in both tables as numbers."""
    document = handmade()
    document["trials"][2]["intervals"] = [[0.1, 0.95]]
    ((_, (strips, lam, _)),) = curves(view_of(document))
    scores = Scale.over([0.1, 0.95])
    frame = Frame.flowing(Scale(1.0 - 0.08, 3.0 + 0.08), scores, 170)
    ends = f'x1="{frame.across(3.0)}" x2="{frame.across(3.0)}" y1="{frame.up(0.1)}" y2="{frame.up(0.95)}"'
    assert f'<line class="whisker" {ends}' in str(lam.drawing)
    assert f'x1="{100 * scores.share(0.1):.3f}%" x2="{100 * scores.share(0.95):.3f}%"' in str(strips.drawing)
    page, text = rendered(document, tmp_path)
    assert '<span class="sub">[10.0, 95.0]</span>' in page
    assert r"| 60.0 \[10.0, 95.0\] |" in text
    assert "whisker" not in rendered(handmade(), tmp_path)[0].partition("</style>")[2]


def test_scales() -> None:
    log = Scale.over([0.001, 0.1], log=True, room=0.0)
    assert log.share(0.01) == pytest.approx(0.5)
    assert log.ticks() == pytest.approx((0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1))
    assert Scale.over([1e-4, 1.0], log=True, room=0.0).texts([1e-4, 1.0]) == ["0.0001", "1"]
    assert Scale.over([0.5]).share(0.5) == pytest.approx(0.5)
    assert Scale.over([]).share(math.pi) == 1.0
    assert Scale.over([-1.0, 1.0], log=True).log is False


def test_front_and_hypervolume(two: Document, tmp_path: Path) -> None:
    view = view_of(two)
    found = pareto(view)
    assert found is not None
    scores = {t["name"]: t["scores"] for t in two["trials"] if t["scores"] and not t["stopped"]}
    best = [n for n, s in scores.items() if not any(o != s and o[0] >= s[0] and o[1] >= s[1] for o in scores.values())]
    assert list(found.front) == best
    drawn = str(found.drawing)
    assert drawn.count('class="mark named') == len(scores)
    assert drawn.count("on-front") >= len(best)
    assert all(re.search(f"<text [^>]*>{name}</text>", drawn) for name in CONTROLS), "every control has its name beside it"
    area = hypervolume(view)
    assert area is not None
    rises = 1 + sum(a != b for a, b in pairwise(two["hypervolume"]))
    assert str(area.drawing).count('class="knot"') == rises
    text, markdown = rendered(two, tmp_path)
    assert len(history(view)) == 2
    assert Page(text).tables["tested-table"][0][5::5] == ["verdictsmoke", "verdictsmoke/retention"]
    assert "## Pareto front" in markdown
    assert headline(view).startswith(
        f"On 460 test items that the search did not use, {len(two['front'])} candidates of the Pareto front were tested: "
    )


def test_lower_is_better() -> None:
    document = handmade()
    document["objectives"][0]["lower"] = True
    document["trials"][4]["scores"] = [3.5]
    document["test"]["against"]["trial-2"][0]["test"]["diff"] = -0.25
    view = view_of(document)
    (objective,) = view.objectives
    assert objective.unit.word == ""
    assert best_so_far(view.found.trials, objective) == [(0, 0.4)]
    found = parallel(view)
    assert found is not None
    assert (found.worst, found.best) == ("3.500", "0.400")
    assert "scores 0.500 and the best control, base, 0.250" in headline(view)
    assert "acc by candidate number; lower is better." in history(view)[0].note


def test_views_without_data_are_left_out(tmp_path: Path) -> None:
    bare = {**handmade(), "name": "bare", "space": {}, "trials": [], "winner": None}
    bare["test"]["rows"], bare["test"]["against"] = [], {}
    text, markdown = rendered(bare, tmp_path)
    page = Page(text)
    assert [i for i in page.ids if i in ("forest", "history", "importances", "parallel", "dimensions", "front")] == []
    assert "This search has not tested any candidate." in text
    assert "The search tried no candidate." in markdown
    assert "workbench search bare" in text
    some = make_search(40, comparison=False)
    some["importances"] = {}
    ids = Page(rendered(some, tmp_path)[0]).ids
    assert "forest" not in ids
    assert "importances" not in ids
    assert {"result", "history", "parallel", "dimensions", "repeat"} <= set(ids)


def test_only_failed_candidates(tmp_path: Path) -> None:
    document = handmade()
    document |= {"trials": [document["trials"][3]], "winner": None}
    document["test"]["rows"].pop()
    text, _ = rendered(document, tmp_path)
    assert "Of 1 candidate of the sampler tpe, 0 were scored on all 8 search items and 1 failed." in text
    assert 'class="failed"' in text
    assert "dimensions" not in Page(text).ids


def test_no_number_is_not_drawn(tmp_path: Path) -> None:
    document = handmade()
    document["trials"][2]["values"]["lam"] = "much"
    document["test"]["against"]["trial-2"][0]["test"] |= {"low": None, "high": None}
    text, _ = rendered(document, tmp_path)
    assert "nan" not in re.sub(r"<script>.*?</script>|<style>.*?</style>", "", text, flags=re.DOTALL)


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    document = json.loads(json.dumps(make_search(12, random=4)).replace("mix.lambda", "LAM").replace("mix.merge", "MERGE"))
    document = json.loads(json.dumps(document).replace("LAM", json.dumps(EVIL)[1:-1]).replace('"ties"', json.dumps(EVIL)))
    document["name"] = document["objectives"][0]["name"] = document["best_control"] = EVIL
    document["controls"][-1]["name"] = document["test"]["rows"][len(CONTROLS) - 1]["name"] = EVIL
    document["trials"][5]["error"] = document["sampler"] = document["directory"] = EVIL
    document["recipes"] = {EVIL: EVIL}
    text, markdown = rendered(document, tmp_path)
    page = Page(text)
    assert "img" not in page.tags
    assert page.tags.count("script") == 2  # the files of the buttons are a packed text
    assert EVIL not in text
    assert "<img" not in markdown.split("```")[0]
    assert any(EVIL in title for title in page.titles)


def test_recipes_and_the_command_line(one: Document, tmp_path: Path) -> None:
    text, markdown = rendered(one, tmp_path)
    assert f"workbench run runs/search/toy-da01b81b/winner.yaml  # {one['winner']}" in markdown
    assert '<pre id="run-1">workbench run runs/search/toy-da01b81b/winner.yaml</pre>' in text
    assert "workbench search toy" in markdown
    given = copy.deepcopy(one)
    given["command"] = "workbench search toy --budget 2h"
    _, markdown = rendered(given, tmp_path)
    assert "workbench search toy --budget 2h" in markdown


def test_every_candidate_stands_in_the_table(one: Document, tmp_path: Path) -> None:
    text, markdown = rendered(one, tmp_path)
    head, *rows = Page(text).tables["candidates-table"]
    assert head[1:5] == list(one["space"])
    assert len(rows) == 60
    failed = next(r for r in rows if r[0] == "trial-5")
    assert failed[5:] == ["\N{EN DASH}"] * 2 + ["1.0 s", "failed: weights are not finite"]
    plain = next(t for t in one["trials"] if t["values"]["mix.merge"] == "task_arithmetic")
    assert next(r for r in rows if r[0] == plain["name"])[3] == "\N{EN DASH}", "it has no density"
    assert markdown.count("| random-") >= 20


def test_no_torch_and_no_optuna() -> None:
    code = "import sys, workbench.search.pages; print([m for m in ('torch', 'optuna', 'lm_eval') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
