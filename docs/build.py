"""Write what the documents take from elsewhere: pages from the code, tables from committed results and brick cards.

python docs/build.py           writes the files that differ
python docs/build.py --check   writes nothing; exit status 1 when a file differs

A table stands between `<!-- NAME:begin -->` and `<!-- NAME:end -->`; `BLOCKS` says which names there are.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # its neighbours, however this file is loaded

import assistant_figure
import command_page
import edit_tables
import error_tables
import family_tables
import fault_tables
import grow_tables
import merge_tables
import method_pages
import mutant_tables
import neuron_set_tables
import neuron_tables
import other_tables
import pools_figure
import prune_figure
import road_figure
import route_tables
import scoring_tables
import speed_tables
import update_tables
import yaml
from cells import BLOCKS, MISSING, SIGNED, SIGNS, block, interval, points, results, signed, table

from workbench.bricks.card import BrickCard, library
from workbench.cli import published

PROJECT = Path(__file__).resolve().parents[1]
TABLES = (
    edit_tables,
    error_tables,
    family_tables,
    fault_tables,
    grow_tables,
    merge_tables,
    mutant_tables,
    neuron_set_tables,
    neuron_tables,
    other_tables,
    route_tables,
    scoring_tables,
    speed_tables,
    update_tables,
)
"""Modules that register blocks of pages."""
RESULTS = "benchmarks/results/starter.json"
SMOKE = "benchmarks/results/starter-smoke.json"
DEMO = "benchmarks/results/starter-demo.json"
SIX = "benchmarks/results/starter-six.json"
MARK = re.compile(r"(?P<begin><!-- (?P<name>[\w-]+):begin -->\n)(?P<body>.*?)(?P<end><!-- (?P=name):end -->)", re.DOTALL)


def outputs(project: Path) -> dict[Path, str]:
    """Every file that this script writes -> the text that it has to hold."""
    docs = project / "docs"
    generated = {**method_pages.pages(evidence(project)), **published.pages(), **command_page.command_pages()}
    found = {docs / name: text for name, text in generated.items()}
    for path in (project / "README.md", *sorted(docs.rglob("*.md"))):
        text = path.read_text("utf-8")
        if path not in found and MARK.search(text):
            found[path] = fill(text, project)
    found[docs / "architecture.svg"] = road_figure.figure((docs / "architecture.md").read_text("utf-8"))
    if (families := results(project, family_tables.FAMILIES)) is not None:
        found[docs / "families.csv"] = family_tables.families_csv(families, results(project, family_tables.PUBLISHED))
    if (assistant := results(project, assistant_figure.RESULTS)) is not None:
        found[docs / assistant_figure.FIGURE] = assistant_figure.figure(assistant)
    if (pruned := results(project, grow_tables.PRUNE)) is not None:
        found[docs / grow_tables.PRUNE_FIGURE] = prune_figure.figure(pruned)
    if (pools := results(project, merge_tables.POOLS)) is not None:
        found[docs / merge_tables.POOLS_FIGURE] = pools_figure.figure(pools)
    return found


def stale(texts: Mapping[Path, str]) -> list[Path]:
    """Files of `outputs` that are missing or hold something else."""
    return [p for p, text in texts.items() if not p.is_file() or p.read_text("utf-8") != text]


def evidence(project: Path) -> dict[str, str]:
    """Tag of a merge method -> what the comparison of one merge a method says of it, where a starter recipe has this one merge."""
    found = results(project, SMOKE)
    rows = {(r["configuration"], r["task"]): r for r in found["rows"]} if found else {}
    said = {}
    for c in found["configurations"] if found else ():
        path = project / "recipes" / f"{c['name']}.yaml"
        steps = yaml.safe_load(path.read_text("utf-8")).get("steps", []) if path.is_file() else []
        if len(steps) == 1 and "merge" in steps[0] and c["kept_mean"]:
            fields = {k: v for k, v in steps[0].items() if k not in ("id", "merge", "bricks")}
            shown = ", ".join(f"`{k}: {v}`" for k, v in fields.items()) or "its defaults"
            said[f"merge:{steps[0]['merge']}"] = (
                f"[`recipes/{path.name}`](../../recipes/{path.name}) merges three LoRA bricks of the starter base with {shown}. It keeps "
                f"{interval(c['kept_mean'])} % of the bricks' skills; retention differs from the base by {_difference(rows.get((c['name'], 'retention')))} points ([all methods](../results.md#one-merge-a-method))."
            )
    return said


def fill(text: str, project: Path) -> str:
    """A document with its marked blocks written anew. Errors: a name that no block has."""
    return MARK.sub(lambda m: f"{m['begin']}\n{BLOCKS[m['name']](project).rstrip()}\n\n{m['end']}", text)


@block("results", DEMO, cited=False)
def results_block(found: dict[str, Any]) -> str:
    """The README's sentence: which configuration of the demo to ship, and what it and the others keep of three skills and of retention."""
    chosen = found["recommendation"]["configuration"]
    row = {r["configuration"]: r for r in found["rows"] if r["task"] == "retention"}
    others = [c for c in found["configurations"] if c["role"] == "configuration" and c["name"] != chosen]
    (best,) = (c for c in found["configurations"] if c["name"] == chosen)
    said = [
        f"`{c['name']}` keeps {interval(c['kept_mean'])} % and is {row[c['name']]['verdict']} ({_difference(row[c['name']])})"
        for c in others
    ]
    return (
        f"`make demo` says: ship `{chosen}`. It keeps {interval(best['kept_mean'])} % of what its three bricks score alone, and is {row[chosen]['verdict']} on "
        f"retention ({_difference(row[chosen])} points). {'; '.join(said)}: [all scores](docs/results.md#the-demo)."
    )


@block("demo", DEMO)
def demo_block(found: dict[str, Any]) -> str:
    """The committed comparison of the demo: its three bricks alone, their merges and their route, on their tasks and on retention."""
    legend = (
        f"Percent of items with 95 % intervals; {SIGNED}; against {found['baseline']}. Kept: share of the bricks' own scores, corrected for chance. Difference: in "
        f"points, interval adjusted for the number of comparisons."
    )
    return "\n\n".join([_scores(found, found["configurations"], found["tasks"]), legend])


@block("whole", RESULTS)
def whole_block(found: dict[str, Any]) -> str:
    """Every configuration of the committed comparison on every task that sets one of them apart from the base."""
    decided = {row["task"] for row in found["rows"] if row["verdict"] in ("better", "worse")}
    same = [f"`{t['task']}`" for t in found["tasks"] if t["task"] not in decided]
    parts = [
        _scores(
            found,
            found["configurations"],
            [t for t in found["tasks"] if t["task"] in decided and (t["role"] == "skill") is skill],
        )
        for skill in (True, False)
    ]
    left_out = f" No configuration is better or worse on {', '.join(same)}." if same else ""
    return "\n\n".join([*parts, _legend(found) + left_out])


@block("six", SIX)
def six_block(found: dict[str, Any]) -> str:
    """The merge of six skills and its controls: skills, then retention, function modelling and the gain from its story."""
    parts = [
        _scores(found, found["configurations"], [t for t in found["tasks"] if (t["role"] == "skill") is skill])
        for skill in (True, False)
    ]
    return "\n\n".join([*parts, _legend(found)])


@block("smoke", SMOKE)
def smoke_block(found: dict[str, Any]) -> str:
    """One untuned merge of the same three bricks a method, on a quarter of the items."""
    return "\n\n".join([_scores(found, found["configurations"], found["tasks"]), _legend(found)])


@block("interference", RESULTS, cited=False)
def interference_block(found: dict[str, Any]) -> str:
    """Each brick alone minus the base, on every task."""
    matrix = found["interference"]
    rows = [
        [f"`{brick}`", *(f"{signed(d)} {SIGNS.get(v, '')}" for d, v in zip(diffs, verdicts, strict=True))]
        for brick, diffs, verdicts in zip(matrix["bricks"], matrix["diff"], matrix["verdict"], strict=True)
    ]
    return table(["brick alone", *matrix["tasks"]], rows, left=1)


def _scores(found: Mapping[str, Any], shown: Sequence[Mapping[str, Any]], tasks: Sequence[Mapping[str, Any]]) -> str:
    """A row for each configuration, a column for each task; kept beside skills, the difference beside retention."""
    rows = {(row["configuration"], row["task"]): row for row in found["rows"]}
    skills = any(t["role"] == "skill" for t in tasks)
    kept_back = [t["task"] for t in tasks if t["role"] == "retention"]
    heads = [
        "configuration",
        *(f"{t['task']} (n = {t['n']}{', lower is better' if t.get('lower') else ''})" for t in tasks),
        *(["kept"] if skills else []),
    ]
    heads += [f"{t}, difference" for t in kept_back]
    lines = []
    for c in shown:
        cells = [_name(c), *(_scored(c["scores"].get(t["task"]), rows.get((c["name"], t["task"]))) for t in tasks)]
        cells += [interval(c["kept_mean"])] if skills else []
        lines.append(cells + [_difference(rows.get((c["name"], task))) for task in kept_back])
    return table(heads, lines, left=1)


def skills_block(project: Path) -> str:
    """The brick library: what each brick teaches, how it was trained, its held-out score beside the base's."""
    cards = [card for _, card in library(project)]
    if not cards:
        return MISSING
    rows = [
        [f"`{card.name}`", card.skill, *_training(card), s.task, str(s.n), interval(s.model_dump()), points(s.base_value)]
        for card in cards
        for s in card.scores
    ]
    rows += [[f"`{card.name}`", card.skill, *_training(card), "", "", MISSING, ""] for card in cards if not card.scores]
    heads = ["brick", "skill", "trained", "steps", "task", "n", "alone", "base"]
    return table(heads, sorted(rows), left=3) + "\n\nScores in percent of items, with 95 % intervals."


def items_block(project: Path) -> str:
    """The local tasks' data: number of items and of templates, and the first item."""
    rows = []
    for path in sorted((project / "evals" / "tasks" / "data").glob("*.jsonl")):
        items = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        first = items[0]
        rows.append(
            [
                f"`{path.stem}`",
                f"{_start(first['prompt'])} → {first['answer']}".replace("\n", " / "),
                str(len(items)),
                str(len({i["cluster"] for i in items})),
            ]
        )
    return table(["task", "first item", "items", "clusters"], rows)


def _start(text: str, most: int = 100) -> str:
    return text if len(text) <= most else f"{text[:most].rsplit(maxsplit=1)[0]} …"


def _scored(score: Mapping[str, Any] | None, row: Mapping[str, Any] | None) -> str:
    return " ".join(filter(None, [interval(score), SIGNS[row["verdict"]] if row else ""]))


def _difference(row: Mapping[str, Any] | None) -> str:
    if not row:
        return ""
    low, high = (signed(row[k]) for k in ("low_adj", "high_adj"))
    return f"{signed(row['diff'])} [{low}, {high}]" if low and high else signed(row["diff"])


def _name(configuration: Mapping[str, Any]) -> str:
    role = {"brick": " (brick alone)", "average": " (control)"}.get(configuration["role"], "")
    return f"{configuration['name']}{role}"


def _legend(found: Mapping[str, Any]) -> str:
    return (
        f"Scores in percent of items with 95 % intervals; {SIGNED}; against {found['baseline']}, {found['family']['alpha']:.0%} "
        "a family. Kept: share of the best parents' scores, corrected for chance. Difference: in points, adjusted interval."
    )


def _training(card: BrickCard) -> list[str]:
    how = f"LoRA, rank {card.training.get('rank')}" if card.kind == "adapter" else "full fine-tune"
    return [how, str(card.training.get("steps", ""))]


BLOCKS.update(
    {
        "items": items_block,
        "skills": skills_block,
    }
)


def main(arguments: list[str]) -> int:
    """Write or check; returns the exit status."""
    check = "--check" in arguments
    found = outputs(PROJECT)
    differ = stale(found)
    for path in differ:
        if not check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(found[path], "utf-8")
        sys.stdout.write(f"{'differs' if check else 'written'}: {path.relative_to(PROJECT)}\n")
    if check and differ:
        sys.stdout.write("`make docs` writes them\n")
    return 1 if check and differ else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
