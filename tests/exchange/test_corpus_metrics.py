"""Metrics of a whole corpus: the same value as lm-eval's in an evaluation and in an import, and their jackknife."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from worlds.commands import call, refused
from worlds.jsonl import write_jsonl
from worlds.local_tasks import LOCALDATA, documents, tiny

from workbench.evaluate import build_plan, score
from workbench.evaluate.gold import aggregation, corpus_contributions
from workbench.exchange.imports import import_samples
from workbench.exchange.reported import Reported
from workbench.exchange.samples import read_samples
from workbench.scores.paired import paired_scores
from workbench.scores.statistics import FEW_CLUSTERS, UndefinedError, clustered_se, codes, contributions, interval
from workbench.scores.store import Configuration, ScoreStore
from workbench.scores.suite import Suite

OWN = """
def least(items):
    return min(items)

def share(items):
    return sum(a == b for a, b in items) / len(items)

def distance(doc, results):
    text = results[0]
    far = float(abs(len(text) - 2))
    return {"edit_distance": far, "lowest": far / 50, "odd": (doc["gold"], len(text) % 2), "exact_match": float(far == 0)}

def translation(doc, results):
    said = "".join(results[0].split()) or "."
    words = doc["answer"].split()
    pair = (doc["answer"], " ".join("x" if (len(w) + ord(said[i % len(said)]) + (i + 3) * int(doc["id"][-3:]) // 2) % 3 == 0 else w for i, w in enumerate(words)))
    return dict.fromkeys(("bleu", "chrf", "chrf++", "ter"), pair)
"""
HEAD = """
task: {name}
custom_dataset: !function localdata.jsonl
dataset_kwargs: {{data_files: {{test: data/copy.jsonl}}}}
test_split: test
doc_to_text: prompt
metadata: {{version: 1.0}}
"""
GENERATED = (
    'output_type: generate_until\ndoc_to_target: answer\ngeneration_kwargs: {until: ["\\n"], max_gen_toks: 8, do_sample: false}\n'
)
TASKS = {
    "judge": "output_type: multiple_choice\ndoc_to_choice: choices\ndoc_to_target: gold\n"
    "metric_list: [{metric: f1}, {metric: mcc}, {metric: acc}]\n",
    "translate": f"{GENERATED}process_results: !function own.translation\n"
    "metric_list: [{metric: bleu}, {metric: chrf}, {metric: chrf++}, {metric: ter}]\n",
    "spell": f"{GENERATED}process_results: !function own.distance\n"
    "metric_list:\n"
    "  - {metric: edit_distance, aggregation: mean, higher_is_better: false}\n"
    "  - {metric: lowest, aggregation: !function own.least, higher_is_better: true}\n"
    "  - {metric: odd, aggregation: !function own.share, higher_is_better: true}\n"
    "  - {metric: exact_match, aggregation: mean, higher_is_better: true}\n",
}


@dataclass(frozen=True)
class World:
    """lm-eval's tasks, the folders that it wrote for two models, and its tables of results."""

    tasks: Path
    out: Path
    results: dict[str, dict[str, dict[str, float]]]  # by model, task


@pytest.fixture(scope="module")
def world(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> World:
    """Three tasks, scored by lm-eval's own calls as its command line makes them."""
    from lm_eval import simple_evaluate
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.tasks import TaskManager

    place = tmp_path_factory.mktemp("corpus")
    tasks = place / "evals" / "tasks"
    (tasks / "data").mkdir(parents=True)
    (tasks / "localdata.py").write_text(LOCALDATA)
    (tasks / "own.py").write_text(OWN)
    for name, text in TASKS.items():
        (tasks / f"{name}.yaml").write_text(HEAD.format(name=name) + text)
    docs = documents(40)
    for i, doc in enumerate(docs):
        doc |= {"gold": i % 2, "choices": [f"{chr(97 + i % 26)}x", f"{chr(97 + i * 5 % 26)}y"], "cluster": f"t{i % 10}"}
        doc["answer"] = f"the cat {doc['answer']} sat on a mat and dog {i}"
    write_jsonl(tasks / "data" / "copy.jsonl", docs)
    found = {}
    for name, seed in (("a", 0), ("b", 1)):
        tiny(seed).save_pretrained(place / name)
        tokenizer.save_pretrained(place / name)
        tracker = EvaluationTracker(output_path=str(place / "out"))
        results = simple_evaluate(
            "hf",
            model_args={"pretrained": str(place / name), "dtype": "float32"},
            tasks=list(TASKS),
            batch_size=4,
            device="cpu",
            task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
            log_samples=True,
            bootstrap_iters=0,
            evaluation_tracker=tracker,
        )
        samples = results.pop("samples")
        tracker.save_results_aggregated(results=results, samples=samples)
        for task in results["configs"]:
            tracker.save_results_samples(task_name=task, samples=samples[task])
        (made,) = (p for p in (place / "out").iterdir() if p.name.endswith(f"__{name}"))
        made.rename(place / "out" / name)
        found[name] = {
            t: {k.removesuffix(",none"): v for k, v in r.items() if isinstance(v, float)} for t, r in results["results"].items()
        }
    return World(tasks, place / "out", found)


@pytest.fixture
def project(tmp_path: Path, cwd: Path) -> Path:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "evals" / "suites").mkdir(parents=True)
    return tmp_path


def edited(world: World, project: Path, old: str, new: str) -> Path:
    """Return a copy of the first model's folder with another text in its results file."""
    folder = project / "copy"
    folder.mkdir()
    for file in (world.out / "a").iterdir():
        text = file.read_text()
        (folder / file.name).write_text(text.replace(old, new) if file.name.startswith("results_") else text)
    return folder


def test_an_evaluation_and_an_import_have_lm_evals_values(world: World, project: Path, tokenizer: Any) -> None:
    """f1, mcc, bleu, chrf, chrf++, ter, and the task's own aggregations `lowest` and `odd`, which samples alone cannot tell."""
    suite = Suite(suite="corpus", tasks=tuple(TASKS))
    plan = build_plan(suite, tokenizer, tasks_dir=world.tasks, dtype="float32", batch_size=4)
    runs = import_samples([world.out], ScoreStore(project / "runs" / "scores"))
    assert [run.scores.configuration.name for run in runs] == ["a", "b"]
    for run, seed in zip(runs, (0, 1), strict=True):
        expected = world.results[run.scores.configuration.name]
        scored, _ = score(plan, Configuration("a" * 32, "a"), tiny(seed), device="cpu")
        for task, values in expected.items():
            own, imported = scored.tasks[task].metrics, run.scores.tasks[task].metrics
            assert {m: own[m].value for m in values} == pytest.approx(values, rel=1e-9, abs=1e-12)
            assert values.keys() - imported.keys() == ({"lowest", "odd"} if task == "spell" else set())
            for metric in values.keys() & imported.keys():
                assert imported[metric].value == pytest.approx(values[metric], rel=1e-9, abs=1e-12)
                assert (imported[metric].low, imported[metric].high) == pytest.approx(
                    (own[metric].low, own[metric].high), rel=1e-5
                )
        assert not math.isfinite(scored.tasks["spell"].metrics["lowest"].low)  # a jackknife says nothing about the smallest value
        assert math.isfinite(scored.tasks["translate"].metrics["bleu"].low)
        lowest = re.escape(f"has {expected['spell']['lowest']:.6g}, the mean of the samples is ")
        assert any(re.search(f"lowest is aggregated by the task's own function.*{lowest}", note) for note in run.notes)
    assert plan.primary("judge") == "acc"  # metrics of a corpus come last, as scores of items have more power
    assert (plan.lower["translate"], plan.lower["spell"]) == (("ter",), ("edit_distance",))
    assert (runs[0].plan.lower["translate"], runs[0].plan.lower["spell"]) == (("ter",), ("edit_distance",))


def test_a_value_that_differs_from_the_results_file_is_refused(world: World, project: Path) -> None:
    value = world.results["a"]["judge"]["f1"]
    folder = edited(world, project, f'"f1,none": {value}', '"f1,none": 0.75')
    error = refused("scores", "import", str(folder))
    assert "'f1' of 'judge'" in error.message
    assert f"has 0.75, the f1 of the samples is {value:.6g} (aggregation: f1)" in error.message
    (results,) = folder.glob("results_*.json")
    results.write_text(results.read_text()[:-40])
    assert "results_" in refused("scores", "import", str(folder)).message
    results.unlink()
    assert "no results_DATE.json beside the samples of judge, spell, translate" in call("scores", "import", str(folder)).stderr


def test_the_smallest_value_alone_is_refused(world: World) -> None:
    """A task's only metric may be aggregated by `min`: its mean would be another number."""
    (file,) = (world.out / "a").glob("samples_spell_*.jsonl")
    (results,) = (world.out / "a").glob("results_*.json")
    document = json.loads(results.read_text())
    document["configs"]["spell"]["metric_list"] = [
        {"metric": m, "aggregation": "def least"} for m in ("edit_distance", "lowest", "odd")
    ]
    document["results"]["spell"]["edit_distance,none"] = 1.0
    document["results"]["spell"].pop("exact_match,none")
    with pytest.raises(
        Exception, match=r"no metric can be compared: edit_distance is aggregated by the task's own function.*has 1, the mean"
    ):
        read_samples("spell", file, None, Reported.of("spell", results, document))


@pytest.mark.parametrize(("metric", "lower"), [("edit_distance", True), ("wer", True), ("acc", False)])
def test_a_direction_that_the_results_file_lacks_comes_from_the_name(metric: str, lower: bool, world: World) -> None:
    (file,) = (world.out / "a").glob("samples_spell_*.jsonl")
    text = file.read_text().replace('"edit_distance"', f'"{metric}"').replace(f'"{metric}": ', f'"{metric}": 0.0, "far": ')
    renamed = world.out.parent / f"samples_{metric}.jsonl"
    renamed.write_text(text)
    for higher in ({}, {metric: None}):
        reported = Reported.of("spell", file, {"higher_is_better": {"spell": higher}})
        assert (metric in read_samples("spell", renamed, None, Reported(higher=reported.higher)).lower) is lower


def test_the_projects_suite_gives_roles_tolerances_and_primary_metrics(world: World, project: Path) -> None:
    suite = project / "evals" / "suites" / "mine.yaml"
    suite.write_text(
        "suite: mine\ntasks: [judge, translate, spell, other]\nprimary: {judge: f1, translate: bleu, spell: edit_distance}\n"
        "roles: {spell: retention, other: guarded}\ntolerance: {spell: 30}\ncluster: id\n"
    )
    call("scores", "import", str(world.out), "--suite", "mine")
    rows = {row["task"]: row for row in json.loads(call("compare", "a", "b", "--suite", "mine", "--json").stdout)["rows"]}
    assert (rows["spell"]["family"], rows["spell"]["verdict"], rows["spell"]["tolerance"], rows["spell"]["n"]) == (
        "guarded",
        "safe",
        30,
        40,
    )
    assert rows["judge"]["diff"] == pytest.approx(world.results["b"]["judge"]["f1"] - world.results["a"]["judge"]["f1"])
    assert rows["translate"]["diff"] == pytest.approx(
        world.results["b"]["translate"]["bleu"] - world.results["a"]["translate"]["bleu"]
    )
    assert rows["judge"]["clusters"] == 40  # the suite's `cluster: id`, not the field that all documents have
    suite.write_text(suite.read_text().replace("tolerance: {spell: 30}", "tolerance: {spell: 0.01}"))
    assert "already imported" in call("scores", "import", str(world.out), "--suite", "mine").stdout
    rows = {row["task"]: row for row in json.loads(call("compare", "a", "b", "--suite", "mine", "--json").stdout)["rows"]}
    assert rows["spell"]["verdict"] == "not shown safe"
    suite.write_text("suite: mine\ntasks: [judge, translat, spell]\n")
    error = refused("scores", "import", str(world.out), "--suite", "mine")
    assert "evals/suites/mine.yaml has no task 'translate'" in error.message
    suite.write_text("suite: mine\ntasks: [judge, translate, spell]\nprimary: {spell: lowest}\n")
    error = refused("scores", "import", str(world.out), "--suite", "mine")
    assert "the samples of 'spell' have no metric 'lowest'" in error.message


def test_versions_of_lm_eval_that_differ_are_named(world: World, project: Path) -> None:
    import lm_eval

    folder = edited(world, project, f'"lm_eval_version": "{lm_eval.__version__}"', '"lm_eval_version": "0.4.9"')
    call("scores", "import", str(world.out / "b"))
    named = f"Different versions of lm-eval wrote these scores: {lm_eval.__version__} (b); 0.4.9 (copy)."
    assert named in call("scores", "import", str(folder)).stderr
    said = call("compare", "b", "copy", "--suite", "imported")
    assert named in said.stdout + said.stderr


def test_contributions_are_the_jackknife_over_clusters() -> None:
    rng = np.random.default_rng(3)
    pairs = [[int(g), int(p)] for g, p in rng.integers(0, 2, (90, 2))]
    cluster = codes(list(rng.integers(0, 15, 90)))
    f1 = aggregation("f1")
    assert f1 is not None
    shares = contributions(f1, pairs, cluster)
    assert shares.mean() == pytest.approx(f1(pairs), abs=1e-15)
    without = np.array([f1([p for p, c in zip(pairs, cluster, strict=True) if c != k]) for k in range(15)])
    sizes = np.bincount(cluster)
    change = (90 - sizes) * (f1(pairs) - without)
    change -= sizes / 90 * change.sum()
    assert clustered_se(shares, cluster) == pytest.approx(math.sqrt((change**2 / (1 - sizes / 90)).sum()) / 90)
    scores = rng.random(90)
    assert np.bincount(cluster, contributions(np.mean, list(scores), cluster)) == pytest.approx(np.bincount(cluster, scores))
    with pytest.raises(UndefinedError, match="fails on all items but"):
        contributions(lambda items: 1 / (len(items) - 84), pairs, codes([0] * 6 + [1] * 84))
    with pytest.raises(UndefinedError, match="is nan on all items"):
        contributions(lambda _: math.nan, pairs, cluster)


@pytest.mark.parametrize("name", ["bleu", "chrf", "chrf++", "ter"])
def test_sums_of_counts_are_the_metric_of_fewer_texts(name: str) -> None:
    rng = np.random.default_rng(5)
    words = [f"w{i}" for i in range(9)]
    texts = [[" ".join(rng.choice(words, 9)) for _ in range(2)] for _ in range(FEW_CLUSTERS * 2)]
    metric = aggregation(name)
    assert metric is not None
    cluster = codes([i // 2 for i in range(len(texts))])
    plain = contributions(lambda items: metric(items), texts, cluster)  # another function: nothing is counted ahead
    assert corpus_contributions(name, texts, cluster) == pytest.approx(plain, abs=1e-9)
    assert corpus_contributions(metric, texts, cluster) == pytest.approx(plain, abs=1e-9)
    assert corpus_contributions("unknown", texts, cluster) is None
    assert np.ptp(plain) > 0.1
    low, high = interval(name, plain, cluster)
    assert low < metric(texts) < high


@pytest.mark.nightly
@pytest.mark.parametrize(("name", "clusters"), [("f1", 20), ("matthews_corrcoef", 200)])
def test_equal_models_seldom_get_a_verdict(name: str, clusters: int) -> None:
    """At 5 %, 300 comparisons of models of equal quality: at most 6.5 % and three standard errors; benchmarks have the exact rates."""
    metric, rng, trials, rejected = aggregation(name), np.random.default_rng(11), 300, 0
    assert metric is not None
    cluster = codes([i % clusters for i in range(200)])
    for _ in range(trials):
        gold, hard = rng.random(200) < 0.3, 0.7 * rng.normal(size=200) + 0.5 * rng.normal(size=clusters)[cluster]
        both = []
        for _ in range(2):
            right = hard + 0.7 * rng.normal(size=200) + 0.5 * rng.normal(size=clusters)[cluster] < 1
            both.append(contributions(metric, [[int(g), int(g == r)] for g, r in zip(gold, right, strict=True)], cluster))
        rejected += paired_scores(name, *both, cluster.tolist()).p <= 0.05
    assert 0.01 < rejected / trials < 0.065 + 3 * math.sqrt(0.065 * 0.935 / trials)
