"""Measure CPU seconds, wall time and peak resident memory of merges of large checkpoints, beside mergekit in the same run.

    python benchmarks/merge.py --size M

Random bf16 llama checkpoints: a base, three fine-tunes, three rank-16 adapters. For each method, in turn: the workbench on one
thread, mergekit with its common `dtype: bfloat16`, mergekit in float32, and the workbench on two threads. Every measurement is
one whole process, pinned to its cores, with its inputs in the page cache; each tool's start-up is measured by the same merge of
a tiny model. The workbench starts without any remembered digest. The floor is a process that reads the inputs into one buffer and writes the output.
`cold` has wall seconds of the workbench and of the floor after posix_fadvise(DONTNEED) on every input, so that both read from the disk.
Results go to benchmarks/results/merge-<size>.json with machine, command and commit. Needs about 9x the model's size on disk
(S: 1.0 GB, M: 3.2 GB a model); removed at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from models import SHAPES, make_models
from record import write_results

HERE = Path(__file__).parent
METHODS = ("linear", "task_arithmetic", "slerp", "dare", "dare_l1", "ties", "lora")
"""dare scales by 1/density as its paper does, dare_l1 as mergekit does, for one more pass; both elect signs."""
DENSITY = 0.2
# Runs a command, reports its children's CPU seconds and its peak resident memory.
MEASURE = """
import json, os, resource, subprocess, sys, time
start = time.time()
done = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
use = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps({"wall": time.time() - start, "cpu": use.ru_utime + use.ru_stime, "peak": use.ru_maxrss * 1024, "rc": done.returncode,
                  "error": done.stderr[-2000:]}))
"""
# Reads files into one reused buffer and writes as many bytes as the first has: CPU seconds of that alone.
FLOOR = """
import json, os, sys, time
out, files = sys.argv[1], sys.argv[2:]
buffer = bytearray(512 * 1024)
start, wall = time.process_time(), time.time()
for name in files:
    descriptor, offset = os.open(name, os.O_RDONLY), 0
    while count := os.preadv(descriptor, [buffer], offset):
        offset += count
    os.close(descriptor)
piece, size = bytes(512 * 1024), os.path.getsize(sys.argv[2] if os.path.getsize(sys.argv[2]) > 1e6 else files[-1])
descriptor = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
os.ftruncate(descriptor, size)
for offset in range(0, size, len(piece)):
    os.pwrite(descriptor, piece[: size - offset], offset)
print(json.dumps({"cpu": time.process_time() - start, "wall": time.time() - wall}))
os.unlink(out)
"""


def recipe(folder: Path, method: str) -> Path:
    """Write the workbench's recipe for one method: weight 1 for each of three bricks, slerp halfway between two."""
    names = "ab" if method == "slerp" else "abc"
    bricks = {n: str(folder / (f"l{n}" if method == "lora" else n)) for n in names}
    step: dict[str, Any] = {"merge": {"lora": "task_arithmetic", "dare_l1": "dare"}.get(method, method)}
    step |= {
        "ties": {"density": DENSITY, "weigh": "before", "divide": "weight"},
        "dare": {"density": DENSITY, "then": "ties"},
        "dare_l1": {"density": DENSITY, "rescale": "l1", "then": "ties"},
    }.get(method, {})
    path = folder / "recipes" / f"{method}.yaml"
    path.parent.mkdir(exist_ok=True)
    data = {"version": 1, "base": str(folder / "base"), "bricks": bricks, "steps": [step], "output": {"dtype": "bfloat16"}}
    path.write_text(json.dumps(data))
    return path


def peer(folder: Path, method: str, dtype: str) -> Path:
    """Write the same merge in mergekit's syntax, computed in `dtype`."""
    names = "ab" if method == "slerp" else "abc"
    where = {n: f"{folder / 'base'}+{folder / f'l{n}'}" if method == "lora" else str(folder / n) for n in names}
    config: dict[str, Any] = {
        "merge_method": {"dare": "dare_ties", "lora": "task_arithmetic"}.get(method, method),
        "dtype": dtype,
        "out_dtype": "bfloat16",
    }
    parameters = {"weight": 1.0, **({"density": DENSITY} if method in ("ties", "dare") else {})}
    if method == "slerp":
        config |= {"base_model": where["a"], "parameters": {"t": 0.5}}
        config["models"] = [{"model": path} for path in where.values()]
    else:
        config["models"] = [{"model": path, "parameters": parameters} for path in where.values()]
        config |= {} if method == "linear" else {"base_model": str(folder / "base")}
    path = folder / f"mergekit-{method}-{dtype}.yaml"
    path.write_text(json.dumps(config))
    return path


def measure(command: list[str], threads: int, cpus: str) -> dict[str, float]:
    """Measure one process, pinned to `cpus`."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    process = subprocess.run(
        [*pin(cpus), sys.executable, "-c", MEASURE, *command], capture_output=True, text=True, env=environment, check=True
    )
    result: dict[str, float] = json.loads(process.stdout)
    if result["rc"]:
        sys.exit(f"{' '.join(command)} failed:\n{result['error']}")
    return {k: round(result[k], 2) for k in ("wall", "cpu", "peak")}


def pin(cpus: str) -> list[str]:
    """Return the command prefix that keeps a process on some cores; empty if taskset is not installed."""
    return ["taskset", "-c", cpus] if shutil.which("taskset") else []


def ours(folder: Path, method: str, threads: int, last: int, device: str = "cpu", *, cold: bool = False) -> dict[str, float]:
    """Measure the workbench without earlier runs and cached digests."""
    file = recipe(folder, method)
    for name in ("runs", ".workbench"):
        shutil.rmtree(folder / name, ignore_errors=True)
    command = [sys.executable, "-m", "workbench", "run", str(file), "--quiet", "--device", device, "--threads", str(threads)]
    planned = subprocess.run(
        [sys.executable, "-m", "workbench", "plan", str(file), "--json"], capture_output=True, text=True, check=True
    )
    (cool if cold else warm)(folder, method)
    result = measure(command, 1, ",".join(map(str, range(last, last - threads, -1))))
    shutil.rmtree(folder / "runs")
    return {**result, "planned_peak": json.loads(planned.stdout)["peak_bytes"]}


def theirs(folder: Path, method: str, dtype: str, cpus: str, flags: tuple[str, ...] = ()) -> dict[str, float]:
    """Measure mergekit's command line."""
    command = [str(Path(sys.executable).parent / "mergekit-yaml"), str(peer(folder, method, dtype)), str(folder / "out"), *flags]
    warm(folder, method)
    if method == "lora":
        command += ["--lora-merge-cache", str(folder / "lora")]
    result = measure(command, 1, cpus)
    for name in ("out", "lora"):
        shutil.rmtree(folder / name, ignore_errors=True)
    return result


def inputs(folder: Path, method: str) -> list[str]:
    """Return the files that a merge reads."""
    names = {"linear": "abc", "slerp": "ab"}.get(method, ["base", *(["la", "lb", "lc"] if method == "lora" else "abc")])
    return [str(next((folder / n).glob("*.safetensors"))) for n in names]


def warm(folder: Path, method: str) -> None:
    """Read a merge's inputs into the page cache, because an earlier process may have displaced them."""
    for name in inputs(folder, method):
        with open(name, "rb", buffering=0) as stream:
            while stream.read(1 << 22):
                pass


def cool(folder: Path, method: str) -> None:
    """Drop a merge's inputs from the page cache; pages that were never written to the disk would stay."""
    os.sync()
    for name in inputs(folder, method):
        with open(name, "rb", buffering=0) as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def floor(folder: Path, method: str, last: int, *, cold: bool = False) -> dict[str, float]:
    """Measure reading of the inputs and writing of the output, without start-up."""
    (cool if cold else warm)(folder, method)
    files = inputs(folder, method)
    process = subprocess.run(
        [*pin(str(last)), sys.executable, "-c", FLOOR, str(folder / "floor"), *files], capture_output=True, text=True, check=True
    )
    return {k: round(v, 2) for k, v in json.loads(process.stdout).items()}


def compare(folder: Path, tiny: Path, method: str, dtypes: list[str], measured: dict[Any, Any]) -> dict[str, Any]:
    """Measure one method: both tools in turn, their start-up, the floor. `measured` keeps mergekit's figures for dare_l1."""
    last = (os.cpu_count() or 1) - 1
    # The less of two in turn: another guest of the machine's processor can only slow a process down.
    own, bare = zip(*((ours(folder, method, 1, last), floor(folder, method, last)) for _ in range(2)), strict=True)
    row: dict[str, Any] = {"method": method, "workbench": min(own, key=_cpu), "floor": min(bare, key=_cpu)}
    start = min(ours(tiny, method, 1, last)["cpu"] for _ in range(2))
    work = max(row["workbench"]["cpu"] - start, 0.01)
    row |= {"start_cpu": start, "over_floor": round(work / row["floor"]["cpu"], 2)}
    walls = [
        min(f(folder, method, cold=True)["wall"] for _ in range(2))
        for f in (partial(ours, threads=1, last=last), partial(floor, last=last))
    ]
    row["cold"] = {"workbench": walls[0], "floor": walls[1], "over_floor": round(walls[0] / walls[1], 2)}
    for dtype in dtypes:
        if (method.removesuffix("_l1"), dtype) not in measured:
            measured[method, dtype] = theirs(folder, method, dtype, str(last)), theirs(tiny, method, dtype, str(last))["cpu"]
        result, peer_start = measured[method.removesuffix("_l1"), dtype]
        row[f"mergekit_{dtype}"] = {
            **result,
            "start_cpu": peer_start,
            "cpu_ratio": round(result["cpu"] / row["workbench"]["cpu"], 1),
            "cpu_ratio_without_start": round((result["cpu"] - peer_start) / work, 1),
            "peak_ratio": round(result["peak"] / row["workbench"]["peak"], 1),
        }
    if last:
        two = ours(folder, method, 2, last)
        one = ours(folder, method, 1, last)
        row["two_threads"] = {**two, "wall_ratio": round(one["wall"] / two["wall"], 2), "one_thread_wall": one["wall"]}
    return row


def _cpu(run: dict[str, float]) -> float:
    return run["cpu"]


def main() -> None:
    """Measure and write the results file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SHAPES, default="S")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--bfloat16", nargs="*", choices=METHODS, default=METHODS, help="methods that mergekit runs in bfloat16")
    parser.add_argument("--float32", nargs="*", choices=METHODS, default=METHODS, help="methods that mergekit runs in float32")
    parser.add_argument(
        "--keep", action="store_true", help="keep the file's rows of other methods, each with how it was measured"
    )
    parser.add_argument("--folder", type=Path, help="where models are made; default: a temporary folder")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    measured: dict[Any, Any] = {}
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder, tiny = Path(name) / options.size, Path(name) / "tiny"
        for place, size in ((folder, options.size), (tiny, "XS")):
            place.mkdir()
            make_models(place, size)
        for method in options.methods:
            dtypes = [dtype for dtype in ("bfloat16", "float32") if method in getattr(options, dtype)]
            rows.append(compare(folder, tiny, method, dtypes, measured))
            sys.stdout.write(json.dumps(rows[-1]) + "\n")
            sys.stdout.flush()
    file = HERE / "results" / f"merge-{options.size}.json"
    earlier_results = json.loads(file.read_text("utf-8")) if options.keep and file.is_file() else {"rows": []}
    earlier = [
        {"measured": {key: earlier_results[key] for key in ("machine", "command", "commit")}, **row}
        for row in earlier_results["rows"]
        if row["method"] not in options.methods
    ]
    rows = sorted([*rows, *earlier], key=lambda row: METHODS.index(row["method"]))
    write_results(file, {"size": options.size, "shape": SHAPES[options.size], "rows": rows})


if __name__ == "__main__":
    main()
