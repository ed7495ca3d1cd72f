"""Every edit method on the same facts: what it teaches, what it spares, what it costs.

    python benchmarks/edit_methods.py                          100 CounterFact facts on the starter base, all at once
    python benchmarks/edit_methods.py --single 100             each fact edited alone as well
    python benchmarks/edit_methods.py --curve                  efficacy against unchanged neighbours, over strengths
    python benchmarks/edit_methods.py --fixture                1, 10, 100 and 1000 facts on the trained fixture
    python benchmarks/edit_methods.py --fixture prompt         the same on the one that finds facts at the prompt's last token
    python benchmarks/edit_methods.py --count 4 --limit 20     a quick look

One recipe a method (`METHODS`), scored by the workbench's own tasks of facts and the suite `retention`: teacher-forced strict greedy
answers (efficacy, paraphrase, neighbours: the base's own answer must stay), token-mean likelihoods against the true answer (ES, PS and NS
of Meng et al. 2022), greedy text with a natural stop, n-gram entropy, perplexity of a fixed text. Intervals are 95 %.

With --folder DIR the project stays, and a later call solves and scores only what is missing. CPU seconds are those of one thread.
Results go to benchmarks/results/edit-methods.json; --fixture writes edit-fixture.json or edit-fixture-prompt.json beside it.
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

from edit_setup import (
    COUNTERFACT,
    CPU,
    PROJECT,
    STARTER,
    Clock,
    clocked,
    make_project,
    one_thread,
    published,
    show,
    sizes,
    write_recipe,
)
from edit_single import curve, held_out, singles
from record import write_results

from workbench.compare.compare import compare
from workbench.errors import WorkbenchError
from workbench.evaluate.lineup import LineupEntry, lineup
from workbench.evaluate.plans import plans
from workbench.evaluate.scoring import score_all
from workbench.evaluate.suitechoice import suites_of
from workbench.facts import Fact
from workbench.facts.imported import import_facts
from workbench.recipe.methods import methods
from workbench.recipe.recipe import load_recipe
from workbench.run.compose import compose
from workbench.run.materialize import configuration_digest
from workbench.scores.plan import ScorePlan
from workbench.scores.store import Scores, ScoreStore, TaskScores

# Row -> fields of its step. All defaults otherwise: nothing is tuned to these facts.
METHODS: dict[str, dict[str, Any]] = {
    "rome": {"edit": "rome", "unconverged": "skip"},
    "memit": {"edit": "memit", "unconverged": "skip"},
    "memit-end": {"edit": "memit", "unconverged": "skip", "end_of_text": True},
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
UNFIT = ("memit-end",)  # on the fixture, whose answers end with a full stop before the end of text
KINDS = ["efficacy", "preferred", "paraphrase", "preferred-paraphrase", "neighbours", "preferred-neighbours", "portability",
         "generated", "entropy", "text"]  # fmt: skip
NUMBERS = (1, 10, 100, 1000)
LINES = 6000  # of the fixture's own text, for second moments


def main() -> None:
    """Measure, write the results file."""
    given = options()
    one_thread()
    with tempfile.TemporaryDirectory() as scratch:
        folder = (given.folder or Path(scratch)).resolve()
        if given.fixture:
            document = fixture(folder, given)
            name = "edit-fixture" if given.fixture == "subject" else "edit-fixture-prompt"
        else:
            document = starter(folder, given)
            name = "edit-methods"
    write_results(given.out or Path(__file__).parent / "results" / f"{name}.json", document)


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--facts", type=Path, default=COUNTERFACT, help="a CounterFact file")
    parser.add_argument("--count", type=int, default=100, help="facts, the first ones that convert without conflicts")
    parser.add_argument(
        "--skip", type=int, default=100, help="facts of the file before them: the defaults were chosen on the first 60"
    )
    parser.add_argument(
        "--neighbours", type=int, default=1, help="neighbours a fact: the file's own, filled up from its other rows"
    )
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), help="rows; all if not given")
    parser.add_argument("--single", type=int, metavar="K", help="also edit the first K facts each alone")
    parser.add_argument(
        "--curve", action="store_true", help="also trade efficacy against neighbours: strengths of memit and rome"
    )
    parser.add_argument(
        "--fixture",
        nargs="?",
        const="subject",
        choices=["subject", "prompt"],
        help="a trained fixture instead of the starter base",
    )
    parser.add_argument("--numbers", type=int, nargs="+", default=NUMBERS, help="numbers of facts on the fixture")
    parser.add_argument("--no-entropy", action="store_true", help="without the long texts whose n-grams are counted")
    parser.add_argument("--dtype", help="what is written and scored; the base's own if not given")
    parser.add_argument("--limit", type=int, help="items a task, for a quick look")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument(
        "--set", dest="settings", action="append", default=[], metavar="ROW.FIELD=VALUE", help="a field of a row's step"
    )
    parser.add_argument("--folder", type=Path, help="a project folder that is kept, so that the work can be taken up again")
    parser.add_argument("--out", type=Path, help="the results file")
    return parser.parse_args()


def starter(folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    """CounterFact facts on the starter base."""
    facts = published(given.facts, given.count, given.neighbours, given.skip)
    project = make_project(folder, PROJECT / STARTER, facts)
    document = {
        "base": STARTER,
        "facts": len(facts),
        "skip": given.skip,
        "file": given.facts.name,
        "prompts": prompts(facts),
        "limit": given.limit,
    }
    document |= measured(project, recipes(project, given, "facts.jsonl", {}, ["retention"]), given)
    if given.single:
        chosen = {"rome", "memit", "emmet", "finetune"} & set(given.methods or METHODS)
        document["single"] = singles(project, facts[: given.single], METHODS, chosen, document["rows"])
    if given.curve:
        others = held_out(facts, import_facts(given.facts, given.facts.name).facts, 2 * given.count)
        document["curve"] = curve(project, facts, others, document["rows"])
    return document


def fixture(folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Facts of the people fixture: what is true is known of every prompt."""
    sys.path.insert(0, str(PROJECT / "tests"))
    from worlds import people

    found = []
    for number in given.numbers:
        facts = people.facts(number)
        model = people.SUBJECT if given.fixture == "subject" else people.PROMPT
        project = make_project(folder, model, facts, f"people-{number}.jsonl")
        (project / "text.txt").write_text("\n\n".join(people.lines(LINES, seed=1)), "utf-8")
        (project / "told.txt").write_text("\n".join(people.lines(400, seed=3)), "utf-8")
        named = recipes(project, given, f"people-{number}.jsonl", FIXTURE, [], f"-{number}")
        found.append({"facts": number, "prompts": prompts(facts), **measured(project, named, given)})
        print(f"{number} facts done", flush=True)
    return {"base": f"tests/fixtures/people/{given.fixture}", "limit": given.limit, "numbers": found}


def prompts(facts: Sequence[Fact]) -> dict[str, int]:
    """How much is asked beside the facts themselves."""
    return {kind: sum(len(getattr(fact, kind)) for fact in facts) for kind in ("paraphrases", "neighbours", "portability")}


def recipes(
    project: Path,
    given: argparse.Namespace,
    facts: str,
    more: Mapping[str, Mapping[str, Any]],
    suites: Sequence[str],
    end: str = "",
) -> dict[str, Path]:
    """Row -> its recipe; methods that this workbench does not have are left out."""
    known = {m.name for m in methods().values() if m.verb == "edit"}
    kinds = [k for k in KINDS if not (given.no_entropy and k == "entropy") and not (k == "portability" and not end)]
    asked = {"facts": facts, "tasks": kinds, **({"text": "told.txt"} if end else {})}
    written = {}
    for name, step in METHODS.items():
        if (given.methods and name not in given.methods) or step["edit"] not in known or (end and name in UNFIT):
            continue
        document: dict[str, Any] = {
            "name": f"{name}{end}",
            "steps": [{**step, "facts": facts, **more.get(name, {}), **_set(given, name)}],
        }
        document |= {"eval": [asked, *suites], **({"output": {"dtype": given.dtype}} if given.dtype else {})}
        written[name] = write_recipe(project, f"{name}{end}", document)
    return written


def _set(given: argparse.Namespace, row: str) -> dict[str, Any]:
    """Fields of a row's step from --set."""
    from workbench.yamldoc import scalar

    pairs = (setting.partition("=") for setting in given.settings)
    return {key.removeprefix(f"{row}."): scalar(value) for key, _, value in pairs if key.startswith(f"{row}.")}


def measured(project: Path, named: Mapping[str, Path], given: argparse.Namespace) -> dict[str, Any]:
    """Solve and score: a row a method, and one for the base."""
    entries = lineup([load_recipe(path) for path in named.values()])
    base, found = entries[0], dict(zip(named, entries[1:], strict=True))
    made = plans(entries, suites_of([e.resolved.recipe for e in found.values()], [], project), batch_size=given.batch_size,
                 limit=given.limit, device=CPU, events=show)  # fmt: skip
    failed = {row: error for row, entry in found.items() if (error := solved(project, entry))}
    scored = [base, *(entry for row, entry in found.items() if row not in failed)]
    scores = score_all(scored, made, ScoreStore(project / "scores"), device=CPU, events=show)
    facts, rest = (_compared(project, scores, made, of_facts) for of_facts in (True, False))
    rows = [_row("base", base, facts, rest, scores)]
    for row, entry in found.items():
        print(f"  {row}: {failed.get(row, 'done')}", flush=True)
        rows.append({"row": row, "error": failed[row]} if row in failed else {
            **_row(row, entry, facts, rest, scores), **_record(entry), "step": json.loads(json.dumps(entry.resolved.recipe.fields.model_dump(mode="json", by_alias=True, exclude_defaults=True)["steps"][0]))})  # fmt: skip
    _seconds(project, rows, found)
    return {"dtype": made[0].dtype, "kinds": [k for p in made if p.suite.facts for k in p.suite.facts.tasks], "rows": rows}


def solved(project: Path, entry: LineupEntry) -> str | None:
    """Solve a recipe's edit, on the clock; the message of one that refuses these facts."""
    print(f"{entry.name}", flush=True)
    clock = Clock(project / "seconds.json", entry.resolved.key)
    try:
        compose(entry.resolved, CPU, clock)
        clock.note("done")
        clock.save()
        configuration_digest(entry.resolved, CPU)
    except WorkbenchError as error:
        return error.message
    return None


def _compared(project: Path, scores: Sequence[Scores], made: Sequence[ScorePlan], of_facts: bool) -> dict[str, Any] | None:
    """The comparison with the base on the facts' own tasks, or on the other suites: two families of tests."""
    suites = {plan.suite.suite: plan.suite for plan in made if (plan.suite.facts is not None) == of_facts}
    mine = [s for s in scores if s.suite in suites]
    return compare(ScoreStore(project / "scores"), mine, suites=suites).document() if mine else None


def _row(
    row: str, entry: LineupEntry, facts: Mapping[str, Any] | None, rest: Mapping[str, Any] | None, scores: Sequence[Scores]
) -> dict[str, Any]:
    """What one configuration scored."""
    assert facts is not None
    (suite,) = facts["facts"]
    configuration = _of(facts["configurations"], entry.name)
    named = suite["tasks"]
    told = {kind: _estimate(configuration["scores"][task]) for kind, task in named.items()}
    if "generated" in named:
        began = _held(entry.name, named["generated"], scores).metrics["starts_with"]
        told["begun"] = {"value": began.value, "low": began.low, "high": began.high, "n": told["generated"]["n"]}
    found: dict[str, Any] = {"row": row, "scores": told}
    if "text" in named:
        found["perplexity"] = _perplexity(entry, named["text"], facts, scores)
    if rest is not None:
        found["retention"] = {"score": _estimate(_of(rest["configurations"], entry.name)["scores"]["retention"])}
        found["retention"] |= _difference(rest, entry.name, "retention")
    return found


def _of(configurations: Sequence[Mapping[str, Any]], name: str) -> Mapping[str, Any]:
    """A configuration, under whatever name its weights are shown."""
    return next(c for c in configurations if name == c["name"] or name in c["aliases"])


def _estimate(score: Mapping[str, Any]) -> dict[str, Any]:
    return {key: score[key] for key in ("value", "low", "high", "n")}


def _difference(document: Mapping[str, Any], name: str, task: str) -> dict[str, Any]:
    """Against the base; nothing for the base itself."""
    row = next((r for r in document["rows"] if r["configuration"] == name and r["task"] == task), None)
    keys = ("diff", "low", "high", "low_adj", "high_adj", "verdict")
    return {} if row is None else {key: row[key] for key in keys}


def _held(name: str, task: str, scores: Sequence[Scores]) -> TaskScores:
    """A configuration's scores on a task, whatever name its weights are shown under."""
    return next(s.tasks[task] for s in scores if name in s.names and task in s.tasks)


def _perplexity(entry: LineupEntry, task: str, facts: Mapping[str, Any], scores: Sequence[Scores]) -> dict[str, Any]:
    """Perplexity of a word, and its relative change with a paired interval.

    The comparison pairs bits per byte, passage by passage. On a fixed text a difference of b bits per byte is one of b · ln 2 · bytes/words nats
    a word, and bytes/words follows from the base's two metrics.
    """
    base, mine = (_held(name, task, scores).metrics for name in ("base", entry.name))
    value, start = mine["word_perplexity"].value, base["word_perplexity"].value
    per_bit = math.log(start) / base["bits_per_byte"].value
    found = {"value": value, "low": mine["word_perplexity"].low, "high": mine["word_perplexity"].high}
    row = _difference(facts, entry.name, task)
    if row:
        found["change"] = {
            "value": value / start - 1,
            **{k: None if row[k] is None else math.expm1(per_bit * row[k]) for k in ("low", "high")},
        }
    return found


def _record(entry: LineupEntry) -> dict[str, Any]:
    """What the method itself recorded, and the size of its update."""
    (record,) = compose(entry.resolved, CPU).records()
    facts = record.get("facts")
    found: dict[str, Any] = {"layers": record.get("layers", record.get("layer")), "positions": record.get("positions")}
    if "position" in record:
        found["positions"] = {str(layer): record["position"] for layer in record["layers"]}
    if isinstance(facts, list):
        found["skipped"] = sum(bool(fact.get("skipped")) for fact in facts)
    found["updates"] = [asdict(size) for size in sizes(entry.resolved)]
    return {key: value for key, value in found.items() if value is not None}


def _seconds(project: Path, rows: Sequence[dict[str, Any]], found: Mapping[str, LineupEntry]) -> None:
    """CPU seconds by part. Values and statistics that a method found in the cache count as they took where they were computed."""
    held = clocked(project / "seconds.json")
    most: dict[str, tuple[float, str]] = {}
    for name, entry in found.items():
        for part, seconds in held.get(entry.resolved.key, {}).items():
            if part == "statistics" or part.startswith("values"):
                most[part] = max(most.get(part, (0.0, name)), (seconds, name))
    for row in rows:
        parts = dict(held.get(found[row["row"]].resolved.key, {})) if row["row"] in found else {}
        shared = {}
        for part in list(_shareable(row, most)):
            if parts.get(part, 0.0) < 0.1 * most[part][0]:
                parts[part], shared[part] = most[part]
        row["seconds"] = {part: round(seconds, 3) for part, seconds in parts.items()}
        if shared:
            row["shared"] = shared


def _shareable(row: Mapping[str, Any], most: Mapping[str, Any]) -> Iterator[str]:
    """Parts that a closed-form row may have found in the cache."""
    if "positions" in row and "skipped" in row:
        wanted = {"statistics", *(f"values at layer {layer}" for layer in row["layers"])}
        yield from (part for part in most if part in wanted)


if __name__ == "__main__":
    main()
