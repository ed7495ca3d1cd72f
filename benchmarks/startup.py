"""Start-up of commands that compute nothing or little, on a tiny project: CPU seconds of the process, user and system.

    python benchmarks/startup.py
    python benchmarks/startup.py --runs 9

`seconds` is the median of the runs, `least` the fastest one; one run before them fills the file cache and writes bytecode. The row
`import torch` is Python with torch alone. `run` computes a finished run again after its directory was removed.
Results go to benchmarks/results/startup.json.
"""

from __future__ import annotations

import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from record import parser_of, write_results

PROJECT = Path(__file__).resolve().parents[1]
COMMANDS = {
    "--help": "--help",
    "methods": "methods",
    "recipe check": "recipe check mix",
    "plan": "plan mix",
    "runs ls": "runs ls",
    "brick ls": "brick ls",
    "suite ls": "suite ls",
    "suite show": "suite show words --base base",
    "scores ls": "scores ls",
    "compare": "compare mix --limit 4",
    "report": "report mix --limit 4",
    "run": "run mix --device cpu --threads 1",
}


def lay_out(folder: Path) -> None:
    """Make a project with a base, two adapters, a recipe and a suite, and score it."""
    sys.path.insert(0, str(PROJECT / "tests"))
    from worlds import search_world
    from worlds.project import Project
    from worlds.tiny import save_adapter, save_model

    (folder / "recipes").mkdir()
    save_model(folder / "base")
    for seed, name in enumerate(("one", "two"), 1):
        save_adapter(folder / "base", folder / "bricks" / name, seed=seed)
    project = Project(folder)
    search_world.lay_out(project, items=8, clusters=4)
    project.write(search_world.RECIPE, "mix.yaml")
    cpu_seconds(workbench("eval mix --device cpu --limit 4"), folder)


def workbench(arguments: str) -> list[str]:
    """Return the command line of a command."""
    return [sys.executable, "-m", "workbench", *arguments.split()]


def cpu_seconds(command: list[str], folder: Path) -> float:
    """Return the user and system seconds of a command in a process of its own."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "WORKBENCH_TRUST_PROJECT_CODE": "1"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = parser_of(__doc__, "startup")
    parser.add_argument("--runs", type=int, default=7, help="timed runs of each command")
    given = parser.parse_args()
    rows = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        lay_out(folder)
        commands = {name: workbench(arguments) for name, arguments in COMMANDS.items()}
        commands["python"] = [sys.executable, "-c", ""]
        commands["import torch"] = [sys.executable, "-c", "import torch"]
        for name, command in commands.items():
            times = []
            for _ in range(given.runs + 1):
                if name == "run":
                    shutil.rmtree(folder / "runs", ignore_errors=True)
                times.append(cpu_seconds(command, folder))
            rows[name] = {"seconds": round(statistics.median(times[1:]), 2), "least": round(min(times[1:]), 2)}
            print(f"{name:14} {rows[name]['seconds']:.2f} s, at least {rows[name]['least']:.2f}")
    write_results(given.out, {"runs": given.runs, "commands": rows})


if __name__ == "__main__":
    main()
