"""The pages of a real tiny project: what they say is what the files hold, text of others is escaped, and nothing is changed."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
from starlette.testclient import TestClient

from worlds.neuron_results import functions, profiles
from worlds.project import Project
from worlds.search_world import RECIPE, folder_of, lay_out, search_of
from worlds.toy_scores import ADD, AVERAGE, BASE, MERGE, SHARES, SORT, stored
from worlds.viewer import Visitor

from workbench.api.subjects import Request, open_subjects
from workbench.ground.events import Event
from workbench.recipe.recipe import load_recipe
from workbench.run.directory import RunDirectory, run_for
from workbench.scores.store import Configuration, Journal, ScoreStore
from workbench.scores.suite import Suite
from workbench.search.run import open_study, run
from workbench.search.winner import conclude
from workbench.view.app import application
from workbench.view.folder import Folder
from workbench.view.growing import event
from workbench.view.pages import Site
from workbench.view.server import Served

EVIL = "<img src=x onerror=alert(1)>'\"&"
AVERAGED = "bricks: {one: bricks/one, two: bricks/two}\nsteps: [{merge: average}]\n"


@pytest.fixture
def world(project: Project, monkeypatch: pytest.MonkeyPatch) -> Project:
    lay_out(project, items=8, clusters=4)
    project.write(RECIPE, "mix.yaml")
    project.write(f"description: {json.dumps(EVIL)}\n{AVERAGED}", "mean.yaml")
    project.write("steps: [{merge: tis}]\n", "wrong.yaml")
    monkeypatch.chdir(project.path)
    return project


@pytest.fixture
def client(world: Project) -> TestClient:
    return TestClient(application(Site()), "http://127.0.0.1:8000", headers={"Accept": "text/html"})


def text(client: TestClient, path: str, status: int = 200) -> str:
    answer = client.get(path)
    assert answer.status_code == status, answer.text
    assert "<img src=x" not in answer.text
    return answer.text


def state(project: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in sorted(project.rglob("*"))}


def test_an_empty_project_says_what_to_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    client = TestClient(application(Site()))
    for path in ("/", "/recipes", "/runs", "/scores", "/searches", "/live"):
        page = text(client, path)
        assert "workbench " in page or path == "/live"
    assert list(tmp_path.iterdir()) == []


def test_recipes_with_plan_and_differences(world: Project, client: TestClient) -> None:
    listed = text(client, "/recipes")
    assert all(name in listed for name in (">mix<", ">mean<", "merge ties", "merge average", "unknown merge method"))
    page = text(client, "/recipes/mix.yaml")
    for verb in ("plan", "run", "eval", "chat"):
        assert f">workbench {verb} mix<" in page
    assert "unknown merge method" in text(client, "/recipes/wrong.yaml")
    plan = text(client, "/recipes/mix.yaml/plan")
    assert all(part in plan for part in ("merge ties", "one (adapter)", "about "))
    differs = text(client, "/recipes/mix.yaml?against=mean.yaml")
    assert "They make different configurations." in differs or "is not known" in differs
    assert '<th scope="row">output.dtype</th>' in differs
    answer = client.get("/recipes/wrong.yaml/plan", headers={"Accept": "*/*"})
    assert (answer.status_code, answer.headers["content-type"].partition(";")[0]) == (422, "text/plain")


def test_runs_and_their_seals(world: Project, client: TestClient) -> None:
    world.run(RECIPE, "mix.yaml")
    made = world.run(f"description: {json.dumps(EVIL)}\n{AVERAGED}", "mean.yaml")
    name = Path(made["run"]).name
    (bad,) = (path for path in (world.path / "runs").iterdir() if path.name.startswith("mix-"))
    (bad / "model" / "more.txt").write_text("x")
    run_for(world.path / "runs", EVIL.replace("/", "-"), "0" * 20).path.mkdir()
    (world.path / "runs" / f"{EVIL}-{'0' * 10}" / "run.json").write_text("{")
    listed = Folder().runs()
    assert (listed[name].seal, listed[name].status) == ("whole", "done")
    assert (listed[bad.name].seal, listed[bad.name].broken) == ("broken", RunDirectory(bad).harm())
    assert listed[f"{EVIL}-{'0' * 10}"].status == "damaged"
    assert "1 broken" in text(client, "/")
    text(client, "/runs")
    for listed_name in listed:
        text(client, f"/runs/{quote(listed_name, safe='')}")
    page = text(client, f"/runs/{name}")
    assert made["configuration"] in page
    assert f"workbench runs verify {name}" in page
    assert f"from_pretrained(&#34;runs/{name}/model&#34;)" in page
    assert "more.txt" in text(client, f"/runs/{bad.name}")
    # A file that changed is read again, also at equal size and time.
    folder, file = Folder(), run_for(world.path / "runs", "mean", name[-10:]).path / "run.json"
    assert folder.runs()[name].done
    times = file.stat()
    file.write_text(file.read_text("utf-8").replace('"status": "done"', '"status": "lost"'), "utf-8")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert (file.stat().st_size, folder.runs()[name].status) == (times.st_size, "lost")
    (bad / "model" / "more.txt").unlink()
    assert Folder().runs()[bad.name].seal == "whole"


def test_scores_become_the_report(world: Project, client: TestClient) -> None:
    store = ScoreStore(world.path / "runs" / "scores")
    values = {c: [[float(i < 60 * share) for i in range(60)] for share in shares] for c, shares in SHARES.items()}
    named = Configuration("5" * 32, EVIL, "configuration", ("add", "sort"), "recipes/x.yaml")
    found = stored(store, {**values, named: values[MERGE]})
    folder = store.folder("toy", found[0].plan).name
    listed = text(client, "/scores")
    assert listed.count('type="checkbox"') == 6
    assert re.search(r'data-v="0.75"[^>]*>75.0</td>', listed), "as reports write it"
    assert all(f'value="{c.name}"' in listed for c in (BASE, ADD, SORT, AVERAGE, MERGE))
    page = text(client, f"/scores/{folder}?name=merge")
    assert "2 configurations compared" in page or "compared with base" in page
    assert '<nav class="viewer"' in page
    assert "workbench report recipes/merge.yaml --suite toy" in page
    for control in ("add", "sort", "average"):
        assert f'<th scope="row" title="{control}' in page
    text(client, f"/scores/{folder}")
    assert "compared with add" in text(client, f"/scores/{folder}?name=merge&baseline=add")
    # Guarded tasks of another suite count too, unless the user takes them out.
    guarded = Suite(suite="guard", tasks=("facts",), primary={"facts": "f1"}, roles={"facts": "guarded"})
    other = stored(store, {c: [values[c][2]] for c in (BASE, ADD, MERGE)}, suite=guarded, plan="q" * 32)
    beside = store.folder("guard", other[0].plan).name
    listed = text(client, "/scores")
    assert f'value="{beside}" checked' in listed
    assert len(re.findall(r'<td data-v="0\.\d+" class="bar"[^>]*>\d\d\.\d</td>', listed)) == 3 * 5 + 3, "every share in percent"
    page = text(client, f"/scores/{folder}?name=merge")
    assert "suite toy" in page
    assert "suite guard" in page
    assert "Not scored on every suite: sort, average." in page
    assert "--suite toy --suite guard" in page
    assert "suite guard" not in text(client, f"/scores/{folder}?name=merge&beside=")
    next((world.path / "runs" / "scores" / folder).glob("[0-9a-f]*.json")).write_text('{"version": 2}')
    assert "Field required" in text(client, "/scores")


def test_searches_in_progress_and_finished(world: Project, client: TestClient) -> None:
    search = search_of(world, rest=", trials: 3, sampler: random, controls: false", name="tuned.yaml")
    run(search)
    folder = folder_of(world, "tuned")
    before = state(folder)
    page = text(client, f"/searches/{folder.name}")
    study = open_study(search)
    try:
        rows = study.finished()
    finally:
        study.close()
    assert list(re.findall(r'<th scope="row">(trial-\d)</th>', page)) == sorted((row.name for row in rows), key=page.index)
    assert len(rows) == 3
    assert state(folder).keys() == before.keys()
    assert "not finished" in text(client, "/searches")
    found = conclude(search)
    assert "finished" in text(client, "/searches")
    page = text(client, f"/searches/{folder.name}")
    assert 'id="history"' in page
    assert '<nav class="viewer"' in page
    assert str(found.winner or "") in page
    (folder / "search.json").write_text("{}")
    assert "Field required" in text(client, f"/searches/{folder.name}") or "lacks" in text(client, f"/searches/{folder.name}")


@pytest.mark.parametrize(
    "name",
    ["..", "%2e%2e", "..%2f..%2fetc%2fpasswd", "nothing", "%00", "..%5c", "%2fetc%2fpasswd", "mix.yaml%00", "a" * 5000, "."],
)
def test_only_what_is_listed_is_read(world: Project, client: TestClient, name: str) -> None:
    for part in ("recipes", "runs", "scores", "searches"):
        answer = client.get(f"/{part}/{name}")
        assert answer.status_code in (404, 200)
        assert answer.status_code == 404 or answer.url.path in ("/", f"/{part}", f"/{part}/"), answer.text
        assert "root:x:" not in answer.text
    assert client.get(f"/recipes/{name}/plan").status_code in (404, 422)
    assert "no recipe" in client.get(f"/recipes/mix.yaml?against={name}").text


def test_pages_change_nothing(world: Project, client: TestClient) -> None:
    world.run(RECIPE, "mix.yaml")
    before = state(world.path)
    for path in ("/", "/recipes", "/recipes/mix.yaml", "/recipes/mean.yaml/plan", "/runs", "/scores", "/searches", "/live"):
        text(client, path)
    after = state(world.path)
    assert {path: known for path, known in after.items() if ".workbench" not in path and before.get(path) != known} == {}


def test_work_in_progress_is_sent(world: Project) -> None:
    """A run of another process and an evaluation appear, and the part is sent anew when they change."""
    recipe = load_recipe(world.path / "recipes" / "mix.yaml")
    run_ = run_for(world.path / "runs", recipe.name, "1" * 20)
    with Served(application(Site())) as served:
        events: Iterator[tuple[str, str]] = iter(Visitor(served.url).events("/live/events"))
        assert "Nothing." in next(events)[1]
        with run_.lock():
            run_.write({"status": "started"})
            run_.log({"stage": "write", "text": EVIL})
            sent = next(part for name, part in events if run_.name in part)
            assert "&lt;img src=x" in sent
            assert "<img" not in sent
        assert "Nothing." in next(part for name, part in events if run_.name not in part)
        opened = open_subjects(Request(["mix"]), fetch=True)

        def stop(event: Event) -> None:
            if event.get("done"):
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            opened.scored("cpu", None, stop)
        (journal,) = opened.store.root.glob("*/*.partial/*.jsonl")
        answers = Journal(journal, json.loads(journal.read_text().partition("\n")[0])[1]).done
        sent = next(part for name, part in events if "answers" in part)
        assert f"{journal.stem}: {len(answers)} answers are stored" in sent
        assert f">words: {opened.entries[0].name}<" in sent


def test_events_are_one_line_of_data() -> None:
    assert (
        event("part", "a\nb\r\n\N{LINE SEPARATOR}\ndata: x") == 'event: part\ndata: "a\\nb\\r\\n\N{LINE SEPARATOR}\\ndata: x"\n\n'
    )


def test_pages_of_neurons_are_opened_from_the_first_page(world: Project, client: TestClient) -> None:
    assert "/neurons/" not in text(client, "/")
    folder = world.path / "runs" / "neurons" / "a model"
    folder.mkdir(parents=True)
    (folder / "index.html").write_text('<a href="low.html">low</a>', "utf-8")
    (folder / "low.html").write_text("neurons of low", "utf-8")
    (folder / "functions.json").write_text("{}", "utf-8")
    assert 'href="/neurons/a%20model/index.html"' in text(client, "/")
    assert text(client, "/neurons/a%20model/index.html") == '<a href="low.html">low</a>'
    assert text(client, "/neurons/a%20model/low.html") == "neurons of low"
    for wrong in ("functions.json", "..%2Findex.html", "high.html"):
        text(client, f"/neurons/a%20model/{wrong}", 404)


@pytest.mark.part("neurons")
def test_a_page_in_the_project_does_not_choose_what_runs(world: Project, client: TestClient) -> None:
    """The scripts of the pages that `analyze` writes run; those of a page that somebody else wrote do not, whatever it says of itself."""
    from workbench.neurons.pages.page import render_neurons

    folder = world.path / "runs" / "neurons" / "m"
    render_neurons({"functions": functions({"math": 3}), "profiles": profiles("math")}, folder / "index.html")
    (folder / "evil.html").write_text("<META Http-Equiv=refresh content=0><meta http-equiv='Content-Security-Policy' content=''>")
    (folder / "wide.html").write_bytes("<meta http-equiv=refresh>".encode("utf-16"))
    policies = {
        name: client.get(f"/neurons/m/{name}.html").headers["content-security-policy"] for name in ("index", "math", "evil")
    }
    (policy,) = set(policies.values())
    rules = dict(rule.partition(" ")[::2] for rule in policy.split("; "))
    assert {name: value for name, value in rules.items() if name != "script-src"} == {
        "default-src": "'none'",
        "style-src": "'unsafe-inline'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    scripts = [
        one for name in ("index", "math") for one in re.findall("'sha256-[^']+'", (folder / f"{name}.html").read_text("utf-8"))
    ]
    assert sorted(scripts) == sorted(rules["script-src"].split())
    for name in ("index", "math", "evil", "wide"):
        assert "http-equiv" not in client.get(f"/neurons/m/{name}.html").text.lower()
