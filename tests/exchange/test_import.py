"""`scores ls` and `scores import`: lm-eval's own sample files as comparable scores."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from worlds.commands import call, refused, run
from worlds.jsonl import read_jsonl, write_jsonl
from worlds.local_tasks import documents, tiny
from worlds.stored_scores import right, stored
from worlds.tiny import edit_json

from workbench.exchange.imports import import_samples
from workbench.exchange.samples import read_samples
from workbench.ground.errors import WorkbenchError
from workbench.scores.imported import find_imported
from workbench.scores.paired import paired
from workbench.scores.store import Configuration, ScoreStore, stored_in, stored_plans

TASKS = ("copy", "pick", "roll", "last")


@pytest.fixture(scope="module")
def outside(tasks: Path, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What lm-eval leaves of two models, by the calls that its command line makes: out/MODEL/samples_TASK_DATE.jsonl and results_DATE.json."""
    from lm_eval import simple_evaluate
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.tasks import TaskManager

    place = tmp_path_factory.mktemp("outside")
    for name, seed in (("a", 0), ("b", 1)):
        tiny(seed).save_pretrained(place / name)
        tokenizer.save_pretrained(place / name)
        tracker = EvaluationTracker(output_path=str(place / "out"))
        manager = TaskManager(include_path=str(tasks), include_defaults=False)
        results = simple_evaluate(
            "hf", model_args={"pretrained": str(place / name), "dtype": "float32"}, tasks=list(TASKS), task_manager=manager, batch_size=4, device="cpu",
            log_samples=True, bootstrap_iters=0, evaluation_tracker=tracker)  # fmt: skip
        samples = results.pop("samples")
        tracker.save_results_aggregated(results=results, samples=samples)
        for task in results["configs"]:
            tracker.save_results_samples(task_name=task, samples=samples[task])
        (made,) = (p for p in (place / "out").iterdir() if p.name.endswith(f"__{name}"))
        made.rename(place / "out" / name)  # its name holds the whole path
    return place / "out"


def lines(folder: Path, task: str) -> list[dict[str, Any]]:
    (file,) = folder.glob(f"samples_{task}_*.jsonl")
    return read_jsonl(file)


def table(folder: Path) -> dict[str, Any]:
    (file,) = folder.glob("results_*.json")
    found: dict[str, Any] = json.loads(file.read_text("utf-8"))["results"]
    return found


def test_imported_scores_are_lm_evals(outside: Path, project: Path) -> None:
    store = ScoreStore(project / "runs" / "scores")
    (one,) = import_samples([outside / "a"], store)
    assert one.new
    assert (one.scores.suite, one.scores.configuration.name, one.scores.configuration.role) == ("imported", "a", "configuration")
    expected = table(outside / "a")
    names = {"exact_match": "exact_match,plain", "exact_match,strip": "exact_match,strip"}
    for task, scores in one.scores.tasks.items():
        assert scores.n == 24
        for metric, found in scores.metrics.items():
            if metric != "margin":
                assert found.value == pytest.approx(expected[task][names.get(metric, f"{metric},none")], rel=1e-9), (task, metric)
                assert found.low <= found.value <= found.high
    assert list(one.scores.tasks["copy"].metrics) == ["exact_match", "exact_match,strip"]
    assert list(one.scores.tasks["pick"].metrics) == ["acc", "acc_norm", "margin"]

    rows, items = store.rows(one.scores), store.items(one.scores)
    docs = documents()
    assert [i["id"] for i in items["pick"]] == [d["id"] for d in docs]
    assert [i["cluster"] for i in items["pick"]] == [d["cluster"] for d in docs]
    assert items["pick"][3]["choices"] == docs[3]["choices"]
    assert {i["gold"] for i in items["pick"]} == {0}
    for row, line in zip(rows["pick"], lines(outside / "a", "pick"), strict=True):
        values = [float(r[0][0]) for r in line["resps"]]
        assert row["loglikelihoods"] == values
        assert row["metrics"]["margin"] == values[0] - max(values[1:])
    assert [r["response"] for r in rows["copy"]] == [
        x["resps"][0][0] for x in lines(outside / "a", "copy") if x["filter"] == "plain"
    ]
    plan = store.record(one.scores)
    assert plan.imported is True
    assert plan.tasks["roll"].ratios == {
        "word_perplexity": "weighted_perplexity", "byte_perplexity": "weighted_perplexity", "bits_per_byte": "bits_per_byte"}  # fmt: skip
    assert plan.tasks["last"].lower == ["perplexity"]
    assert plan.tasks["last"].primary == "acc"
    weight = [r["metrics"]["bits_per_byte"] for r in rows["roll"]]
    assert -sum(n for n, _ in weight) / sum(w for _, w in weight) / math.log(2) == pytest.approx(
        expected["roll"]["bits_per_byte,none"]
    )
    assert rows["last"][0]["metrics"]["perplexity"] == [lines(outside / "a", "last")[0]["perplexity"], 1.0]


def test_two_outside_runs_are_compared_item_by_item(outside: Path, project: Path) -> None:
    files = [str(p) for n in ("a", "b") for p in sorted((outside / n).glob("samples_*.jsonl"))]
    said = call("scores", "import", *files, "--suite", "outside")
    assert "compare: workbench compare a b --suite outside" in said.stderr
    found = json.loads(call("compare", "a", "b", "--suite", "outside", "--json", code=(0, 3)).stdout)
    assert found["baseline"] == "a"
    (row,) = [r for r in found["rows"] if r["task"] == "pick"]
    values = [[line["acc"] for line in lines(outside / n, "pick")] for n in ("a", "b")]
    expected = paired(*values, [d["cluster"] for d in documents()])
    assert (row["diff"], row["p"], row["clusters"]) == (expected.diff, expected.p, 8)
    (row,) = [r for r in found["rows"] if r["task"] == "roll"]
    values = [table(outside / n)["roll"]["word_perplexity,none"] for n in ("a", "b")]
    assert row["ratio"] is row["lower"] is True
    assert [row["baseline_value"], row["value"]] == pytest.approx(values)
    turned = json.loads(call("compare", "a", "b", "--suite", "outside", "--baseline", "b", "--json", code=(0, 3)).stdout)
    assert turned["baseline"] == "b"
    call("report", "--suite", "outside")
    shown = json.loads(Path("reports/report.json").read_text("utf-8"))
    assert [c["name"] for c in shown["configurations"]] == ["a", "b"]
    assert {t["n"] for t in shown["tasks"]} == {24}


def test_the_same_import_again_changes_nothing_and_other_numbers_are_refused(outside: Path, project: Path) -> None:
    call("scores", "import", str(outside / "a"))
    before = {p: p.read_bytes() for p in Path("runs").rglob("*") if p.is_file()}
    assert "already imported" in call("scores", "import", str(outside / "a")).stdout
    (scores,) = import_samples([outside / "a"], ScoreStore(project / "runs" / "scores"))
    assert json.loads(call("scores", "import", str(outside / "a"), "--json").stdout) == [
        {
            "suite": "imported",
            "plan": scores.scores.plan,
            "name": "a",
            "digest": scores.scores.configuration.digest,
            "new": False,
            "tasks": dict.fromkeys(sorted(TASKS), 24),
            "warnings": [],
        }
    ]
    assert {p: p.read_bytes() for p in Path("runs").rglob("*") if p.is_file()} == before
    error = refused("scores", "import", str(outside / "b"), "--name", "a")
    assert "suite 'imported' already has other numbers of 'a' on the same items" in error.message
    assert "--name a-2" in str(error.hint)
    call("scores", "import", str(outside / "b"), "--name", "a-2")


def changed(outside: Path, project: Path, name: str, edit: Any, task: str = "pick") -> Path:
    """A copy of b's samples of one task, with lines changed."""
    place = project / "copies" / name
    place.mkdir(parents=True)
    found = lines(outside / "b", task)
    edit(found)
    write_jsonl(place / f"samples_{task}_2026-01-01T00-00-00.000000.jsonl", found)
    return place


def test_other_documents_prompts_or_filters_are_another_plan(outside: Path, project: Path) -> None:
    store = ScoreStore(project / "runs" / "scores")
    edits = {
        "same": lambda found: None,
        "document": lambda found: found[2]["doc"].update(note="changed"),
        "prompt": lambda found: found[2]["arguments"]["gen_args_0"].update(arg_0="Tell aa0 ->"),
        "target": lambda found: found[2].update(target="1"),
        "fewer": lambda found: found.pop(),
        "filter": lambda found: [line.update(filter="loose") for line in found],
        "numbers": lambda found: [line.update(acc=1.0) for line in found],
    }
    plans = {}
    for name, edit in edits.items():
        (one,) = import_samples([changed(outside, project, name, edit)], store, suite="x")
        plans[name] = one.scores.plan
    assert plans["numbers"] == plans["same"]
    assert len({plans[n] for n in edits if n != "numbers"}) == 6
    error = refused("compare", "same", "prompt", "--suite", "x")
    assert "same and prompt have different documents, prompts, clusters or filters in pick" in error.message
    call("scores", "import", *(str(p) for p in (outside / "a").glob("samples_*") if "copy" in p.name), "--suite", "x")
    assert "have different tasks (pick; copy)" in refused("compare", "same", "a", "--suite", "x").message
    assert "no imported run 'smae'. Did you mean 'same'" in refused("compare", "smae", "same", "--suite", "x").message
    assert [s.configuration.name for s in find_imported(store, "x", ["numbers", "same"])] == ["numbers", "same"]


def test_ids_and_clusters(outside: Path, project: Path) -> None:
    def strip(found: list[dict[str, Any]]) -> None:
        for line in found:
            del line["doc"]["id"], line["doc"]["cluster"]
        found[1].update(doc=found[0]["doc"], arguments=found[0]["arguments"])

    (file,) = changed(outside, project, "bare", strip).iterdir()
    samples = read_samples("pick", file)
    ids = [item["id"] for item in samples.items]
    assert len(set(ids)) == 24
    assert ids[1] == f"{ids[0]}-2"
    assert [item["cluster"] for item in samples.items] == ids, "each item is its own cluster"
    assert {item["cluster"] for item in read_samples("pick", file, "answer").items} == {
        d["answer"] for d in documents()[:1] + documents()[2:]
    }
    with pytest.raises(WorkbenchError, match=r"document 0 has no field 'answr'. Did you mean 'answer'"):
        read_samples("pick", file, "answr")


def test_a_document_with_a_single_choice_is_one_of_multiple_choice(outside: Path, project: Path) -> None:
    """Also the first one: the task's kind decides about chance, and the choice is no prompt."""

    def single(found: list[dict[str, Any]]) -> None:
        found[0].update(arguments={"gen_args_0": found[0]["arguments"]["gen_args_0"]}, resps=found[0]["resps"][:1])

    (file,) = changed(outside, project, "single", single).iterdir()
    samples, docs = read_samples("pick", file), documents()
    assert (samples.kind, samples.metrics) == ("multiple_choice", ("acc", "acc_norm"))  # a single choice has no margin
    assert [item["choices"] for item in samples.items[:2]] == [docs[0]["choices"][:1], docs[1]["choices"]]
    assert [len(row["loglikelihoods"]) for row in samples.rows[:2]] == [1, len(docs[1]["choices"])]


def test_a_suite_names_lm_evals_groups(outside: Path, project: Path) -> None:
    """The results file says which tasks a group has, at any depth; what the suite says of the group is said of them."""
    folder, suites = shutil.copytree(outside / "a", project / "grouped"), project / "evals" / "suites"
    (results,) = folder.glob("results_*.json")
    edit_json(results, group_subtasks={"all": ["inner", "copy"], "inner": ["pick"], "damaged": 3})
    suites.mkdir(parents=True)
    (suites / "x.yaml").write_text("suite: x\ntasks: [all, roll, last]\nroles: {all: guarded}\n")
    (run,) = import_samples([folder], ScoreStore(project / "runs" / "scores"), suite="x", project=project)
    assert run.plan.suite.roles == dict.fromkeys(("pick", "copy"), "guarded")
    assert run.plan.suite.tasks == tuple(sorted(TASKS))


def test_a_file_without_a_date_is_older_than_one_with_a_date(outside: Path, project: Path) -> None:
    store, place = ScoreStore(project / "runs" / "scores"), changed(outside, project, "dated", lambda found: None)
    (dated,) = place.iterdir()
    write_jsonl(place / "samples_pick.jsonl", [{**line, "acc": 1.0} for line in read_jsonl(dated)])
    newest, given = (import_samples([p], store, name=p.stem)[0].scores for p in (place, place / "samples_pick.jsonl"))
    assert list(given.tasks) == ["pick"]
    assert newest.tasks["pick"].metrics["acc"].value < given.tasks["pick"].metrics["acc"].value == 1


ARGS = "expected gen_args_0, gen_args_1, ... under 'arguments', found "
PARTS = "expected a context and a continuation or settings in 'arguments', found "
REQUEST = {"arg_0": "q", "arg_1": " a"}
BAD_LINES: list[tuple[dict[str, Any], str]] = [
    ({"doc_id": "0"}, "expected a number under 'doc_id', found \"0\""),
    ({"doc_id": True}, "expected a number under 'doc_id', found true"),
    ({"filter": 1}, "expected a string under 'filter', found 1"),
    ({"metrics": "acc"}, "expected a list of names under 'metrics', found \"acc\""),
    ({"metrics": ["acc", 1]}, "expected a list of names under 'metrics', found [\"acc\", 1]"),
    ({"arguments": [REQUEST]}, ARGS),
    ({"arguments": ["gen_args_0"]}, ARGS),
    ({"arguments": {"gen_args_1": REQUEST}}, ARGS),
    ({"arguments": {"gen_args_1": REQUEST, "gen_args_0": REQUEST}}, ARGS),
    ({"arguments": {"gen_args_0": ["q", " a"]}}, PARTS),
    ({"arguments": {"gen_args_0": {}}}, PARTS),
    ({"arguments": {"gen_args_0": {"arg_0": 1, "arg_1": " a"}}}, PARTS),
    ({"arguments": {"gen_args_0": {"arg_0": "q", "arg_1": 1}}}, PARTS),
    ({"arguments": {"gen_args_0": REQUEST, "gen_args_1": {"arg_0": "q", "arg_1": {}}}}, "expected requests of one type in"),
    ({"arguments": {}}, "'arguments' has no request with a context"),
    ({"arguments": {key: {**REQUEST, "arg_0": ""} for key in ("gen_args_0", "gen_args_1")}}, "'arguments' has no request with"),
    (
        {"arguments": {"gen_args_0": {"arg_0": "q"}}},
        "requests are of type loglikelihood_rolling, in earlier lines of type loglikelihood",
    ),
    ({"acc": 1.5}, "document 0: acc is 1.5, expected a number from 0 to 1"),
    ({"acc": -0.25}, "document 0: acc is -0.25, expected a number from 0 to 1"),
]


def test_bad_samples(outside: Path, project: Path) -> None:
    file = project / "samples_pick_2026-01-01T00-00-00.000000.jsonl"
    good = next((outside / "a").glob("samples_pick_*.jsonl")).read_text("utf-8")

    def fails(text: str | None, message: str) -> None:
        if text is not None:
            file.write_text(text)
        error = refused("scores", "import", str(file))
        assert message in error.message, error.message
        assert error.hint

    fails(None, "the file does not exist")
    fails("", "the file has no lines")
    fails(good + "{", ":25: not JSON")
    fails('{"doc_id": 0}\n', ":1: missing keys: doc, target, arguments, resps, filter, metrics")
    fails(good + good.splitlines()[0] + "\n", "a document occurs twice")
    for changes, message in BAD_LINES:
        fails(good + "\n" + json.dumps({**json.loads(good.splitlines()[0]), **changes}), f":26: {message}")
    fails(
        good.replace('"acc": 0.0', '"acc": null').replace('"acc_norm": ', '"acc_nrm": '),
        "no metric can be compared: acc has no number for every item; acc_norm has no number for every item",
    )
    fails(good.replace('"resps": [[["', '"resps": [[["x'), "expected responses of type multiple_choice")
    other = project / "results.jsonl"
    other.write_text(good)
    assert "expected a file name of the form samples_TASK_DATE.jsonl" in refused("scores", "import", str(other)).message
    (project / "empty").mkdir()
    assert (
        "neither the folder nor a folder in it has samples_*.jsonl" in refused("scores", "import", str(project / "empty")).message
    )
    both = refused("scores", "import", str(outside / "a"), str(outside / "b"), "--name", "x")
    assert "which make 2 configurations" in both.message
    file.write_text(good)
    shutil.copy(file, project / "samples_pick_2026-01-02T00-00-00.000000.jsonl")
    twice = refused("scores", "import", *map(str, sorted(project.glob("samples_*"))))
    assert "both belong to task 'pick'" in twice.message
    assert not (project / "runs").exists()
    call("scores", "import", str(project), "--name", "newest")


def test_ls(outside: Path, project: Path) -> None:
    assert "no scores in" in run("scores", "ls").stderr
    assert json.loads(run("scores", "ls", "--json").stdout) == []
    call("scores", "import", str(outside / "a"), "--suite", "z")
    call("scores", "import", str(outside / "b"), "--suite", "y")
    (first, second) = json.loads(run("scores", "ls", "--json").stdout)
    assert (first["suite"], second["suite"]) == ("y", "z")
    assert [c["name"] for c in second["configurations"]] == ["a"]
    assert second["tasks"] == dict.fromkeys(sorted(TASKS), 24)
    assert (second["scorer"], second["partial"], second["imported"], second["unfinished"]) == ("lm_eval", False, True, 0)
    folder = project / "runs" / "scores" / second["folder"]
    assert second["bytes"] == sum(p.stat().st_size for p in folder.iterdir())
    (folder / "abc.partial").mkdir()
    assert "imported, 1 unfinished" in run("scores", "ls").stdout
    assert stored_plans(ScoreStore(project / "nowhere")) == []


@pytest.mark.part("advice")
def test_the_order_of_a_folder_decides_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """File systems list files in any order: scores of the same second and value are in the order of their names."""

    from workbench.advice.evidence import scored_before

    store, sizes = ScoreStore(tmp_path), {"x": 1, "y": 2}
    made = [Configuration(c * 32, f"of-{c}" if c > "2" else "twin", "configuration", ("x", "y"), bricks=sizes) for c in "12345"]
    stored(store, {c: {"t": right(0.5)} for c in made})
    (folder,) = tmp_path.iterdir()
    for file in {*folder.glob("*.json")} - {folder / "plan.json"}:
        edit_json(file, tasks={"t": {"n": 240, "metrics": {"em": {"value": 0.5, "low": 0.4, "high": 0.6}}}})
    for file in shutil.copytree(folder, tmp_path / f"toy-{'q' * 12}").glob("*.json"):
        edit_json(file, plan="q" * 32)
    glob, found = Path.glob, list[Any]()
    for turned in (False, True):
        monkeypatch.setattr(Path, "glob", lambda path, pattern, turned=turned: iter(sorted(glob(path, pattern), reverse=turned)))
        read = [stored_in(folder) for folder in sorted(tmp_path.iterdir())]
        found.append((stored_plans(store), read, scored_before(store, sizes)))
    assert found[0] == found[1]
    assert [[s.configuration.digest[0] for s in scores if s.configuration.name == "twin"] for scores in found[0][1]] == [
        ["1", "2"]
    ] * 2
    assert len(found[0][2]) == 3
    record = json.loads((folder / "plan.json").read_text("utf-8"))
    for field in ("scorer", "dtype", "batch_size", "partial"):
        assert {getattr(plan, field) for plan in found[0][0]} == {record[field]}


def test_an_unknown_direction_is_asked_for(outside: Path, project: Path) -> None:
    """A task's own metric without a results file: whether the doubled one is better or worse only the user knows."""

    def own(times: float) -> Any:
        def edit(found: list[dict[str, Any]]) -> None:
            for i, line in enumerate(found):
                for name in line.pop("metrics", ()):
                    line.pop(name, None)
                line |= {"metrics": ["nll"], "nll": times * (1 + i / 10)}

        return edit

    one, two = (changed(outside, project, name, own(times)) for name, times in (("one", 1.0), ("two", 2.0)))
    error = refused("scores", "import", str(one), "--suite", "x")
    assert "no results file beside the samples says whether higher or lower values of 'nll' are better" in error.message
    assert error.hint is not None
    assert error.hint.startswith("Say it: --lower nll or --higher nll.")
    call("scores", "import", str(one), str(two), "--suite", "x", "--lower", "nll")
    error = refused("scores", "import", str(one), "--suite", "x", "--name", "again", "--higher", "nll")
    assert "in suite 'x', lower values of 'nll' are better on 'pick', and these samples say the opposite" in error.message
    assert error.hint == "Import it with --lower nll, or into another --suite."
    called = run("compare", "one", "two", "--suite", "x", "--baseline", "one", "--json", code=3)
    (row,) = json.loads(called.stdout)["rows"]
    assert (row["verdict"], row["lower"], row["diff"] > 0) == ("worse", True, True)
