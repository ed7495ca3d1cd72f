"""Compare all edit methods on models of 0.6 M parameters that know their facts: efficacy, unchanged neighbors and cost.

    python benchmarks/edit_methods.py --fixture                1, 10, 100 and 1000 facts on the one that finds facts at the subject
    python benchmarks/edit_methods.py --fixture prompt         the same on the one that finds facts at the prompt's last token
    python benchmarks/edit_methods.py --numbers 10 --limit 20  a quick look

There is one recipe per method (`METHODS`). It is scored on the workbench's tasks of facts: teacher-forced strict greedy answers (efficacy,
paraphrases, and neighbors, whose answers must not change), token-mean likelihoods against the true answer (ES, PS and NS of Meng et al.
2022), greedy text with a natural stop, n-gram entropy, and perplexity of a fixed text. Intervals are 95 %. The starter base is measured by
`edit_scorecard.py`.

With --folder DIR the project is kept, and a later call solves and scores only what is missing. CPU seconds are those of one thread.
Results go to benchmarks/results/edit-fixture.json or edit-fixture-prompt.json.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from edit_setup import CPU, PROJECT, clocked, make_project, one_thread, show, sizes, solved, write_recipe
from record import write_results

from workbench.compare.compare import compare
from workbench.evaluate.lineup import LineupEntry, lineup
from workbench.evaluate.plans import plans, suites_of
from workbench.evaluate.scoring import score_all
from workbench.facts.facts import Fact
from workbench.recipe.methods import methods
from workbench.recipe.recipe import load_recipe
from workbench.run.compose import compose
from workbench.scores.store import Scores, ScoreStore, TaskScores

# Row -> fields of its step. All defaults otherwise: nothing is tuned to these facts.
METHODS: dict[str, dict[str, Any]] = {
    "rome": {"edit": "rome", "unconverged": "skip"},
    "memit": {"edit": "memit", "unconverged": "skip"},
    "emmet": {"edit": "emmet", "unconverged": "skip"},
    "alphaedit": {"edit": "alphaedit", "unconverged": "skip"},
    "encore": {"edit": "encore", "unconverged": "skip"},
    "ultraedit": {"edit": "ultraedit"},
    "finetune": {"edit": "finetune"},
    "finetune-lora": {"edit": "finetune", "form": "lora"},
    "grace": {"edit": "grace"},
    "memory": {"edit": "memory"},
}
# More fields for the fixture: its own text, and as many steps as a model of 0.6 M parameters needs.
FIXTURE: dict[str, dict[str, Any]] = {
    **{name: {"statistics": "text.txt"} for name in ("rome", "memit", "emmet", "alphaedit", "encore")},
    "finetune": {"layers": [2], "epochs": 100, "learning_rate": 2e-3},
    "finetune-lora": {"layers": [2], "epochs": 100, "learning_rate": 3e-3},
}
KINDS = [
    "efficacy",
    "preferred",
    "paraphrase",
    "preferred-paraphrase",
    "neighbours",
    "preferred-neighbours",
    "portability",
    "generated",
    "entropy",
    "text",
]
NUMBERS = (1, 10, 100, 1000)
LINES = 6000  # of the fixture's own text, for second moments


def main() -> None:
    """Measure all methods and write the results file."""
    options = parse_options()
    one_thread()
    with tempfile.TemporaryDirectory() as scratch:
        folder = (options.folder or Path(scratch)).resolve()
        document = fixture(folder, options)
        name = "edit-fixture" if options.fixture == "subject" else "edit-fixture-prompt"
    write_results(options.out or Path(__file__).parent / "results" / f"{name}.json", document)


def parse_options() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), help="rows to measure; default: all")
    parser.add_argument(
        "--fixture",
        nargs="?",
        default="subject",
        const="subject",
        choices=["subject", "prompt"],
        help="where the model finds facts",
    )
    parser.add_argument("--numbers", type=int, nargs="+", default=NUMBERS, help="numbers of facts on the fixture")
    parser.add_argument("--no-entropy", action="store_true", help="skip the long texts whose n-grams are counted")
    parser.add_argument("--limit", type=int, help="maximum number of items per task, for a quick look")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument(
        "--set", dest="settings", action="append", default=[], metavar="ROW.FIELD=VALUE", help="set a field of a row's step"
    )
    parser.add_argument("--folder", type=Path, help="project folder to keep, so that a later call can resume")
    parser.add_argument("--out", type=Path, help="the results file")
    return parser.parse_args()


def fixture(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Measure facts of the people fixture, where the true answer to every prompt is known."""
    sys.path.insert(0, str(PROJECT / "tests"))
    from worlds import people

    results = []
    for number in options.numbers:
        facts = people.facts(number)
        model = people.SUBJECT if options.fixture == "subject" else people.PROMPT
        project = make_project(folder, model, facts, f"people-{number}.jsonl")
        (project / "text.txt").write_text("\n\n".join(people.lines(LINES, seed=1)), "utf-8")
        (project / "told.txt").write_text("\n".join(people.lines(400, seed=3)), "utf-8")
        recipe_files = recipes(project, options, number)
        results.append({"facts": number, "prompts": prompts(facts), **measured(project, recipe_files, options)})
        print(f"{number} facts done", flush=True)
    return {"base": f"tests/fixtures/people/{options.fixture}", "limit": options.limit, "numbers": results}


def prompts(facts: Sequence[Fact]) -> dict[str, int]:
    """Return the number of prompts by kind, besides the facts' own."""
    return {kind: sum(len(getattr(fact, kind)) for fact in facts) for kind in ("paraphrases", "neighbours", "portability")}


def recipes(project: Path, options: argparse.Namespace, number: int) -> dict[str, Path]:
    """Return row -> recipe file, without methods that this workbench does not have."""
    known = {m.name for m in methods().values() if m.verb == "edit"}
    facts = f"people-{number}.jsonl"
    suite = {"facts": facts, "tasks": [k for k in KINDS if not (options.no_entropy and k == "entropy")], "text": "told.txt"}
    files = {}
    for name, step in METHODS.items():
        if (options.methods and name not in options.methods) or step["edit"] not in known:
            continue
        fields = {**step, "facts": facts, **FIXTURE.get(name, {}), **_set(options, name)}
        files[name] = write_recipe(project, f"{name}-{number}", {"name": f"{name}-{number}", "steps": [fields], "eval": [suite]})
    return files


def _set(options: argparse.Namespace, row: str) -> dict[str, Any]:
    """Return the fields of a row's step that --set gives."""
    from workbench.ground.yamldoc import scalar

    pairs = (setting.partition("=") for setting in options.settings)
    return {key.removeprefix(f"{row}."): scalar(value) for key, _, value in pairs if key.startswith(f"{row}.")}


def measured(project: Path, recipe_files: Mapping[str, Path], options: argparse.Namespace) -> dict[str, Any]:
    """Solve and score: one row per method, and one for the base."""
    entries = lineup([load_recipe(path) for path in recipe_files.values()])
    base, entry_of = entries[0], dict(zip(recipe_files, entries[1:], strict=True))
    score_plans = plans(
        entries,
        suites_of([e.resolved.recipe for e in entry_of.values()], [], project),
        batch_size=options.batch_size,
        limit=options.limit,
        device=CPU,
        events=show,
    )
    failed = {row: error for row, entry in entry_of.items() if (error := solved(project, entry))}
    scored = [base, *(entry for row, entry in entry_of.items() if row not in failed)]
    scores = score_all(scored, score_plans, ScoreStore(project / "scores"), device=CPU, events=show)
    suites = {plan.suite.suite: plan.suite for plan in score_plans}
    facts = compare(ScoreStore(project / "scores"), scores, suites=suites).to_dict()
    rows = [_row("base", base, facts, scores)]
    for row, entry in entry_of.items():
        print(f"  {row}: {failed.get(row, 'done')}", flush=True)
        rows.append(
            {"row": row, "error": failed[row]}
            if row in failed
            else {
                **_row(row, entry, facts, scores),
                **_record(entry),
                "step": json.loads(
                    json.dumps(
                        entry.resolved.recipe.fields.model_dump(mode="json", by_alias=True, exclude_defaults=True)["steps"][0]
                    )
                ),
            }
        )
    _seconds(project, rows, entry_of)
    return {
        "dtype": score_plans[0].dtype,
        "kinds": [k for p in score_plans if p.suite.facts for k in p.suite.facts.tasks],
        "rows": rows,
    }


def _row(row: str, entry: LineupEntry, facts: Mapping[str, Any], scores: Sequence[Scores]) -> dict[str, Any]:
    """Return the scores of one configuration."""
    (suite,) = facts["facts"]
    configuration = _of(facts["configurations"], entry.name)
    tasks = suite["tasks"]
    kind_scores = {kind: _estimate(configuration["scores"][task]) for kind, task in tasks.items()}
    if "generated" in tasks:
        starts = _scores_on(entry.name, tasks["generated"], scores).metrics["starts_with"]
        kind_scores["begun"] = {"value": starts.value, "low": starts.low, "high": starts.high, "n": kind_scores["generated"]["n"]}
    result: dict[str, Any] = {"row": row, "scores": kind_scores}
    if "text" in tasks:
        result["perplexity"] = _perplexity(entry, tasks["text"], facts, scores)
    return result


def _of(configurations: Sequence[Mapping[str, Any]], name: str) -> Mapping[str, Any]:
    """Return a configuration by its name or an alias."""
    return next(c for c in configurations if name == c["name"] or name in c["aliases"])


def _estimate(score: Mapping[str, Any]) -> dict[str, Any]:
    return {key: score[key] for key in ("value", "low", "high", "n")}


def _difference(document: Mapping[str, Any], name: str, task: str) -> dict[str, Any]:
    """Return the difference from the base; empty for the base itself."""
    row = next((r for r in document["rows"] if r["configuration"] == name and r["task"] == task), None)
    keys = ("diff", "low", "high", "low_adj", "high_adj", "verdict")
    return {} if row is None else {key: row[key] for key in keys}


def _scores_on(name: str, task: str, scores: Sequence[Scores]) -> TaskScores:
    """Return a configuration's scores on a task, by its name or an alias."""
    return next(s.tasks[task] for s in scores if name in s.names and task in s.tasks)


def _perplexity(entry: LineupEntry, task: str, facts: Mapping[str, Any], scores: Sequence[Scores]) -> dict[str, Any]:
    """Return the word perplexity, and its relative change with a paired interval.

    The comparison pairs bits per byte, passage by passage. On a fixed text a difference of b bits per byte is one of b · ln 2 · bytes/words nats
    a word, and bytes/words follows from the base's two metrics.
    """
    base, edited = (_scores_on(name, task, scores).metrics for name in ("base", entry.name))
    value, start = edited["word_perplexity"].value, base["word_perplexity"].value
    per_bit = math.log(start) / base["bits_per_byte"].value
    result: dict[str, Any] = {"value": value, "low": edited["word_perplexity"].low, "high": edited["word_perplexity"].high}
    row = _difference(facts, entry.name, task)
    if row:
        result["change"] = {
            "value": value / start - 1,
            **{k: None if row[k] is None else math.expm1(per_bit * row[k]) for k in ("low", "high")},
        }
    return result


def _record(entry: LineupEntry) -> dict[str, Any]:
    """Return the method's own record, and the size of its update."""
    (record,) = compose(entry.resolved, CPU).records()
    facts = record.get("facts")
    result: dict[str, Any] = {"layers": record.get("layers", record.get("layer")), "positions": record.get("positions")}
    layers = record.get("layers")
    if "position" in record and isinstance(layers, list | tuple):
        result["positions"] = {str(layer): record["position"] for layer in layers}
    if isinstance(facts, list):
        result["skipped"] = sum(bool(fact.get("skipped")) for fact in facts)
    result["updates"] = [asdict(size) for size in sizes(entry.resolved)]
    return {key: value for key, value in result.items() if value is not None}


def _seconds(project: Path, rows: Sequence[dict[str, Any]], entry_of: Mapping[str, LineupEntry]) -> None:
    """Add CPU seconds by part. Values and statistics from the cache count with the seconds of the method that computed them."""
    seconds_of = clocked(project / "seconds.json")
    most: dict[str, tuple[float, str]] = {}
    for name, entry in entry_of.items():
        for part, seconds in seconds_of.get(entry.resolved.key, {}).items():
            if part == "statistics" or part.startswith("values"):
                most[part] = max(most.get(part, (0.0, name)), (seconds, name))
    for row in rows:
        parts = dict(seconds_of.get(entry_of[row["row"]].resolved.key, {})) if row["row"] in entry_of else {}
        shared = {}
        for part in list(_shareable(row, most)):
            if parts.get(part, 0.0) < 0.1 * most[part][0]:
                parts[part], shared[part] = most[part]
        row["seconds"] = {part: round(seconds, 3) for part, seconds in parts.items()}
        if shared:
            row["shared"] = shared


def _shareable(row: Mapping[str, Any], most: Mapping[str, Any]) -> Iterator[str]:
    """Yield the parts that a closed-form row may have read from the cache."""
    if "positions" in row and "skipped" in row:
        cached = {"statistics", *(f"values at layer {layer}" for layer in row["layers"])}
        yield from (part for part in most if part in cached)


if __name__ == "__main__":
    main()
