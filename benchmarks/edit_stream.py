"""Measure a stream of updates: what it costs a fact, what it keeps, and what it changes elsewhere, after 1, 10, 100 and 1,000 rows.

    python benchmarks/edit_stream.py                                   the trained fixture, 1,000 rows
    python benchmarks/edit_stream.py --facts 60 --out /tmp/quick.json  a quick look
    python benchmarks/edit_stream.py --base starter --facts 300 --layer 7

Three of ten rows state a new fact; the others update a random earlier one, also one that is updated already. The stream is solved once, batch by
batch, by `edit: memit` in sequential mode. After each checkpoint, the live model is asked (greedy, every token of the target) for the
facts of the latest batch, for all facts with their current values, and for the ten oldest values that are still current; `perplexity` is that of
text that no fact is about. `windows` holds the CPU seconds a row of consecutive parts of the stream, scoring left out: `values` is the
optimization, whose number of steps is given, and `solve` all the rest. `flat` is the ratio of the last window to the second one, because the first begins without history.

CPU seconds of one thread. Results go to benchmarks/results/edit-stream.json.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from edit import _give_back, _resident
from edit_answers import perplexity, scored_answers
from edit_setup import COUNTERFACT, PROJECT, STARTER, live_context, make_project, one_thread, published
from record import parser_of, write_results

from workbench.edit.closed_form import solve as solving
from workbench.edit.closed_form.history import History
from workbench.edit.closed_form.lookup import Group, Lookup
from workbench.edit.closed_form.solve import ClosedFormSolve
from workbench.edit.closed_form.values import values as optimized
from workbench.edit.places.parts import Parts
from workbench.evaluate.facts.definitions import bundled_text
from workbench.facts.facts import Fact, write_facts
from workbench.facts.stream import Stream, latest
from workbench.recipe.methods import method
from workbench.steps import EditMethod, MethodContext

CHECKPOINTS = (1, 10, 100, 1000)
EARLY = 10
NEW = (0, 3, 6)  # last digits of the rows that state new facts
LINES = 60  # of text for the perplexity


def main() -> None:
    """Solve the stream, and write the results file."""
    parser = parser_of(__doc__, "edit-stream")
    parser.add_argument("--base", choices=("fixture", "starter"), default="fixture", help="the model")
    parser.add_argument("--facts", type=int, default=1000, help="number of rows")
    parser.add_argument("--batch", type=int, default=10, help="rows solved together")
    parser.add_argument("--layer", type=int, default=1, help="layer that is edited")
    parser.add_argument("--window", type=int, default=100, help="rows of a window")
    parser.add_argument("--seed", type=int, default=0, help="seed of the updates")
    parser.add_argument("--source", type=Path, default=COUNTERFACT, help="a CounterFact file, for the starter base")
    options = parser.parse_args()
    one_thread()
    with tempfile.TemporaryDirectory() as scratch:
        project, facts, texts, fields = setup(Path(scratch), options)
        rows = stream_of(facts, options.facts, options.seed)
        step = {
            "edit": "memit",
            "facts": "stream.jsonl",
            "layers": [options.layer],
            "position": "subject_last",
            "unconverged": "skip",
            "mode": {"sequential": {"batch": options.batch}},
            **fields,
        }
        measured = Measured(live_context(project), rows, texts, options)
        document = measured.run(step)
    counts = {"rows": len(rows), "facts": len(latest(rows)), "updates": len(rows) - len(latest(rows))}
    write_results(options.out, {"base": options.base, "layer": options.layer, "batch": options.batch, **counts, **document})


def setup(folder: Path, options: argparse.Namespace) -> tuple[Path, list[Fact], list[str], dict[str, Any]]:
    """Return a project on the base, facts to draw from, text for the perplexity, and fields of the step."""
    if options.base == "starter":
        facts = published(options.source, 3 * options.facts // 10 + 100, 0)
        project = make_project(folder, PROJECT / STARTER, facts)
        return project, facts, bundled_text().splitlines()[:LINES], {}
    sys.path.insert(0, str(PROJECT / "tests"))
    from worlds import people

    facts = people.facts(360)
    project = make_project(folder, people.SUBJECT, facts)
    (project / "text.txt").write_text("\n\n".join(people.lines(3000, seed=1)), "utf-8")
    edited = [fact.subject or "" for fact in facts]
    unedited = (line for line in people.lines(20 * LINES, seed=2) if not any(name in line for name in edited))
    return project, facts, [line for line, _ in zip(unedited, range(LINES), strict=False)], {"statistics": "text.txt"}


def stream_of(facts: Sequence[Fact], count: int, seed: int) -> list[Fact]:
    """Return rows of new facts and updates. An update takes another target of the same relation."""
    draw = random.Random(seed)
    targets: dict[str, list[str]] = {}
    for fact in facts:
        targets.setdefault(fact.relation, []).append(fact.target)
    targets = {relation: sorted(set(values)) for relation, values in targets.items()}
    new, current, rows = iter(facts), dict[str, Fact](), list[Fact]()
    while len(rows) < count:
        changeable = [fact for fact in current.values() if len(targets[fact.relation]) > 1]
        if len(rows) % 10 in NEW or not changeable:
            fact = next(new)
        else:
            fact = draw.choice(changeable)
            fact = replace(fact, target=draw.choice([t for t in targets[fact.relation] if t != fact.target]))
        current[fact.text] = fact
        rows.append(fact)
    return rows


@dataclass
class Measured:
    """A stream that is solved under a clock, and scored between its batches.

    Attributes:
        context: Live model.
        rows: The stream.
        texts: Text for the perplexity.
        options: The command line.
        windows: Finished windows.
        points: Scores at checkpoints.
        values: CPU seconds of the optimization in the window so far.
        total: CPU seconds of all batches in the window so far.
        done: Number of rows that are solved.
    """

    context: MethodContext
    rows: list[Fact]
    texts: list[str]
    options: argparse.Namespace
    windows: list[dict[str, Any]] = field(default_factory=list)
    points: list[dict[str, Any]] = field(default_factory=list)
    values: float = 0.0
    total: float = 0.0
    steps: float = 0.0
    done: int = 0

    def run(self, step: dict[str, Any]) -> dict[str, Any]:
        """Solve the first row alone, then the stream."""
        base = {"rows": 0, "perplexity": round(perplexity(self.context, self.texts), 4)}
        print(base, flush=True)
        self.points.append(base)
        for rows in (self.rows[:1], self.rows):
            self.windows, self.values, self.total, self.steps, self.done = [], 0.0, 0.0, 0.0, 0
            self._solve(step, rows)
        full = [window for window in self.windows if window["rows"] == self.options.window]
        flat = {part: round(full[-1][part] / full[1][part], 3) for part in ("values", "solve", "both")} if len(full) > 2 else None
        return {"checkpoints": self.points, "windows": self.windows, "flat": flat}

    def _solve(self, step: dict[str, Any], rows: list[Fact]) -> None:
        """Solve a stream; batches report to this object."""
        write_facts(self.context.project / "stream.jsonl", rows)
        plain_batch = ClosedFormSolve._edit_batch

        def batch(solve: ClosedFormSolve, at: Lookup, groups: Sequence[Group], history: History) -> None:
            start = time.process_time()
            plain_batch(solve, at, groups, history)
            self.total += time.process_time() - start
            self._after(solve, at, min(self.done + self.options.batch, len(rows)), len(rows))

        def values(*arguments: Any) -> Any:
            start = time.process_time()
            found = optimized(*arguments)
            self.values += time.process_time() - start
            self.steps += sum(value.steps for value in found)
            return found

        _forget_peak()
        with patch.object(ClosedFormSolve, "_edit_batch", batch), patch.object(solving, "values", values):
            method(EditMethod, "memit").model_validate(step).solve(self.context)

    def _after(self, solve: ClosedFormSolve, at: Lookup, done: int, total: int) -> None:
        """Close a window, and score at a checkpoint."""
        begun, self.done = self.done, done
        in_window = done - sum(window["rows"] for window in self.windows)
        if in_window >= self.options.window or done == total:
            window: dict[str, Any] = {"rows": in_window, "steps": round(self.steps / in_window, 2)}
            window |= {"values": round(self.values / in_window, 5), "solve": round((self.total - self.values) / in_window, 5)}
            self.windows.append({**window, "both": round(self.total / in_window, 5), "peak": _peak()})
            self.values = self.total = self.steps = 0.0
            _forget_peak()
        if done in CHECKPOINTS or done == total:
            with solve.parts.changed({at.layer: solve.updates[at.layer].float()} if at.layer in solve.updates else {}):
                self.points.append(self._scores(solve.parts, begun, done))
            print(self.points[-1], self.windows[-1:], flush=True)

    def _scores(self, parts: Parts, begun: int, done: int) -> dict[str, Any]:
        """Return shares of facts said after `done` rows, the last batch beginning at row `begun`, and the perplexity."""
        current = Stream(tuple(self.rows[:done])).current
        right = dict(
            zip(
                (f.text for f in current),
                scored_answers(self.context, parts, [(f.text, f.target) for f in current])[1],
                strict=True,
            )
        )
        of_batch = {fact.text for fact in self.rows[begun:done]}
        groups = {"latest": [t for t in right if t in of_batch], "all": list(right), "oldest": list(right)[:EARLY]}
        shares = {name: round(sum(right[t] for t in texts) / len(texts), 4) for name, texts in groups.items()}
        return {"rows": done, "facts": len(current), **shares, "perplexity": round(perplexity(self.context, self.texts), 4)}


def _forget_peak() -> None:
    """Let the peak of the resident memory begin now."""
    _give_back()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int | None:
    """Return the resident bytes at the peak; None if the system does not report them."""
    with suppress(OSError, StopIteration):
        return _resident("VmHWM")
    return None


if __name__ == "__main__":
    main()
