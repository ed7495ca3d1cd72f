"""Growing a large checkpoint: seconds, bytes and peak resident memory of every operator, two of them beside mergekit in the same run.

    python benchmarks/grow.py --size M
    python benchmarks/grow.py --size XS          a quick look

A random bf16 llama checkpoint (S: 0.5, M: 1.7 billion parameters). Every measurement is one whole process on one core, start-up included,
the base in the page cache, `check: off`. What mergekit has a counterpart of is run by it too: `passthrough` for `stack`, `mergekit-moe`
with random gates for `experts`. The floor is a process that reads the base into one buffer and writes as many bytes as the result has.
Results go to benchmarks/results/grow-<size>.json. Needs about 6x the model's size on disk; removed at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml
from merge import measure
from models import SHAPES, make_models
from record import write_results

HERE = Path(__file__).parent
FLOOR = """
import os, sys
source, out, size = sys.argv[1], sys.argv[2], int(sys.argv[3])
buffer = bytearray(512 * 1024)
descriptor, offset = os.open(source, os.O_RDONLY), 0
while count := os.preadv(descriptor, [buffer], offset):
    offset += count
descriptor, piece = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), bytes(512 * 1024)
os.ftruncate(descriptor, size)
for offset in range(0, size, len(piece)):
    os.pwrite(descriptor, piece[: size - offset], offset)
"""


def steps(size: str) -> dict[str, dict[str, Any]]:
    """Operator -> its step, about a quarter more of everything."""
    layers, hidden, mlp, heads = SHAPES[size]
    return {
        "depth": {"grow": "depth", "blocks": layers // 4},
        "stack": {"grow": "stack", "slices": [{"layers": [0, 5 * layers // 8]}, {"layers": [3 * layers // 8, layers]}]},
        "width neurons": {"grow": "width", "neurons": 5 * mlp // 4},
        "width neurons copy": {"grow": "width", "neurons": 5 * mlp // 4, "how": "copy"},
        "width key_value_heads": {"grow": "width", "key_value_heads": 2 * heads},
        "width hidden": {"grow": "width", "hidden": 5 * hidden // 4},
        "experts": {"grow": "experts", "experts": 2},
        "experts redraw": {"grow": "experts", "experts": 2, "redraw": 0.5},
    }


def main() -> None:
    """Measure all operators, write the results file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SHAPES, default="M")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_models(folder, given.size, bricks=False)
        save_tokenizer(folder / "base")
        rows = []
        for name, step in steps(given.size).items():
            rows.append(row(folder, name, step))
            print(json.dumps(rows[-1]), flush=True)
        base = (folder / "base" / "model.safetensors").stat().st_size
        write_results(HERE / "results" / f"grow-{given.size}.json", {"size": given.size, "base_bytes": base, "rows": rows})


def save_tokenizer(folder: Path) -> None:
    """A tokenizer of a few words, which `mergekit-moe` loads."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<unk>": 0, "word": 1}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", pad_token="<unk>").save_pretrained(folder)


def measure_here(command: list[str]) -> dict[str, float]:
    """One process on the last core."""
    return measure(command, 1, str((os.cpu_count() or 1) - 1))


def row(folder: Path, name: str, step: dict[str, Any]) -> dict[str, Any]:
    """One operator: the workbench, the floor, and mergekit where it has one."""
    file = folder / "recipes" / "grow.yaml"
    file.parent.mkdir(exist_ok=True)
    file.write_text(yaml.safe_dump({"version": 1, "base": str(folder / "base"), "steps": [{**step, "check": "off"}]}))
    for place in ("runs", ".workbench"):
        shutil.rmtree(folder / place, ignore_errors=True)
    command = [sys.executable, "-m", "workbench"]
    planned = json.loads(
        subprocess.run([*command, "plan", str(file), "--json"], capture_output=True, text=True, check=True).stdout
    )
    ours = measure_here([*command, "run", str(file), "--quiet", "--device", "cpu", "--threads", "1"])
    shutil.rmtree(folder / "runs")
    floor = measure_here(
        [
            sys.executable,
            "-c",
            FLOOR,
            str(folder / "base" / "model.safetensors"),
            str(folder / "floor"),
            str(planned["write_bytes"]),
        ]
    )
    (folder / "floor").unlink()
    theirs = peer(folder, name, step)
    return {"operator": name, "step": step, "bytes": planned["write_bytes"], "planned_peak": planned["peak_bytes"], "ours": ours, "floor": floor,
            **({"mergekit": theirs, "ratio": round(theirs["cpu"] / ours["cpu"], 2)} if theirs else {})}  # fmt: skip


def peer(folder: Path, name: str, step: dict[str, Any]) -> dict[str, float] | None:
    """The same by mergekit's command lines; None where it has no counterpart."""
    base, out, tools = str(folder / "base"), str(folder / "out"), Path(sys.executable).parent
    config: dict[str, Any]
    if name == "stack":
        tool = "mergekit-yaml"
        config = {"merge_method": "passthrough", "dtype": "bfloat16",
                  "slices": [{"sources": [{"model": base, "layer_range": s["layers"]}]} for s in step["slices"]]}  # fmt: skip
    elif name == "experts":
        tool = "mergekit-moe"
        config = {"base_model": base, "gate_mode": "random", "dtype": "bfloat16",
                  "experts": [{"source_model": base, "positive_prompts": [""]} for _ in range(step["experts"])]}  # fmt: skip
    else:
        return None
    (folder / "mergekit.yaml").write_text(yaml.safe_dump(config))
    found = measure_here([str(tools / tool), str(folder / "mergekit.yaml"), out])
    shutil.rmtree(out)
    return found


if __name__ == "__main__":
    main()
