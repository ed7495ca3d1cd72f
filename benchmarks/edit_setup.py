"""Shared parts of the edit benchmarks: a project on a base, CPU seconds of an edit's parts, and a live model to edit."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from workbench.adapters.bind import bind
from workbench.adapters.read import Adapter
from workbench.edit.places.parts import Parts
from workbench.evaluate.lineup import LineupEntry
from workbench.facts.conflicts import import_facts
from workbench.facts.facts import Fact, write_facts
from workbench.ground.errors import WorkbenchError
from workbench.ground.events import Event
from workbench.models.live import compute, live_model
from workbench.recipe.methods import method
from workbench.recipe.recipe import from_data
from workbench.resolve.resolve import resolve
from workbench.resolve.resolved import Resolved
from workbench.run.compose import compose
from workbench.run.materialize import configuration_digest
from workbench.steps import Edit, EditMethod, MethodContext
from workbench.weights.digests import tensor_digest

PROJECT = Path(__file__).resolve().parents[1]
STARTER = "bricks/starter/base"
COUNTERFACT = Path("../shared/data/editing/counterfact_1000.json")
CPU = torch.device("cpu")
LINES = 12  # of events an evaluation shows, about
EVERY = 5.0  # seconds between two notes of how long an edit has taken


def published(path: Path, count: int, neighbours: int, skip: int = 0) -> list[Fact]:
    """Return facts of a published file that convert without conflicts, after the first `skip` ones; exit if there are too few."""
    if not path.is_file():
        raise SystemExit(f"{path}: no such file. Name a CounterFact file with --facts FILE (docs/facts.md lists the formats).")
    imported = import_facts(path, path.name, skip + count, neighbours)
    if len(imported.facts) < skip + count:
        raise SystemExit(f"{path}: {len(imported.facts)} facts convert without conflicts, expected {skip + count}")
    print(f"{count} facts of {path.name}, {len(imported.skipped)} rows skipped", flush=True)
    return imported.facts[skip:]


def make_project(folder: Path, base: Path, facts: Iterable[Fact], name: str = "facts.jsonl") -> Path:
    """Create a project with a base, evals, the starter's bricks and a facts file; keep the cache and scores of an earlier call."""
    (folder / "recipes").mkdir(parents=True, exist_ok=True)
    for link, target in (("base", base), ("bricks", PROJECT / "bricks"), ("evals", PROJECT / "evals")):
        if not (folder / link).is_symlink():
            (folder / link).symlink_to(target.resolve(), target_is_directory=True)
    write_facts(folder / name, list(facts))
    return folder


def write_recipe(project: Path, name: str, document: Mapping[str, Any]) -> Path:
    """Write a recipe on the project's base."""
    path = project / "recipes" / f"{name}.yaml"
    path.write_text(yaml.safe_dump({"version": 1, "base": "base", **document}, sort_keys=False), "utf-8")
    return path


@dataclass
class Clock:
    """Receiver of events that prints some of them and adds up the CPU seconds of each part of an edit.

    Attributes:
        file: Recipe key -> part -> CPU seconds; an interrupted solve goes on where it was, and so do its seconds.
        key: Whose events are heard.
        seconds: Part -> CPU seconds so far.
    """

    file: Path
    key: str
    seconds: dict[str, float] = field(default_factory=dict)
    part: str = "load"
    last: float = field(default_factory=time.process_time)
    kept: float = field(default_factory=time.monotonic)
    shown: str = ""

    def __post_init__(self) -> None:
        self.seconds = dict(clocked(self.file).get(self.key, {}))

    def __call__(self, event: Event) -> None:
        """Receive an event: the seconds since the last event belong to the part that ran until now."""
        if event.get("stage") == "edit" and "done" in event:
            self.note(part_of(event))
        show(event, self)

    def note(self, following: str) -> None:
        """Add the seconds of the part that ends here."""
        now = time.process_time()
        self.seconds[self.part] = self.seconds.get(self.part, 0.0) + now - self.last
        self.last, self.part = now, following
        if time.monotonic() - self.kept > EVERY:
            self.save()

    def save(self) -> None:
        """Write the seconds so far."""
        all_seconds = {**clocked(self.file), self.key: {k: round(v, 3) for k, v in self.seconds.items()}}
        partial = self.file.with_suffix(".partial")
        partial.write_text(json.dumps(all_seconds, indent=1), "utf-8")
        partial.rename(self.file)
        self.kept = time.monotonic()


def clocked(file: Path) -> dict[str, dict[str, float]]:
    """Return recipe key -> part -> CPU seconds of all calls so far."""
    seconds: dict[str, dict[str, float]] = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    return seconds


def part_of(event: Event) -> str:
    """Return the part that runs after an event, such as "values at layer 14", "statistics", "sweep", "trace" or "solve"."""
    text = str(event.get("text", ""))
    if text.startswith(("values", "refining")):
        part_name = "refining" if text.startswith("refining") else text
        return "solve" if event["done"] == event["total"] else part_name
    for start, part in (
        ("where facts", "trace"),
        ("trace", "trace"),
        ("sweep", "sweep"),
        ("statistics", "statistics"),
        ("loss", "training"),
    ):
        if text.startswith(start):
            return part
    return "solve"


def show(event: Event, clock: Clock | None = None) -> None:
    """Print an event; of a series of counted ones about LINES."""
    text = str(event.get("text", ""))
    done, total = event.get("done"), event.get("total")
    if done is not None and total and done != total and done % max(1, total // LINES):
        return
    line = f"  {event.get('configuration') or event.get('step') or ''} {text} {f'{done}/{total}' if total else ''}"
    if clock is None or line != clock.shown:
        print(line, flush=True)
    if clock is not None:
        clock.shown = line


@dataclass(frozen=True)
class Size:
    """The size of a low-rank update, relative to the weight that it changes."""

    tensor: str
    rank: int
    relative: float
    """‖ΔW‖ / ‖W‖, Frobenius norms."""


def sizes(resolved: Resolved) -> list[Size]:
    """Return the sizes of a recipe's edits relative to the base's weights, for recipes whose first steps are edits."""
    sizes_of = []
    for step, place in compose(resolved, CPU).edits.items():
        bound = bind(Adapter(place, step), resolved.base.weights.specs, resolved.base)
        for name in sorted(bound.places):
            factors = bound.factors(name, CPU)
            assert factors is not None
            left, right = factors.left.double(), factors.right.double()
            change = float(((left.T @ left) * (right @ right.T)).sum().clamp(min=0).sqrt())
            sizes_of.append(Size(name, factors.rank, change / float(_tensor(resolved, name).norm())))
    return sizes_of


def _tensor(resolved: Resolved, name: str) -> torch.Tensor:
    spec = resolved.base.weights.specs[name]
    out = torch.empty(spec.rows, spec.cols)
    resolved.base.weights.open(name, CPU).read(0, spec.rows, out)
    return out


def live_context(project: Path, recipe: Mapping[str, Any] | None = None, threads: int = 1) -> MethodContext:
    """Return the context of an edit on a recipe of the project, or on its base, as the engine builds it."""
    from transformers import AutoTokenizer

    torch.set_num_threads(threads)
    resolved = resolve(from_data({"version": 1, "name": "bench", "base": "base", **(recipe or {"steps": []})}, project))
    model = compose(resolved, CPU, show).model
    tensors = compute(model, torch.float32, CPU)
    digests = {name: tensor_digest(tensor) for name, tensor in tensors.items()}
    live = live_model(model.config, tensors, resolved.tokenizer_path, CPU)
    tokenizer = AutoTokenizer.from_pretrained(resolved.tokenizer_path, trust_remote_code=False)
    return MethodContext(live, tokenizer, model, CPU, project, 0, lambda *_: None, resolved.cache, digests)


@contextmanager
def edited(context: MethodContext, parts: Parts, edit: Edit) -> Iterator[None]:
    """Apply an edit to the live model inside the block, and restore its weights afterwards."""
    layers = {f"{module}.weight": layer for layer, module in parts.modules.items()}
    layers |= {tensor: layer for layer, tensor in parts.tensors.items()}
    updates = {}
    for name, factors in edit.factors.items():
        product = (factors.left @ factors.right).float()
        updates[layers[name]] = product.T if parts.transposed else product
    with parts.changed(updates):
        yield


def one_thread() -> None:
    """Use one thread, so that CPU seconds are those of one thread, and hide transformers' progress bars."""
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.disable_progress_bar()


def drop(path: Path) -> None:
    """Remove a cache folder, so that its content is computed again."""
    shutil.rmtree(path, ignore_errors=True)


def solved(project: Path, entry: LineupEntry) -> str | None:
    """Solve a recipe's edit and record its CPU seconds; return the message if the method refuses these facts."""
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


def solve(context: MethodContext, step: Mapping[str, Any]) -> Edit:
    """Solve an edit step that is given as plain data."""
    edit_step = method(EditMethod, str(step["edit"])).model_validate(step)
    return edit_step.solve(context)
