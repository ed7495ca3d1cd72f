"""Measure seconds, bytes and peak memory of every growth operator on a large checkpoint, two of them beside mergekit.

    python benchmarks/grow.py --size M
    python benchmarks/grow.py --size XS          a quick look

A random bf16 llama checkpoint (S: 0.5, M: 1.7 billion parameters); for `prune_experts` and `add_expert` what `experts` has made of it. Every
measurement is one whole process on one core, start-up included, the base in the page cache: once with `check: tensors`, once with
`check: off`, which is what mergekit does. What it has a counterpart of is run by it too: `passthrough` for `stack`, `mergekit-moe` with random
gates for `experts`. The floor is a process that reads the base into one buffer and writes as many bytes as the result has.
Results go to benchmarks/results/grow-<size>.json. Needs about 8x the model's size on disk; removed at the end.
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
    """Return operator -> its step, which adds about a quarter."""
    layers, hidden, mlp, heads = SHAPES[size]
    return {
        "depth": {"grow": "depth", "blocks": layers // 4},
        "stack": {"grow": "stack", "slices": [{"layers": [0, 5 * layers // 8]}, {"layers": [3 * layers // 8, layers]}]},
        "width neurons": {"grow": "width", "neurons": 5 * mlp // 4},
        "width neurons copy": {"grow": "width", "neurons": 5 * mlp // 4, "how": "copy"},
        "width key_value_heads": {"grow": "width", "key_value_heads": 2 * heads},
        "width hidden": {"grow": "width", "hidden": 5 * hidden // 4},
        "vocabulary": {"grow": "vocabulary", "tokens": [f"<new-{i}>" for i in range(1024)]},
        "experts redraw": {"grow": "experts", "experts": 2, "redraw": 0.5},
        "experts": {"grow": "experts", "experts": 2},
        "prune_experts": {"grow": "prune_experts", "drop": [1], "top_k": 1},
        "add_expert": {"grow": "add_expert", "copy": 0},
    }


def main() -> None:
    """Measure all operators and write the results file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SHAPES, default="M")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_models(folder, options.size, bricks=False)
        save_tokenizer(folder / "base", json.loads((folder / "base" / "config.json").read_text("utf-8"))["vocab_size"])
        rows = []
        for name, step in steps(options.size).items():
            rows.append(row(folder, name, step))
            print(json.dumps(rows[-1]), flush=True)
        base = (folder / "base" / "model.safetensors").stat().st_size
        write_results(HERE / "results" / f"grow-{options.size}.json", {"size": options.size, "base_bytes": base, "rows": rows})


def save_tokenizer(folder: Path, count: int) -> None:
    """Save a tokenizer with as many words as the model has rows."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<unk>": 0, **{f"word{i}": i for i in range(1, count)}}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", pad_token="<unk>").save_pretrained(folder)


def measure_here(command: list[str]) -> dict[str, float]:
    """Measure one process on the last core."""
    return measure(command, 1, str((os.cpu_count() or 1) - 1))


def row(folder: Path, name: str, step: dict[str, Any]) -> dict[str, Any]:
    """Measure one operator: the workbench with and without its check, the floor, and mergekit if it has a counterpart."""
    base = folder / ("mixture" if name in ("prune_experts", "add_expert") else "base")
    file, command = folder / "recipes" / "grow.yaml", [sys.executable, "-m", "workbench"]
    file.parent.mkdir(exist_ok=True)
    result: dict[str, Any] = {}
    for key, check in (("unchecked", "off"), ("checked", "tensors")):
        file.write_text(yaml.safe_dump({"version": 1, "base": str(base), "steps": [{**step, "check": check}]}))
        for place in ("runs", ".workbench"):
            shutil.rmtree(folder / place, ignore_errors=True)
        text = subprocess.run([*command, "plan", str(file), "--json"], capture_output=True, text=True, check=True).stdout
        planned = json.loads(text)
        result[key] = measure_here([*command, "run", str(file), "--quiet", "--device", "cpu", "--threads", "1"])
        result[key]["planned_peak"] = planned["peak_bytes"]
    (model,) = (folder / "runs").glob("*/model")
    if name == "experts":
        model.rename(folder / "mixture")
    shutil.rmtree(folder / "runs")
    written = str(planned["write_bytes"])
    read = max(base.glob("*.safetensors"), key=lambda f: f.stat().st_size)
    result["floor"] = measure_here([sys.executable, "-c", FLOOR, str(read), str(folder / "floor"), written])
    (folder / "floor").unlink()
    if mergekit := peer(folder, name, step):
        result |= {"mergekit": mergekit, "ratio": round(mergekit["cpu"] / result["unchecked"]["cpu"], 2)}
    displayed = {**step, "tokens": len(step["tokens"])} if "tokens" in step else step
    return {"operator": name, "step": displayed, "bytes": planned["write_bytes"], **result}


def peer(folder: Path, name: str, step: dict[str, Any]) -> dict[str, float] | None:
    """Measure mergekit's counterpart; None if it has none."""
    base, out, tools = str(folder / "base"), str(folder / "out"), Path(sys.executable).parent
    config: dict[str, Any]
    if name == "stack":
        tool = "mergekit-yaml"
        config = {
            "merge_method": "passthrough",
            "dtype": "bfloat16",
            "slices": [{"sources": [{"model": base, "layer_range": s["layers"]}]} for s in step["slices"]],
        }
    elif name == "experts":
        tool = "mergekit-moe"
        config = {
            "base_model": base,
            "gate_mode": "random",
            "dtype": "bfloat16",
            "experts": [{"source_model": base, "positive_prompts": [""]} for _ in range(step["experts"])],
        }
    else:
        return None
    (folder / "mergekit.yaml").write_text(yaml.safe_dump(config))
    result = measure_here([str(tools / tool), str(folder / "mergekit.yaml"), out])
    shutil.rmtree(out)
    return result


if __name__ == "__main__":
    main()
