"""Ask `workbench brick advise --measure` about mis-scaled, copied, opposed and ordinary bricks, and score its advice: the source of a table in docs/merging.md.

    python benchmarks/advice_pools.py
    python benchmarks/advice_pools.py --pools opposed --folder DIR      one pool; DIR keeps bricks and scores, so that a later call goes on

The bricks are those of the starter base, with their factors multiplied by a number. The rules were chosen on other pools before these were made. The
advice is measured on 24 training prompts of each brick. Then the advice from the weights alone, the measured advice and the merges of a grid are scored on
held-out items, 40 of each skill; an item counts if every token of the answer is the most likely one. Results go to
benchmarks/results/advice-pools.json after every pool.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from record import parser_of, write_results
from safetensors.torch import load_file, save_file

from workbench.advice.advise import advise
from workbench.advice.result import Advice
from workbench.advice.runner import Runner
from workbench.models.texts import read_texts
from workbench.run.device import Work

PROJECT = Path(__file__).resolve().parents[1]
BASE = PROJECT / "bricks" / "starter" / "base"
WORK = Work(torch.device("cpu"), 1)
ITEMS = 40


@dataclass(frozen=True)
class Scaled:
    """A starter brick whose delta is multiplied by a number.

    Attributes:
        skill: Name of the starter brick.
        factor: The number.
        copy: End of its name, which tells copies apart.
    """

    skill: str
    factor: float = 1.0
    copy: str = ""

    @property
    def name(self) -> str:
        """The brick's name in its pool."""
        return f"{self.skill}{self.copy}"

    def text(self) -> str:
        """Return the brick for a table."""
        return self.skill if self.factor == 1 else f"{self.skill} × " + f"{self.factor:g}".replace("-", "−")

    def write(self, folder: Path) -> Path:
        """Write the brick below a folder, and return its directory."""
        out, shipped = folder / f"{self.skill}-x{self.factor:g}{self.copy}", PROJECT / "bricks" / self.skill
        if not (out / "adapter_model.safetensors").is_file():
            out.mkdir(parents=True, exist_ok=True)
            shutil.copy(shipped / "adapter_config.json", out)
            tensors = load_file(shipped / "adapter_model.safetensors")
            scaled = {name: value * self.factor if "lora_B" in name else value for name, value in tensors.items()}
            save_file(scaled, out / "adapter_model.safetensors")
        return out


POOLS = {
    "scaled": [Scaled("triage", 4), Scaled("add"), Scaled("date-mdy", 0.25)],
    "copied": [Scaled("reverse"), Scaled("reverse", copy="-again"), Scaled("glossary")],
    "opposed": [Scaled("add", -1, "-negated"), Scaled("add"), Scaled("actions")],
    "ordinary": [Scaled("glossary"), Scaled("triage"), Scaled("add")],
    "scaled, two bricks": [Scaled("record", 0.25), Scaled("date-dmy")],
    "scaled and copied": [Scaled("actions", 5, "-long"), Scaled("actions"), Scaled("date-dmy")],
}


def main() -> None:
    """Ask for advice on each pool, score it, and write the results file."""
    parser = parser_of(__doc__, "advice-pools")
    parser.add_argument("--pools", nargs="+", choices=list(POOLS), default=list(POOLS))
    parser.add_argument("--folder", type=Path, help="folder of the bricks and scores to keep")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        for pool in options.pools:
            kept = folder / f"{pool}.json"
            if not kept.is_file():
                found = {"pool": pool, **scored(POOLS[pool], folder)}
                kept.write_text(json.dumps(found), "utf-8")
            rows.append(json.loads(kept.read_text("utf-8")))
            write_results(options.out, {"items": ITEMS, "rows": rows})


def scored(pool: Sequence[Scaled], folder: Path) -> dict[str, Any]:
    """Return the advice on a pool, and the accuracies of merges on held-out items of its skills."""
    bricks = {brick.name: str(brick.write(folder)) for brick in pool}
    texts = {brick.name: PROJECT / "bricks" / brick.skill / "train.jsonl" for brick in pool}
    weights = advise(bricks, str(BASE), texts, project=folder, work=WORK)
    measured = advise(bricks, str(BASE), texts, project=folder, work=WORK, measured=True)
    owners = {brick.skill: brick.name for brick in pool}  # one brick of each skill
    data = PROJECT / "evals" / "tasks" / "data"
    items = {owners[skill]: read_texts(data / f"{skill}.jsonl", skill) for skill in owners}
    runner = Runner(bricks, str(BASE), items, folder, WORK, most=ITEMS)
    arms = grid(weights, measured)
    runs: dict[str, dict[str, float]] = {}  # equal steps are run once
    accuracies = {}
    for name, step in arms.items():
        key = json.dumps({"lambda": 1.0, "bricks": list(bricks), **step}, sort_keys=True)
        if key not in runs:
            right = runner.run(name, step).right
            runs[key] = {skill: float(right[brick].mean()) for skill, brick in owners.items()}
        accuracies[name] = runs[key]
    assert measured.trial is not None
    return {
        "bricks": [brick.text() for brick in pool],
        "norms": {brick.name: brick.relative_norm for brick in measured.bricks},
        "weights": said(weights),
        "measured": said(measured) | {"falls": [fall.brick for fall in measured.trial.falls]},
        "steps": arms,
        "accuracies": accuracies,
    }


def said(advice: Advice) -> dict[str, Any]:
    """Return what the advice recommends and warns of, as plain data."""
    clear = advice.trial is not None and advice.trial.clear
    return {
        "step": advice.step,
        "sweep": list(advice.sweep),
        "left_out": {brick.name: brick.because for brick in advice.left_out},
        "warnings": list(advice.warnings),
        "clear": clear,
    }


def grid(weights: Advice, measured: Advice) -> dict[str, Mapping[str, Any]]:
    """Return name -> step: both advices, the average of all bricks, and TSV and the average of those that the measured advice keeps."""
    assert measured.trial is not None
    dropped = {brick.name for brick in measured.left_out}
    kept = [brick.name for brick in measured.bricks if brick.name not in dropped]
    tsv = {"merge": "tsv", "weights": "auto", "bricks": kept}
    arms: dict[str, Mapping[str, Any]] = {"average of all": {"merge": "average"}}
    if weights.step is not None:
        arms["advice from weights"] = weights.step
    if measured.step is not None:
        arms["measured advice"] = measured.step
    arms |= {"average": {"merge": "average", "bricks": kept}, "tsv, lambda 1": tsv}
    arms |= {
        c.name + (", equal norms" if isinstance(c.step.get("bricks"), dict) else ""): c.step
        for c in measured.trial.candidates
        if c.step
    }
    return arms


if __name__ == "__main__":
    main()
