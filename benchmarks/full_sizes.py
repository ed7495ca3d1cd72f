"""Plan operations on models in their full size with `workbench plan`: from headers alone, of checkpoints that take no blocks on disk.

    python benchmarks/full_sizes.py
    python benchmarks/full_sizes.py --only gpt-oss-20b

The shapes are those of a published configuration, built by transformers without memory for weights, with the names that it writes to disk. For
each model and operation: the peak memory, the bytes read and written and the seconds that the plan names, or the reason of a refusal;
and the CPU seconds that planning took. Nothing is run. Results go to benchmarks/results/full-sizes.json after every model.
"""

from __future__ import annotations

import json
import math
import re
import sys
import tempfile
import time
from contextlib import chdir
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from models import write_sparse
from record import keep_head, parser_of, write_results

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "Llama-3.1-8B": (
        "llama",
        "LlamaForCausalLM",
        {
            "hidden_size": 4096,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "intermediate_size": 14336,
            "vocab_size": 128256,
        },
    ),
    "Mixtral-8x7B": ("mixtral", "MixtralForCausalLM", {}),
    "Qwen3-30B-A3B": ("qwen3_moe", "Qwen3MoeForCausalLM", {"num_hidden_layers": 48, "head_dim": 128}),
    "Qwen3.5-35B-A3B": ("qwen3_5_moe", "Qwen3_5MoeForConditionalGeneration", {}),
    "gpt-oss-20b": ("gpt_oss", "GptOssForCausalLM", {"num_hidden_layers": 24, "num_local_experts": 32}),
    "Gemma 4": ("gemma4", "Gemma4ForConditionalGeneration", {}),
    "Qwen3-VL": ("qwen3_vl", "Qwen3VLForConditionalGeneration", {}),
    "Nemotron-H": ("nemotron_h", "NemotronHForCausalLM", {}),
    "DeepSeek-V3": ("deepseek_v3", "DeepseekV3ForCausalLM", {}),
}
"""Name -> type and class in transformers, and the fields that differ from the configuration's defaults."""
ROOM = SimpleNamespace(free=10**14)
TUNED = "bricks: {one: {checkpoint: one}, two: {checkpoint: two}}\n"
RANKED = "bricks: {one: {adapter: lora/one}, two: {adapter: lora/two}}\n"
OPERATIONS = {
    "task_arithmetic": TUNED + "steps: [{merge: task_arithmetic}]\n",
    "ties": TUNED + "steps: [{merge: ties, density: 0.2}]\n",
    "tsv": TUNED + "steps: [{merge: tsv}]\n",
    "adapters": RANKED + "steps: [{merge: task_arithmetic}]\n",
    "slices": TUNED + "steps: [{grow: stack, slices: [{layers: [0, 4]}, {brick: one, layers: [2, 4]}], check: tensors}]\n",
    "edit": "steps: [{edit: memit, facts: facts.jsonl}]\n",
    "depth": "steps: [{grow: depth, blocks: 2, check: tensors}]\n",
    "route": RANKED + "steps: [{route: ridge, calibration: '{brick}.jsonl', samples: 12}]\n",
}


def main() -> None:
    """Plan every operation on every model, and write the results file after each model."""
    parser = parser_of(__doc__, "full-sizes")
    parser.add_argument("--only", nargs="+", choices=list(MODELS), help="these models; the other rows stay")
    options = parser.parse_args()
    before = json.loads(options.out.read_text("utf-8")) if options.only and options.out.is_file() else {}
    found: dict[str, Any] = before.get("models", {})
    for name in options.only or MODELS:
        with tempfile.TemporaryDirectory() as folder:
            found[name] = planned(*MODELS[name], Path(folder))
        print(name, json.dumps(found[name]), flush=True)
        write_results(options.out, {"models": {name: found[name] for name in MODELS if name in found}})
    if before:
        keep_head(options.out, before, options.only)


def planned(kind: str, label: str, fields: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return the size of a model, and for each operation what the plan says."""
    from typer.testing import CliRunner

    from workbench.cli.app import app

    parameters = lay_out(kind, label, fields, folder)
    rows = {}
    for name, recipe in OPERATIONS.items():
        (folder / "recipes" / f"{name}.yaml").write_text(f"version: 1\nbase: base\n{recipe}", "utf-8")
        start = time.process_time()
        with chdir(folder), patch("shutil.disk_usage", return_value=ROOM):  # this machine's disk is too small for the results
            result = CliRunner().invoke(app, ["plan", f"recipes/{name}.yaml", "--device", "cpu", "--json"])
        spent = round(time.process_time() - start, 1)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            rows[name] = {"refused": str(result.exception), "cpu_seconds": spent}
            continue
        plan = json.loads(result.stdout)
        kept = {key: plan[key] for key in ("peak_bytes", "read_bytes", "write_bytes", "seconds", "problems")}
        rows[name] = {**kept, "cpu_seconds": spent}
    return {"type": kind, "class": label, "fields": fields, "parameters": parameters, "operations": rows}


def lay_out(kind: str, label: str, fields: dict[str, Any], folder: Path) -> int:
    """Write a project with a base, two fine-tunes and two adapters, and return the number of parameters."""
    import torch
    import transformers
    from transformers import CONFIG_MAPPING
    from transformers.core_model_loading import revert_weight_conversion

    from worlds.dense import write_facts_file
    from worlds.jsonl import write_jsonl
    from worlds.tiny import save_tokenizer

    (folder / "recipes").mkdir()
    config = CONFIG_MAPPING[kind](**fields)
    config.architectures, config.dtype = [label], "bfloat16"
    with torch.device("meta"):
        model = getattr(transformers, label)._from_config(config)
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in (model.all_tied_weights_keys or {})}
    shapes = {name: tuple(tensor.shape) for name, tensor in sorted(revert_weight_conversion(model, state).items())}
    config.save_pretrained(folder / "base")
    save_tokenizer(folder / "base")
    write_sparse(folder / "base" / "model.safetensors", shapes)
    for brick in ("one", "two"):
        (folder / brick).mkdir()
        for file in (folder / "base").iterdir():
            if file.suffix == ".json":
                (folder / brick / file.name).hardlink_to(file)
        write_sparse(folder / brick / "model.safetensors", shapes)
        with (folder / brick / "model.safetensors").open(
            "r+b"
        ) as stream:  # a fine-tune that seems to change nothing would be read whole
            start = 8 + int.from_bytes(stream.read(8), "little")
            stream.seek(start + 2 * math.prod(shapes[min(shapes)]) // 8 // 64 * 64)  # where `fingerprint` looks
            stream.write(b"\x80\x3f" * 32)
        write_adapter(model, folder / "lora" / brick)
        write_jsonl(folder / f"{brick}.jsonl", [{"prompt": f"{brick} w{i} w{i + 1}"} for i in range(20)])
    write_facts_file(folder / "facts.jsonl", 1)
    return sum(math.prod(shape) for shape in shapes.values())


def write_adapter(model: Any, place: Path) -> None:
    """Write a LoRA adapter of zeros on the projections of attention in the language part."""
    import torch
    from safetensors.torch import save_file

    place.mkdir(parents=True)
    modules = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
        and re.search(r"\.\d+\..*(q|v|o|q_a|q_b)_proj$", name)
        and not re.search("vis|audio", name)
    }
    tensors = {}
    for name, module in modules.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.zeros(16, module.in_features, dtype=torch.bfloat16)
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.zeros(module.out_features, 16, dtype=torch.bfloat16)
    save_file(tensors, place / "adapter_model.safetensors")
    targets = sorted({name.rpartition(".")[2] for name in modules})
    config = {"peft_type": "LORA", "r": 16, "lora_alpha": 16, "target_modules": targets, "task_type": "CAUSAL_LM"}
    (place / "adapter_config.json").write_text(json.dumps(config), "utf-8")


if __name__ == "__main__":
    main()
