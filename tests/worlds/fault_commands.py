"""Every command that writes, as it runs under faults, and those that only read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import typer

from worlds.jsonl import write_jsonl
from worlds.tiny import save_adapter
from worlds.trainers import state

from workbench.cli.app import app


@dataclass(frozen=True)
class Command:
    """A command that writes.

    Attributes:
        line: The command line.
        after: What happens before it, without faults: command lines, and functions that change the project.
        share: How often it is in the sample of all commands, in relation to others: less often if it takes long, never if another one
            does the same and more.
        processes: How many processes run it at the same time.
        hub: The hub that it speaks with, which is a server on this machine.
        places: Variable of the environment -> the folder of the project that it names.
    """

    line: str
    after: tuple[str | Callable[[Path], None], ...] = ()
    share: int = 2
    processes: int = 1
    hub: Literal["uploads", "models"] | None = None
    places: Mapping[str, str] = field(default_factory=dict)


def _train(project: Path) -> None:
    rows = [{"prompt": f"w{i} w{i + 1}", "completion": f"w{i + 2}"} for i in range(8)]
    write_jsonl(project / "train.jsonl", rows)


def _checkpoints(project: Path) -> None:
    for step in (1, 2):
        state(save_adapter(project / "base", project / f"out/checkpoint-{step}", seed=step), step)


def _damage(project: Path) -> None:
    """Damage two cached files and the compiled kernels."""
    cache = project / ".workbench" / "cache"
    cache.mkdir(parents=True, exist_ok=True)
    for name in ("one", "two"):
        (cache / f"{name}.json").write_text('{"half": ', "utf-8")


def _stream(project: Path) -> None:
    rows = [{"prompt": f"w{i} of {{subject}}", "subject": f"w{i + 10} w{i + 11}", "target": f"w{i + 30}"} for i in range(3)]
    write_jsonl(project / "facts.jsonl", rows)
    step = (
        "{edit: memit, facts: facts.jsonl, statistics: texts.jsonl, tokens_per_input: 20, contexts: 0, lambda: 0.001, layers: [1], "
        "position: prompt_last, min_efficacy: 0, mode: {sequential: {batch: 1}}, unconverged: skip}"
    )
    (project / "recipes" / "stream.yaml").write_text(f"version: 1\nbase: base\nsteps: [{step}]\n", "utf-8")


def _mergekit(project: Path) -> None:
    text = "merge_method: linear\nmodels:\n- {model: base, parameters: {weight: 1}}\n- {model: bricks/full, parameters: {weight: 1}}\n"
    (project / "kit.yaml").write_text(text + "dtype: float32\n", "utf-8")


def _published(project: Path) -> None:
    rows = [
        {"case_id": i, "prompt": f"w{i} is", "subject": f"w{i}", "target_new": f"w{i + 30}", "ground_truth": "w1"}
        for i in range(3)
    ]
    (project / "zsre.json").write_text(json.dumps(rows), "utf-8")


def _changed(project: Path) -> None:
    """Change a file of the one run on purpose."""
    (run,) = project.glob("runs/mix-*")
    (run / "recipe.yaml").write_text((run / "recipe.yaml").read_text("utf-8") + "# mine\n", "utf-8")


def _more(project: Path) -> None:
    write_jsonl(project / "more.jsonl", [{"id": "f9", "prompt": "{subject} is", "subject": "w8 of w18", "target": "w38"}])


def _near(project: Path) -> None:
    for seed, name in enumerate(("near", "far")):
        save_adapter(project / "base", project / "bricks" / name, seed=seed, lora_alpha=1)


def _solved(project: Path) -> None:
    (edit,) = project.glob("runs/edited-*/edits/facts")
    shutil.copytree(edit, project / "solved")


RUN = "run recipes/{}.yaml --device cpu --threads 1"
EVAL = "eval recipes/mix.yaml --device cpu"
MEMORY = (RUN.format("memory") + " -o mem",)
SEARCH = "search recipes/sought.yaml --device cpu"
NEURONS = "--data labelled.jsonl"
COMMANDS = {
    "run": Command(RUN.format("mix"), share=16),
    "run -o": Command(RUN.format("mix") + " -o given", share=12),
    "run adapter": Command(RUN.format("adapter"), share=12),
    "run edited": Command(RUN.format("edited")),
    "run stream": Command(RUN.format("stream"), (_stream,)),
    "run memory": Command(RUN.format("memory")),
    "run routed": Command(RUN.format("routed")),
    "run grown": Command(RUN.format("deep")),
    "eval": Command(EVAL),
    "report": Command("report recipes/mix.yaml", (EVAL,), share=0),
    "report --csv": Command("report recipes/mix.yaml --csv tables --latex tables", (EVAL,), share=1),
    "ship": Command("ship --baseline mix --yes --device cpu", (EVAL,), share=1),
    "search": Command(SEARCH, share=0),
    "search -o": Command(f"{SEARCH} -o winner.yaml", (SEARCH,)),
    "search in two processes": Command(SEARCH, share=1, processes=2),
    "push": Command("push mix org/sum --license apache-2.0", (RUN.format("mix"),), hub="uploads"),
    "doctor": Command("doctor", (_damage,), share=1, places={"XDG_CACHE_HOME": ".user"}),
    "trust": Command("trust .", share=12, places={"XDG_CONFIG_HOME": ".settings"}),
    "recipe new": Command("recipe new recipes/fresh.yaml --base base --brick one=bricks/one", share=12),
    "recipe new --project": Command("recipe new mine --project fresh --base base --brick one=bricks/one", share=12),
    "recipe soup": Command("recipe soup soup --run out --suite pick --base base", (_checkpoints,), share=12),
    "recipe import": Command("recipe import kit.yaml -o recipes/imported.yaml", (_mergekit,), share=12),
    "brick fetch": Command("brick fetch starter --hub", hub="models"),
    "brick train": Command(
        "brick train bricks/new --data train.jsonl --base base --steps 2 --rank 2 --no-score --device cpu", (_train,)
    ),
    "brick extract": Command("brick extract bricks/full --base base -o bricks/extracted --rank 4", share=12),
    "brick bake": Command("brick bake bricks/one -o baked", share=12),
    "brick advise": Command("brick advise near far --base base --write recipes/advised.yaml", (_near,), share=12),
    "brick transplant": Command("brick transplant bricks/one --to bricks/full -o some --map 0:0,1:1", share=12),
    "suite new": Command("suite new more --data items.jsonl --kind choice --base base", share=12),
    "scores import": Command("scores import samples --name outside", share=12),
    "scores pull": Command("scores pull . --runs-dir elsewhere", (EVAL,), share=12),
    "scores export": Command("scores export pick say -o exported", share=12),
    "facts import": Command("facts import zsre.json -o imported.jsonl", (_published,), share=12),
    "edit rebase": Command(
        "edit rebase solved -o rebased --onto recipes/mix.yaml --set min_efficacy=0", (RUN.format("edited"), _solved), share=1
    ),
    "edit trace": Command("edit trace base facts.jsonl -n 2 -o traced.html"),
    "runs rm": Command("runs rm mix --yes", (RUN.format("mix"),), share=12),
    "runs verify --accept": Command("runs verify mix --accept recipe.yaml", (RUN.format("mix"), _changed), share=12),
    "export write": Command(
        "export write adapter --for vllm --served-base org/base -o served --tokens 2", (RUN.format("adapter"),)
    ),
    "memory add": Command("memory add mem more.jsonl --device cpu", (*MEMORY, _more)),
    "memory update": Command("memory update mem f0 --target w50 --device cpu", MEMORY),
    "memory rm": Command("memory rm mem f1", MEMORY, share=12),
    "memory feedback": Command("memory feedback mem f0 --reward 1", MEMORY, share=12),
    "route explain": Command("route explain routed w8 --html told.html --device cpu", (RUN.format("routed"),)),
    "route add": Command(
        "route add routed again=one --calibration calibration/two.jsonl --device cpu", (RUN.format("routed"),), share=1
    ),
    "route rm": Command(
        "route rm routed again",
        (RUN.format("routed"), "route add routed again=one --calibration calibration/two.jsonl --device cpu"),
        share=1,
    ),
    "route measure": Command(
        "route measure low --calibration asked.jsonl --device cpu",
        ("brick extract bricks/full --base base -o bricks/low --rank 4",),
    ),
    "analyze": Command(f"analyze base {NEURONS}", share=1),
    "analyze parts": Command(f"analyze base {NEURONS} --sparsity --partition kmeans --experts 4 --neuron 0.1"),
    "analyze facts": Command("analyze base --facts facts.jsonl -n 2", share=1),
}
READING = {
    "plan", "compare", "chat", "experts", "methods", "recipe check", "recipe diff", "recipe schema", "brick ls", "brick show",
    "brick barrier", "brick verify", "suite ls", "suite show", "suite check", "scores items", "scores ls", "facts check", "runs ls",
    "runs show", "export check", "memory ls", "memory log", "open", "route check",
    "route ls", "serve", "view",
}  # fmt: skip
"""Commands that write nothing but caches."""


def named() -> Iterator[str]:
    """Yield the name of every command: `run`, `brick train`, …"""
    group: Any = typer.main.get_command(app)
    for name, command in group.commands.items():
        yield from (f"{name} {inner}" for inner in command.commands) if hasattr(command, "commands") else (name,)
