"""Measure how many facts of an edit survive a merge with two skills (task arithmetic, TIES, DARE), and after a rebase onto it.

    python benchmarks/edit_merge.py
    python benchmarks/edit_merge.py --methods memit rome --count 50
    python benchmarks/edit_merge.py --count 4 --limit 8        a quick look

CounterFact facts are solved on the starter base and kept as an edit brick (`METHOD`). Configurations, for each merge (`MERGES`):

    MERGE                   the skills `add` and `reverse` alone: the control, for targets that the merge gives without the edit
    MERGE-METHOD            the same merge with the edit brick as a third brick
    MERGE-METHOD-rebased    the skills' merge, and on it the edit as `workbench edit rebase` solves it there

A fact survives if both the edit alone on the base and the configuration give its target (teacher-forced, strict greedy).
With --folder DIR the project is kept, and a later call solves and scores only what is missing. Results go to
benchmarks/results/edit-merge.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edit_setup import COUNTERFACT, CPU, PROJECT, STARTER, Clock, make_project, one_thread, published, show, sizes
from record import parser_of, write_results

from workbench.compare.compare import compare
from workbench.evaluate.lineup import LineupEntry
from workbench.evaluate.plans import plans, suites_of
from workbench.evaluate.scoring import score_all
from workbench.facts.facts import Fact
from workbench.recipe.recipe import from_data
from workbench.resolve.resolve import resolve
from workbench.run.compose import compose
from workbench.run.opened import NamedModel
from workbench.scores.store import Scores, ScoreStore
from workbench.upkeep.rebase import rebase

SKILLS = ("add", "reverse")
MERGES: dict[str, dict[str, Any]] = {
    "task-arithmetic": {"merge": "task_arithmetic", "lambda": 1.0},
    "ties": {"merge": "ties", "density": 0.2, "lambda": 1.0},
    "dare": {"merge": "dare", "density": 0.5, "lambda": 1.0},
}
KINDS = ["efficacy", "paraphrase", "neighbours", "generated"]
WANTED = 0.95  # of the facts that are right after the edit alone, after a rebase


def main() -> None:
    """Solve, merge, rebase and score edits, and write the results file."""
    parser = parser_of(__doc__, "edit-merge")
    parser.add_argument("--facts", type=Path, default=COUNTERFACT, help="a CounterFact file")
    parser.add_argument("--count", type=int, default=50, help="number of facts: the first ones that convert without conflicts")
    parser.add_argument(
        "--skip", type=int, default=100, help="number of facts to skip before them; the defaults were chosen on the first 60"
    )
    parser.add_argument(
        "--methods", nargs="+", default=["memit"], choices=["memit", "rome", "emmet", "alphaedit", "encore", "finetune"]
    )
    parser.add_argument("--merges", nargs="+", default=list(MERGES), choices=list(MERGES))
    parser.add_argument(
        "--set", dest="settings", action="append", default=[], metavar="FIELD=VALUE", help="set a field of the edit steps"
    )
    parser.add_argument("--limit", type=int, help="maximum number of items per task, for a quick look")
    parser.add_argument("--items", type=int, default=80, help="items of each skill")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--folder", type=Path, help="project folder to keep, so that a later call can resume")
    options = parser.parse_args()
    one_thread()
    facts = sorted(published(options.facts, options.count, 1, options.skip), key=lambda fact: fact.id)
    with tempfile.TemporaryDirectory() as scratch:
        project = make_project((options.folder or Path(scratch)).resolve(), PROJECT / STARTER, facts)
        document = {
            "base": STARTER,
            "facts": len(facts),
            "file": options.facts.name,
            "skip": options.skip,
            "skills": list(SKILLS),
            "limit": options.limit,
        }
        document["merges"] = {name: MERGES[name] for name in options.merges}
        write_results(options.out, {**document, **measured(Bench(project, options), facts)})


class Bench:
    """The configurations of one call, as recipes of its project."""

    def __init__(self, project: Path, options: argparse.Namespace) -> None:
        self.project, self.options = project, options
        suites = [{"facts": "facts.jsonl", "tasks": KINDS}, {"tasks": list(SKILLS), "limit": options.items}]
        self.common: dict[str, Any] = {"version": 1, "base": "base", "eval": suites}

    def entry(
        self, name: str, steps: Sequence[Mapping[str, Any]], bricks: Mapping[str, str], role: str = "configuration"
    ) -> LineupEntry:
        """Return a configuration."""
        return LineupEntry(
            name, role, resolve(from_data({**self.common, "name": name, "bricks": bricks, "steps": steps}, self.project))
        )

    def solved(self, method: str) -> tuple[Path, dict[str, Any]]:
        """Return the folder of a method's edit brick on the base, and its record."""
        from workbench.ground.yamldoc import scalar

        fields = {key: scalar(value) for key, _, value in (setting.partition("=") for setting in self.options.settings)}
        skip = {} if method == "finetune" else {"unconverged": "skip"}
        step = {"edit": method, "facts": "facts.jsonl", **skip, **fields}
        entry = self.entry(f"solve-{method}", [step], {})
        place = self.project / "edits" / method
        clock = Clock(self.project / "seconds.json", entry.resolved.key)
        composition = compose(entry.resolved, CPU, clock)
        clock.note("done")
        clock.save()
        (cached,) = composition.edits.values()
        _copy(cached, place)
        (record,) = composition.records()
        skipped = [fact["id"] for fact in record["facts"] if fact.get("skipped")] if isinstance(record["facts"], list) else []
        parts = {part: round(seconds, 2) for part, seconds in clock.seconds.items()}
        return place, {
            "step": step,
            "layers": record["layers"],
            "skipped": skipped,
            "seconds": parts,
            "updates": [vars(size) for size in sizes(entry.resolved)],
        }

    def control(self, merge: str) -> LineupEntry:
        """Return the merge of the skills alone."""
        return self.entry(merge, [self.step(merge, SKILLS)], self.skills())

    def merged(self, merge: str, method: str, brick: Path) -> LineupEntry:
        """Return the merge of the skills and the edit brick."""
        bricks = {**self.skills(), method: self._relative(brick)}
        return self.entry(f"{merge}-{method}", [self.step(merge, [*SKILLS, method])], bricks)

    def rebased(self, merge: str, method: str, brick: Path) -> tuple[LineupEntry, dict[str, Any]]:
        """Return the merge of the skills with the edit solved again on it, and the record of the rebase."""
        name = f"{merge}-{method}-rebased"
        place = self.project / "edits" / name
        if not place.is_dir():
            rebase(brick, NamedModel(merge, self.control(merge).resolved), place, device=CPU, events=show)
        record = json.loads((place / "edit.json").read_text("utf-8"))["rebased"]
        steps = [self.step(merge, SKILLS), {"merge": "task_arithmetic", "bricks": {name: 1.0}, "lambda": 1.0}]
        return self.entry(name, steps, {**self.skills(), name: self._relative(place)}), record

    def step(self, merge: str, bricks: Sequence[str]) -> dict[str, Any]:
        """Return the merge step of some bricks, all with weight 1."""
        return {**MERGES[merge], "bricks": dict.fromkeys(bricks, 1.0)}

    def skills(self) -> dict[str, str]:
        """Return the skills' bricks."""
        return {name: f"bricks/{name}" for name in SKILLS}

    def _relative(self, brick: Path) -> str:
        return str(brick.relative_to(self.project))


def measured(bench: Bench, facts: Sequence[Fact]) -> dict[str, Any]:
    """Return one row per method: the edit alone, and the three configurations of each merge."""
    base = LineupEntry("base", "base", bench.entry("base", [], {}).resolved)
    controls = [bench.control(merge) for merge in bench.options.merges]
    rows = []
    for method in bench.options.methods:
        print(method, flush=True)
        brick, record = bench.solved(method)
        bricks = {method: bench._relative(brick)}
        alone = bench.entry(method, [{"merge": "task_arithmetic", "bricks": {method: 1.0}, "lambda": 1.0}], bricks, "brick")
        merged = [bench.merged(merge, method, brick) for merge in bench.options.merges]
        rebased = [bench.rebased(merge, method, brick) for merge in bench.options.merges]
        scores = scored(bench, [base, alone, *controls, *merged, *(entry for entry, _ in rebased)])
        rows.append({"method": method, **record, **summary(bench, scores, method, {e.name: r for e, r in rebased})})
        for merge, result in rows[-1]["merges"].items():
            print(f"  {merge}: { ({k: v['efficacy'] for k, v in result.items()}) }", flush=True)
    survival = [result["rebased"]["survival"]["efficacy"]["value"] for row in rows for result in row["merges"].values()]
    return {"rows": rows, "rebased_at_least": WANTED, "reached": all(value is not None and value >= WANTED for value in survival)}


def scored(bench: Bench, entries: Sequence[LineupEntry]) -> list[Scores]:
    """Score facts and skills."""
    options = bench.options
    suites = suites_of([entries[0].resolved.recipe], [], bench.project)
    score_plans = plans(entries, suites, batch_size=options.batch_size, limit=options.limit, device=CPU, events=show)
    return score_all(entries, score_plans, ScoreStore(bench.project / "scores"), device=CPU, events=show)


def summary(bench: Bench, scores: Sequence[Scores], method: str, records: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the scores of the edit alone, and for each merge the scores and surviving facts of its three configurations."""
    document = compare(ScoreStore(bench.project / "scores"), scores, baseline="base").to_dict()
    configurations = {name: c for c in document["configurations"] for name in (c["name"], *c["aliases"])}
    (suite,) = document["facts"]
    (survival,) = suite["survival"]

    def of(name: str) -> dict[str, Any]:
        scores = configurations[name]["scores"]
        facts_scores = {
            kind: {k: scores[task][k] for k in ("value", "low", "high", "n")} for kind, task in suite["tasks"].items()
        }
        skills = {task: {k: scores[task][k] for k in ("value", "low", "high", "n")} for task in SKILLS}
        return {**facts_scores, "skills": skills, "survival": survival["rows"].get(configurations[name]["name"], {})}

    merges = {
        merge: {"control": of(merge), "merged": of(f"{merge}-{method}"), "rebased": of(f"{merge}-{method}-rebased")}
        for merge in bench.options.merges
    }
    rebased = {merge: dict(records[f"{merge}-{method}-rebased"]) for merge in bench.options.merges}
    return {"base": of("base"), "alone": of(method), "merges": merges, "rebases": rebased}


def _copy(place: Path, out: Path) -> None:
    """Copy an edit from the cache to a brick of the project."""
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(place, out)


if __name__ == "__main__":
    main()
