"""The command line: which commands and flags there are, and what bad input gets told."""

from __future__ import annotations

import json
import subprocess
import sys

import typer.main
from typer.testing import CliRunner

from worlds.commands import is_here

from workbench.cli.app import app

# A new command or flag is a decision: settings that decide numbers belong into recipes and suites.
COMMANDS = {
    "analyze": "--answer --chat --count --data --device --dictionary --experts --facts --json --neuron --out --part --partition --quiet --seed --share --shared --sparsity --steps --trust-project-code",
    "brick bake": "--base --device --dtype --json --out --quiet --threads",
    "brick advise": "--base --device --json --measure --quiet --texts --threads --write",
    "brick barrier": "--base --device --json --quiet --text --trust-project-code",
    "brick extract": "--base --device --dtype --embeddings --energy --json --out --quiet --rank --rest --threads --tolerance",
    "brick fetch": "--from --hub",
    "brick ls": "--json",
    "brick show": "--base --card --device --html --json --metric --quiet",
    "brick train": "--base --data --device --epochs --held-out --json --no-score --orthogonal-to --rank --score --steps",
    "brick transplant": "--by --device --force --json --map --on --out --quiet --texts --to",
    "brick verify": "--base",
    "chat": "--device --max-new-tokens --plain --runs-dir --trust-project-code",
    "compare": "--baseline --batch-size --json --limit --max-points --require-safe --runs-dir --set --suite --sweep --trust-project-code",
    "doctor": "--json --runs-dir",
    "edit rebase": "--device --json --onto --out --quiet --remeasure --set --trust-project-code",
    "edit trace": "--count --device --html --json --layers --quiet --trust-project-code",
    "eval": "--baseline --batch-size --controls --device --engine --json --limit --log --log-project --max-points --no-controls --port --quiet --rehash --runs-dir --server --set --suite --sweep --trust-project-code --verbose --wait --watch --workers",
    "experts": "--device --json --quiet --runs-dir --samples --texts --trust-project-code",
    "export check": "--expected --json --quiet --tolerance",
    "export write": "--brick --device --for --json --llama-cpp --out --prompts --quiet --runs-dir --samples --served-base --tokens --trust-project-code",
    "facts check": "--continues --device --encoder --json --model --quiet --recipe --stream --trust-project-code",
    "facts import": "--json --limit --out --rebuild-neighbours",
    "memory add": "--device --quiet --runs-dir --trust-project-code",
    "memory feedback": "--reward --runs-dir --similarity --trust-project-code",
    "memory log": "--json --runs-dir",
    "memory ls": "--json --runs-dir --trust-project-code --version",
    "memory rm": "--runs-dir --trust-project-code",
    "memory update": "--device --quiet --runs-dir --target --trust-project-code",
    "methods": "--json --trust-project-code",
    "open": "--json",
    "plan": "--device --json --max-points --runs-dir --set --sweep --threads --trust-project-code",
    "push": "--base --dry-run --json --licence --license --private --quiet --replace --revision --runs-dir --yes",
    "recipe check": "--max-points --set --sweep --trust-project-code",
    "recipe diff": "--json --trust-project-code",
    "recipe import": "--out",
    "recipe new": "--base --brick --project --suite --task",
    "recipe schema": "",
    "recipe soup": "--base --last --run --suite",
    "report": "--baseline --batch-size --csv --latex --limit --max-points --out --quiet --runs-dir --set --suite --sweep --trust-project-code",
    "route check": "--copies --device --json --no-copies --prompts --quiet --runs-dir --trust-project-code",
    "route explain": "--device --html --json --quiet --runs-dir --trust-project-code",
    "route measure": "--base --calibration --device --json --quiet --samples",
    "route ls": "--json --runs-dir --trust-project-code",
    "route add": "--calibration --description --device --json --quiet --runs-dir --trust-project-code",
    "route rm": "--json --quiet --runs-dir --trust-project-code",
    "run": "--device --json --out --quiet --rehash --require-license --runs-dir --set --threads --trust-project-code --verbose --wait",
    "runs ls": "--json --runs-dir",
    "runs rm": "--runs-dir --yes",
    "runs show": "--json --runs-dir",
    "runs verify": "--accept --runs-dir --trust-project-code",
    "scores export": "--base --device --include-path --num-fewshot --out --trust-project-code",
    "scores pull": "--dry-run --json --quiet --runs-dir",
    "scores import": "--cluster --higher --json --lower --name --quiet --runs-dir --suite",
    "scores items": "--batch-size --first --json --limit --only --runs-dir --set --suite --task --text --trust-project-code",
    "scores ls": "--json --runs-dir",
    "search": "--batch-size --budget --device --json --limit --log --log-project --out --port --quiet --runs-dir --set --trials --trust-project-code --verbose --watch",
    "ship": "--baseline --batch-size --device --json --limit --quiet --runs-dir --trust-project-code --verbose --yes",
    "serve": "--device --host --key --port --runs-dir --seconds --to --trust-project-code",
    "suite check": "--base --json --limit --trust-project-code --verbose",
    "suite ls": "--json",
    "suite new": "--base --cluster --data --drop-duplicates --force --json --kind --role --trust-project-code",
    "suite show": "--base --json --trust-project-code",
    "trust": "--remove",
    "view": "--browser --device --no-browser --port --trust-project-code",
}


def test_commands_and_flags_are_those_listed() -> None:
    found: dict[str, str] = {}

    def walk(command: object, name: str) -> None:
        inner = getattr(command, "commands", None)
        if inner:
            for key, child in inner.items():
                walk(child, f"{name} {key}".strip())
            return
        flags = [o for p in command.params for o in (*p.opts, *p.secondary_opts) if o.startswith("--") and o != "--help"]  # type: ignore[attr-defined]
        found[name] = " ".join(sorted(flags))

    walk(typer.main.get_command(app), "")
    assert found == {name: flags for name, flags in COMMANDS.items() if is_here(name)}


def test_help_loads_no_torch() -> None:
    code = "import sys; from workbench.cli.app import app, main\ntry: main()\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, "--help"], check=True, capture_output=True)


def test_schema_is_json() -> None:
    result = CliRunner().invoke(app, ["recipe", "schema"])
    assert json.loads(result.stdout)["properties"]["version"]["const"] == 1
