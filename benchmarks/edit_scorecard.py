"""Facts by every edit that teaches some: in projections, in a LoRA (`edit: adapter`), in neurons of their own (`edit: patch`), beside the model.

    python benchmarks/edit_scorecard.py                                       100 CounterFact facts at once, on the starter base
    python benchmarks/edit_scorecard.py --count 20 --draws 3                  three draws of 20
    python benchmarks/edit_scorecard.py --facts recipes/facts/everyday-held.jsonl --skip 0 --count 60 --out benchmarks/results/edit-everyday.json
    python benchmarks/edit_scorecard.py --base DIR                            the same on another model
    python benchmarks/edit_scorecard.py --count 4 --layers 7 --no-retention --limit 4      a quick look

No arm learns a paraphrase, a neighbor or a portability prompt of its facts, so that all of them are held out. `lora` learns the facts alone; the arms `adapter`
also keep the base's distributions after generated prompts and on the built-in text. `patch` takes the neurons of a layer that write least; `patch at subjects` has one for
each subject, at a quarter of the depth. `then ends` is that edit and then neurons for what it does not say and for the end of each text. `memit, five layers` shares what each layer
leaves with the ones above. Earlier choices used the facts before --skip. With --folder DIR the project is kept, and a later call solves and scores only what is missing.

Every score is that of all draws together, with an interval over facts; `against` is the paired difference from memit on the same items. Results go to
benchmarks/results/edit-scorecard.json after each draw.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from edit_setup import (
    COUNTERFACT,
    CPU,
    PROJECT,
    STARTER,
    clocked,
    make_project,
    one_thread,
    published,
    show,
    solved,
    write_recipe,
)
from record import parser_of, write_results

from workbench.compare.tables import tables_of
from workbench.evaluate.lineup import LineupEntry, lineup
from workbench.evaluate.plans import plans, suites_of
from workbench.evaluate.scoring import score_all
from workbench.models.prompts import load_tokenizer
from workbench.recipe.recipe import load_recipe
from workbench.run.compose import compose
from workbench.scores.paired import paired
from workbench.scores.statistics import score_interval
from workbench.scores.store import ScoreStore
from workbench.weights.specs import load

CLOSED = ("rome", "memit", "emmet", "alphaedit", "encore")
MEMIT = {"edit": "memit", "unconverged": "skip"}
ADAPTER = {"edit": "adapter", "paraphrases": False, "min_efficacy": 0}
# `after`: the edit of the same facts that comes before the step.
PATCH = {"edit": "patch", "neighbours": False, "preserve_generated": 400, "min_efficacy": 0}
AT_SUBJECTS = {**PATCH, "position": "subject_last"}
ARMS: dict[str, dict[str, Any]] = {
    "memit": MEMIT,
    **{name: {"edit": name, "unconverged": "skip"} for name in CLOSED if name != "memit"},
    # The layer that the sweep chooses on the starter base, and the four below it.
    "memit, five layers": {**MEMIT, "layers": [3, 4, 5, 6, 7]},
    "patch": {**PATCH, "position": "prompt_last"},
    "patch at subjects": AT_SUBJECTS,
    "patch at subjects, then ends": {**PATCH, "end_of_text": True, "after": AT_SUBJECTS},
    "lora": {**ADAPTER, "preserve_generated": 0, "replay_weight": 0.0},
    "adapter from memit": {**ADAPTER, "start": "memit"},
    **{name: {"edit": name, "min_efficacy": 0} for name in ("ultraedit", "finetune", "grace", "memory")},
}
TASKS = [
    *("efficacy", "paraphrase", "typo", "lower-case", "behind-text", "translated", "chat", "same-subject"),
    *("neighbours", "neighbours-strict", "generated", "text"),
]
TEXT, RETENTION = "text", "retention"


def main() -> None:
    """Score all arms of all draws, and write the results file after each draw."""
    options = options_of(parser_of(__doc__, "edit-scorecard"))
    arms = steps(options)
    one_thread()
    with tempfile.TemporaryDirectory() as scratch:
        pooled = Pooled()
        for number in range(options.draws):
            draw((options.folder or Path(scratch)).resolve(), number, options, arms, pooled)
            base = STARTER if options.base == PROJECT / STARTER else options.base.name
            document = {"base": base, "facts": options.facts.stem}
            document |= {key: getattr(options, key) for key in ("limit", "skip", "count")}
            write_results(options.out, {**document, "draws": number + 1, "rows": pooled.rows(arms)})


def options_of(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Add the options to a command line, and read them."""
    parser.add_argument("--base", type=Path, default=PROJECT / STARTER, help="directory of the model")
    parser.add_argument("--facts", type=Path, default=COUNTERFACT, help="a file of facts")
    parser.add_argument("--count", type=int, default=100, help="number of facts of a draw")
    parser.add_argument("--draws", type=int, default=1)
    parser.add_argument(
        "--skip", type=int, default=500, help="number of facts before the first draw, which earlier choices may have used"
    )
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--layers", type=int, nargs="+", help="layers to edit; default: those that the sweep chooses")
    parser.add_argument("--no-retention", action="store_true", help="leave out the suite `retention`")
    parser.add_argument("--limit", type=int, help="maximum number of items per task, for a quick look")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--folder", type=Path, help="project folder to keep, so that a later call can resume")
    return parser.parse_args()


def steps(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Return arm -> its step without the facts; --layers are those of closed forms, alone and as a start, and of neurons at subjects."""
    arms = {arm: dict(ARMS[arm]) for arm in options.arms}
    for step in arms.values() if options.layers else ():
        step |= placed(step, options.layers)
        if "after" in step:
            step["after"] = {**step["after"], **placed(step["after"], options.layers)}
        if step.get("start") == "memit":
            step["start_fields"] = {"layers": options.layers}
    return arms


def placed(step: dict[str, Any], layers: list[int]) -> dict[str, Any]:
    """Return the field that puts a step at the layers, for steps that write at subjects; a step of several layers keeps their number."""
    if step["edit"] in CLOSED:
        below = len(step.get("layers", layers[:1])) - 1
        return {"layers": [*range(layers[0] - below, layers[0]), *layers]}
    return {"layer": layers[0]} if step.get("position") == "subject_last" else {}


@dataclass
class Pooled:
    """The scores of all draws so far.

    Attributes:
        values: Arm -> task -> scores of its items; the base is an arm.
        facts: Task -> draw and fact of each item.
        perplexity: Arm -> that of the text in each draw.
        seconds: Arm -> CPU seconds of its solve in each draw.
        change: Arm -> largest ‖ΔW‖ / ‖W‖ of a tensor in each draw.
    """

    values: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    facts: dict[str, list[str]] = field(default_factory=dict)
    perplexity: dict[str, list[float]] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    change: dict[str, list[float]] = field(default_factory=dict)

    def rows(self, step_of: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Return one row for each arm."""
        rows = []
        for arm, by_task in self.values.items():
            scores, against = {}, {}
            for task, values in by_task.items():
                numbers, labels = np.asarray(values), np.unique(self.facts[task], return_inverse=True)[1].astype(np.intp)
                low, high = score_interval(numbers, labels)
                scores[task] = {"value": float(numbers.mean()), "low": low, "high": high, "n": len(values)}
                if arm not in ("base", "memit") and "memit" in self.values:
                    pair = paired(self.values["memit"][task], values, self.facts[task])
                    low, high = pair.interval()
                    against[task] = {"diff": pair.diff, "low": low, "high": high}
            changes = [value / base - 1 for value, base in zip(self.perplexity[arm], self.perplexity["base"], strict=True)]
            row = {"row": arm, "scores": scores, "against": against, "perplexity_change": float(np.mean(changes))}
            if arm in step_of:
                row |= {"step": dict(step_of[arm]), "seconds": round(sum(self.seconds[arm]), 1), "change": max(self.change[arm])}
            rows.append(row)
        return rows


def chain(step: Mapping[str, Any], facts: str) -> list[dict[str, Any]]:
    """Return the steps of an arm: the edit `after` which its own one comes, and its own one."""
    edits = [*filter(None, [step.get("after")]), {key: value for key, value in step.items() if key != "after"}]
    return [{**edit, "facts": facts} for edit in edits]


def draw(folder: Path, number: int, options: argparse.Namespace, arms: Mapping[str, Mapping[str, Any]], pooled: Pooled) -> None:
    """Measure all arms on one draw of facts, and add their scores."""
    facts = published(options.facts, options.count, 3, options.skip + number * options.count)
    name = f"draw-{number}.jsonl"
    project = make_project(folder, options.base, facts, name)
    tasks = [task for task in TASKS if task != "translated" or any(fact.translations for fact in facts)]
    if not load_tokenizer(options.base).chat_template:
        tasks.remove("chat")
    suites = [{"facts": name, "tasks": tasks, "controls": []}, *([] if options.no_retention else [RETENTION])]
    recipes = {}
    for arm, step in arms.items():
        file = f"{arm.replace(', ', '-').replace(' ', '-')}-{number}"
        recipes[arm] = write_recipe(project, file, {"name": file, "steps": chain(step, name), "eval": suites})
    loaded = [load_recipe(path) for path in recipes.values()]
    entries = lineup(loaded)
    for entry in entries[1:]:
        if problem := solved(project, entry):
            raise SystemExit(f"{entry.name}: {problem}")
    planned = plans(
        entries, suites_of(loaded, [], project), batch_size=options.batch_size, limit=options.limit, device=CPU, events=show
    )
    store = ScoreStore(project / "scores")
    scores = score_all(entries, planned, store, device=CPU, events=show)
    tables = tables_of(store, scores, {plan.suite.suite: plan.suite for plan in planned})
    kinds = {task: kind for plan in planned if plan.suite.facts for kind, task in plan.suite.facts.tasks.items()}
    seconds = clocked(project / "seconds.json")
    for arm, entry in zip(["base", *recipes], entries, strict=True):
        digest = next(s.configuration.digest for s in scores if entry.name in s.names)
        for table in tables:
            task = kinds.get(table.name, table.name)
            if task == TEXT:
                found = next(s for s in scores if entry.name in s.names and table.name in s.tasks).tasks[table.name]
                pooled.perplexity.setdefault(arm, []).append(found.metrics["word_perplexity"].value)
                continue
            pooled.values.setdefault(arm, {}).setdefault(task, []).extend(table.values[digest].tolist())
            if arm == "base":
                own = f"{number}-" if table.name in kinds else ""  # other tasks have the same items in every draw
                pooled.facts.setdefault(task, []).extend(f"{own}{cluster}" for cluster in table.cluster.tolist())
        if arm != "base":
            pooled.seconds.setdefault(arm, []).append(sum(seconds.get(entry.resolved.key, {}).values()))
            pooled.change.setdefault(arm, []).append(changed(entries[0], entry))


def changed(base: LineupEntry, entry: LineupEntry) -> float:
    """Return the largest ‖ΔW‖ / ‖W‖ of a tensor, with Frobenius norms."""
    before, after = (compose(one.resolved, CPU).model.weights for one in (base, entry))
    pairs = (tuple(load(weights, name, torch.float32) for weights in (before, after)) for name in before.specs)
    return max(float((new - old).norm() / old.norm()) for old, new in pairs)


if __name__ == "__main__":
    main()
