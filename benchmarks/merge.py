"""Merging large checkpoints: CPU seconds, wall time and peak resident memory, beside mergekit in the same run.

    python benchmarks/merge.py --size M --peer linear task_arithmetic

Random bf16 llama checkpoints: a base, three fine-tunes, three rank-16 adapters. Every measurement is one process, start-up
included. Both tools compute in float32 and write bfloat16. Results go to benchmarks/results/merge-<size>.json with machine,
command and commit. Needs about 9x the model's size on disk (S: 1.0 GB, M: 3.2 GB a model); removed at the end.
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

from record import write_results

SHAPES = {"S": (24, 1280, 3584, 20), "M": (24, 2048, 8192, 32), "XS": (4, 256, 512, 4)}
VOCABULARY = 32000
HERE = Path(__file__).parent
PEER = {"linear": "linear", "task_arithmetic": "task_arithmetic", "ties": "ties"}
# Runs a command, reports its children's CPU seconds and its peak resident memory.
MEASURE = """
import json, os, resource, subprocess, sys, time
start = time.time()
done = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
use = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps({"wall": time.time() - start, "cpu": use.ru_utime + use.ru_stime, "peak": use.ru_maxrss * 1024, "rc": done.returncode,
                  "error": done.stderr[-2000:]}))
"""


def make_models(folder: Path, size: str) -> None:
    """Base, fine-tunes `a b c` as checkpoints of one file, adapters `la lb lc`."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    layers, hidden, mlp, heads = SHAPES[size]
    config = LlamaConfig(vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers,
                         num_attention_heads=heads, num_key_value_heads=heads, tie_word_embeddings=False, dtype="bfloat16")  # fmt: skip
    config.architectures = ["LlamaForCausalLM"]
    shapes = {
        "model.embed_tokens.weight": (VOCABULARY, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (VOCABULARY, hidden),
    }
    linear = {"self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (hidden, hidden), "self_attn.v_proj": (hidden, hidden),
              "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (mlp, hidden), "mlp.up_proj": (mlp, hidden), "mlp.down_proj": (hidden, mlp)}  # fmt: skip
    for layer in range(layers):
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in linear.items()}
        shapes |= {f"model.layers.{layer}.{name}.weight": (hidden,) for name in ("input_layernorm", "post_attention_layernorm")}
    generator = torch.Generator().manual_seed(0)
    base = {name: (torch.randn(shape, generator=generator) * 0.02).bfloat16() for name, shape in shapes.items()}
    for name in ("base", "a", "b", "c"):
        tensors = (
            base
            if name == "base"
            else {k: (v.float() + torch.randn(v.shape, generator=generator) * 1e-3).bfloat16() for k, v in base.items()}
        )
        (folder / name).mkdir()
        save_file(tensors, folder / name / "model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(folder / name)
    for name in ("la", "lb", "lc"):
        (folder / name).mkdir()
        factors = {}
        for layer in range(layers):
            for module, (rows, cols) in linear.items():
                key = f"base_model.model.model.layers.{layer}.{module}"
                factors[f"{key}.lora_A.weight"] = (torch.randn(16, cols, generator=generator) * 0.02).bfloat16()
                factors[f"{key}.lora_B.weight"] = (torch.randn(rows, 16, generator=generator) * 0.02).bfloat16()
        save_file(factors, folder / name / "adapter_model.safetensors", metadata={"format": "pt"})
        (folder / name / "adapter_config.json").write_text(json.dumps({
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 16, "lora_alpha": 16, "base_model_name_or_path": str(folder / "base"),
            "target_modules": [n.rpartition(".")[2] for n in linear]}))  # fmt: skip


def recipe(folder: Path, method: str) -> Path:
    """A recipe of ours for one method."""
    bricks = {n: str(folder / (f"l{n}" if method == "lora" else n)) for n in "abc"}
    verb = "task_arithmetic" if method == "lora" else method
    step: dict[str, Any] = {"merge": verb}
    if method == "ties":
        step |= {"density": 0.2, "weigh": "before", "divide": "weight"}
    path = folder / "recipes" / f"{method}.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(
        json.dumps(
            {"version": 1, "base": str(folder / "base"), "bricks": bricks, "steps": [step], "output": {"dtype": "bfloat16"}}
        )
    )
    return path


def peer(folder: Path, method: str) -> Path:
    """The same merge in mergekit's syntax, computed in float32."""
    models = [
        {"model": str(folder / n), "parameters": {"weight": 1.0, **({"density": 0.2} if method == "ties" else {})}} for n in "abc"
    ]
    config: dict[str, Any] = {"merge_method": method, "models": models, "dtype": "float32", "out_dtype": "bfloat16"}
    if method != "linear":
        config["base_model"] = str(folder / "base")
    path = folder / f"mergekit-{method}.yaml"
    path.write_text(json.dumps(config))
    return path


def measure(command: list[str], threads: int, cpus: str) -> dict[str, float]:
    """One process, pinned to `cpus`."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    pin = ["taskset", "-c", cpus] if shutil.which("taskset") else []
    done = subprocess.run(
        [*pin, sys.executable, "-c", MEASURE, *command], capture_output=True, text=True, env=environment, check=True
    )
    result: dict[str, float] = json.loads(done.stdout)
    if result["rc"]:
        sys.exit(f"{' '.join(command)} failed:\n{result['error']}")
    return {k: round(result[k], 2) for k in ("wall", "cpu", "peak")}


def main() -> None:
    """Measure and write the results file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SHAPES, default="S")
    parser.add_argument("--methods", nargs="+", default=["linear", "task_arithmetic", "ties", "lora"])
    parser.add_argument("--peer", nargs="*", choices=PEER, default=[], help="methods that mergekit runs too")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="where models are made; default: a temporary folder")
    options = parser.parse_args()
    binary = Path(sys.executable).parent
    rows = []
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        make_models(folder, options.size)
        cpus = ",".join(map(str, range(options.threads)))
        for method in options.methods:
            run = [
                sys.executable,
                "-m",
                "workbench",
                "run",
                str(recipe(folder, method)),
                "--quiet",
                "--device",
                "cpu",
                "--threads",
                str(options.threads),
            ]
            row: dict[str, Any] = {"method": method, "workbench": measure(run, options.threads, cpus)}
            shutil.rmtree(folder / "runs")
            if method in options.peer:
                command = [str(binary / "mergekit-yaml"), str(peer(folder, method)), str(folder / "out")]
                row["mergekit"] = measure(command, options.threads, cpus)
                row["cpu_ratio"] = round(row["mergekit"]["cpu"] / row["workbench"]["cpu"], 1)
                row["peak_ratio"] = round(row["mergekit"]["peak"] / row["workbench"]["peak"], 1)
                shutil.rmtree(folder / "out")
            rows.append(row)
            sys.stdout.write(json.dumps(row) + "\n")
            sys.stdout.flush()
    write_results(
        HERE / "results" / f"merge-{options.size}.json",
        {"size": options.size, "shape": SHAPES[options.size], "threads": options.threads, "rows": rows},
    )


if __name__ == "__main__":
    main()
