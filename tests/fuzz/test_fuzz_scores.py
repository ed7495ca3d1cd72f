"""Whatever stands in the files of the score store or in lm-eval's sample files: numbers, or an error that names file and place.

Each test tries ten times WORKBENCH_FUZZ_EXAMPLES examples.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from worlds.effort import cpu_limit
from worlds.fuzzing import fuzz_reader

from workbench.compare.compare import compare
from workbench.ground.errors import WorkbenchError
from workbench.ground.files import bytes_digest
from workbench.scores.imported import find_imported
from workbench.scores.plan import Item, ScorePlan
from workbench.scores.store import Configuration, Metric, Scores, ScoreStore, TaskScores, stored_plans
from workbench.scores.suite import Suite

SECONDS = 2.0  # more than any file of these sizes may take

STRANGE = (
    "NaN", "Infinity", "-Infinity", "1e999", "-1e999", "9" * 5000, "1" + "0" * 400, '"\\ud800"', '"\\u0000"', "[" * 100_000, '{"a":' * 50_000,
    '"' + "x" * 5000 + '"', "null", "true", "{}", "[]", '""', "-1", "0.5", '"1"', '"\\u001b[31m"', "[[1,2],[3]]", '"²"', '"--5"', '"(1"', '"("',
)  # fmt: skip
values = st.one_of(st.sampled_from(STRANGE), st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=6).map(json.dumps))  # fmt: skip


def places(document: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all values in a JSON document."""
    inner = document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    return [path, *(p for key, value in inner for p in places(value, (*path, key)))]


def replaced(document: Any, path: tuple[Any, ...], text: str | None) -> str:
    """The document's JSON with other JSON in one place; None: without that place."""
    if not path:
        return text or ""
    whole = json.loads(json.dumps(document))
    inner = whole
    for key in path[:-1]:
        inner = inner[key]
    if text is None:
        del inner[path[-1]]
        return json.dumps(whole)
    inner[path[-1]] = "PUT IT HERE"
    return json.dumps(whole).replace('"PUT IT HERE"', text)


@st.composite
def mutated_json(draw: st.DrawFn, document: Any) -> bytes:
    """A document with one value replaced or left out, or its bytes cut or overwritten."""
    path = draw(st.sampled_from(places(document)))
    how = draw(st.sampled_from(("replace", "replace", "remove", "cut", "overwrite")))
    if how == "replace" or (how == "remove" and not path):
        return replaced(document, path, draw(values)).encode("utf-8", "surrogatepass")
    if how == "remove":
        return replaced(document, path, None).encode()
    return mutated_bytes(draw, json.dumps(document).encode())


def mutated_bytes(draw: st.DrawFn, data: bytes) -> bytes:
    at = draw(st.integers(0, len(data)))
    if draw(st.booleans()):
        return data[:at]
    return data[:at] + draw(st.binary(min_size=1, max_size=6)) + data[at + draw(st.integers(0, 6)) :]


class World:
    """A store with two configurations on two tasks, and lm-eval's sample files of one run."""

    def __init__(self, root: Path) -> None:
        self.store = ScoreStore(root / "scores")
        suite = Suite(suite="toy", tasks=("pick", "text"), contrasts={})
        items = {t: tuple(Item(f"{t}{i}", f"c{i % 8}") for i in range(16)) for t in suite.tasks}
        self.plan = ScorePlan(
            suite=suite, items=items, kinds={"pick": "multiple_choice", "text": "loglikelihood_rolling"},
            metrics={"pick": ("acc",), "text": ("word_perplexity",)}, lower={"text": ("word_perplexity",)},
            ratios={"text": {"word_perplexity": "weighted_perplexity"}}, tokenizer=None, tokenizer_digest="", tasks_dir=Path(),
            dtype="float32", batch_size=1, facts=["p"])  # fmt: skip
        asked = {"pick": [{"task": "pick", "id": i.id, "cluster": i.cluster, "prompt": "?", "choices": ["a", "b"], "gold": 0} for i in items["pick"]],
                 "text": [{"task": "text", "id": i.id, "cluster": i.cluster, "prompt": "", "choices": None, "gold": "x"} for i in items["text"]]}  # fmt: skip
        self.scores = [self._scored(Configuration(c * 32, c), seed, asked) for c, seed in (("a", 0), ("b", 1))]
        self.folder = self.store.folder("toy", self.plan.digest)
        self.document, self.rows = self.folder / f"{'a' * 12}.json", self.folder / f"{'a' * 12}.jsonl.gz"
        self.items, self.record = self.folder / "items.jsonl.gz", self.folder / "plan.json"
        self.original = {p: p.read_bytes() for p in self.folder.iterdir() if p.is_file()}
        self.outside = root / "out" / "run"
        self.outside.mkdir(parents=True)
        self.samples = [
            {"doc_id": i, "doc": {"id": f"d{i}", "q": "?"}, "target": "0", "arguments": {"gen_args_0": {"arg_0": "q", "arg_1": " a"},
             "gen_args_1": {"arg_0": "q", "arg_1": " b"}}, "resps": [[["-1.5", "False"]], [["-2.5", "False"]]], "filtered_resps": [],
             "filter": "none", "metrics": ["acc"], "doc_hash": "", "prompt_hash": "", "target_hash": "", "acc": 1.0}
            for i in range(4)
        ]  # fmt: skip

    def _scored(self, configuration: Configuration, seed: int, asked: dict[str, list[dict[str, Any]]]) -> Scores:
        draw = np.random.default_rng(seed)
        likelihoods = draw.normal(size=(16, 2)).tolist()
        rows = {
            "pick": [{"task": "pick", "id": f"pick{i}", "metrics": {"acc": float(v[0] > v[1])}, "response": None, "loglikelihoods": v}
                     for i, v in enumerate(likelihoods)],
            "text": [{"task": "text", "id": f"text{i}", "metrics": {"word_perplexity": [-float(draw.random()) - 1, 3.0]}, "response": None,
                      "loglikelihoods": None} for i in range(16)],
        }  # fmt: skip
        cluster = np.arange(16) % 8
        tasks = {
            "pick": TaskScores(n=16, metrics={"acc": Metric.of([r["metrics"]["acc"] for r in rows["pick"]], cluster)}),
            "text": TaskScores(n=16, metrics={"word_perplexity": Metric.of([r["metrics"]["word_perplexity"] for r in rows["text"]], cluster, "weighted_perplexity")}),
        }  # fmt: skip
        scores = Scores(suite="toy", plan=self.plan.digest, configuration=configuration, seconds=1.0, device="cpu", created="now", versions={}, tasks=tasks)  # fmt: skip
        return self.store.write(self.plan, scores, rows, asked)

    def restore(self) -> None:
        for path, data in self.original.items():
            path.write_bytes(data)

    def read(self) -> dict[str, Any]:
        """All that reads the store: one configuration, all of a plan, the list of plans, the comparison."""
        for key in ("a" * 32, "b" * 32):
            self.store.has(self.plan, key)
        stored_plans(self.store)
        scores = [self.store.read(self.plan, key) for key in ("a" * 32, "b" * 32)]
        found = compare(self.store, scores, baseline="b").to_dict()
        json.dumps(found, allow_nan=False).encode()
        return found

    def sign(self) -> None:
        """Put the digests of rows and items as they are into the documents, as one would who knows the format."""
        for path in (self.document, self.folder / f"{'b' * 12}.json"):
            document = json.loads(path.read_bytes())
            own = path.with_suffix(".jsonl.gz")
            document |= {
                "rows": bytes_digest(gzip.decompress(own.read_bytes())),
                "items": bytes_digest(gzip.decompress(self.items.read_bytes())),
            }
            path.write_text(json.dumps(document))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("fuzz"))


def ends_well(call: Callable[[], Any], *files: Path) -> Any:
    """The call's result, or None after an error that names one of the files; nothing else is raised, nothing takes long."""
    found, failed = None, None
    with cpu_limit(SECONDS):
        try:
            found = call()
        except WorkbenchError as error:
            failed = error
    if failed:
        assert any(str(file) in failed.message for file in files), failed.message
        assert failed.hint
        assert failed.message.encode("utf-8")
    return found


def test_the_world_is_read(world: World) -> None:
    world.restore()
    assert [c["name"] for c in world.read()["configurations"]] == ["a", "b"]


@fuzz_reader
@given(data=st.data())
def test_scores_documents(world: World, data: st.DataObject) -> None:
    world.restore()
    world.document.write_bytes(data.draw(mutated_json(json.loads(world.original[world.document]))))
    ends_well(world.read, world.document, world.rows, world.folder)
    world.restore()


@fuzz_reader
@given(data=st.data())
def test_plan_documents(world: World, data: st.DataObject) -> None:
    world.restore()
    world.record.write_bytes(data.draw(mutated_json(json.loads(world.original[world.record]))))
    ends_well(world.read, world.folder, Path("suite 'toy'"), Path("task "))
    world.restore()


@fuzz_reader
@given(data=st.data(), which=st.sampled_from(("rows", "items")), signed=st.booleans())
def test_rows(world: World, data: st.DataObject, which: str, signed: bool) -> None:
    """Edited rows are refused by their digest; with a digest that fits, by what they hold."""
    world.restore()
    path: Path = getattr(world, which)
    lines = gzip.decompress(world.original[path]).decode().splitlines()
    number = data.draw(st.integers(0, len(lines) - 1))
    changed = data.draw(mutated_json(json.loads(lines[number])))
    text = (
        b"\n".join([*(line.encode() for line in lines[:number]), changed, *(line.encode() for line in lines[number + 1 :])])
        + b"\n"
    )
    path.write_bytes(gzip.compress(text))
    if signed:
        world.sign()
    found = ends_well(world.read, path, world.folder, Path("task "))
    if found is not None and not signed:
        assert text == gzip.decompress(world.original[path])
    if found is not None:
        for row in found["rows"]:
            assert row["metric"] != "acc" or -1 <= row["diff"] <= 1
    world.restore()


@fuzz_reader
@given(data=st.data(), which=st.sampled_from(("rows", "items")))
def test_damaged_gzip(world: World, data: st.DataObject, which: str) -> None:
    world.restore()
    path: Path = getattr(world, which)

    @st.composite
    def bytes_of(draw: st.DrawFn) -> bytes:
        return mutated_bytes(draw, world.original[path])

    path.write_bytes(data.draw(bytes_of()))
    ends_well(world.read, path)
    world.restore()


@pytest.mark.part("exchange")
@fuzz_reader
@given(data=st.data())
def test_sample_files(world: World, data: st.DataObject) -> None:
    from workbench.exchange.imports import import_samples
    from workbench.exchange.samples import read_samples

    lines = [json.dumps(line).encode() for line in world.samples]
    number = data.draw(st.integers(0, len(lines) - 1))
    lines[number] = data.draw(mutated_json(world.samples[number]))
    file = world.outside / "samples_pick_2026-01-01T00-00-00.000000.jsonl"
    file.write_bytes(b"\n".join(lines))
    found = ends_well(lambda: read_samples("pick", file), file)
    if found is not None:
        store = ScoreStore(world.outside.parent / "imported")
        made = ends_well(lambda: import_samples([file], store, name=f"run-{bytes_digest(b''.join(lines))}"), file, store.root)
        if made is not None:
            scores = find_imported(store, "imported", [made[0].scores.configuration.name])
            assert (
                ends_well(lambda: compare(store, scores, baseline=scores[0].configuration.name).to_dict(), store.root) is not None
            )
            assert store.rows(scores[0])["pick"] == found.rows


@pytest.mark.part("exchange")
@fuzz_reader
@given(data=st.data())
def test_results_files(world: World, data: st.DataObject) -> None:
    """Whatever lm-eval's results file beside the samples holds, they are imported with the samples' values or refused."""
    from workbench.exchange.imports import import_samples

    results = {"lm_eval_version": "0.4.13", "transformers_version": "5", "total_evaluation_time_seconds": "1.5",
               "config": {"device": "cpu"}, "higher_is_better": {"pick": {"acc": True}},
               "results": {"pick": {"acc,none": 1.0}}, "configs": {"pick": {"metric_list": [{"metric": "acc", "aggregation": "mean"}]}},
               "group_subtasks": {"all": ["pick"]}}  # fmt: skip
    date = "2026-01-01T00-00-00.000000"
    file = world.outside / f"samples_pick_{date}.jsonl"
    file.write_text("\n".join(map(json.dumps, world.samples)))
    (world.outside / f"results_{date}.json").write_bytes(data.draw(mutated_json(results)))
    store = ScoreStore(world.outside.parent / "again")
    try:
        (run,) = import_samples([file], store)
    except WorkbenchError:
        pass
    else:
        assert run.scores.tasks["pick"].n == 4
        assert run.scores.tasks["pick"].metrics["acc"].value == 1.0
    for path in sorted(store.root.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()


@fuzz_reader
@given(data=st.data())
def test_journals_and_finished_tasks(world: World, data: st.DataObject) -> None:
    """Damaged answers of an interrupted evaluation are asked for again; the answers that remain are whole."""
    key = "c" * 32
    world.store.keep_task(world.plan, key, "pick", {"rows": [1, 2], "seconds": 0.5})
    file = next((world.folder / f"{key[:12]}.partial").glob("*.json.gz"))
    whole = gzip.decompress(file.read_bytes())
    changed = data.draw(mutated_json(json.loads(whole)))
    file.write_bytes(gzip.compress(changed) if data.draw(st.booleans()) else changed)
    found = world.store.finished_task(world.plan, key, "pick")
    assert found in (None, {"rows": [1, 2], "seconds": 0.5})
    journal = file.with_name("pick.jsonl")
    lines = [json.dumps(line).encode() for line in ([-1, key], [0, [-1.5, True]], [1, "text"], [2, ["a", "b"]])]
    number = data.draw(st.integers(0, 3))
    lines[number] = data.draw(mutated_json(json.loads(lines[number])))
    journal.write_bytes(b"\n".join(lines))
    done = world.store.journal(world.plan, key, "pick").done
    assert all(isinstance(n, int) and isinstance(answer, (str, list)) for n, answer in done.items())
