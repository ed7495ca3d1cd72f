"""Servers that an export is written for: their names for models, their ports, and the scripts that start them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workbench.errors import UsageError, WorkbenchError, printable, shell
from workbench.events import Events

SCRIPT, ADAPTERS, GGUF = "serve.sh", "adapters", "model.gguf"
SERVERS = ("vllm", "sglang", "llama.cpp", "semantic-router")
PORTS = {"vllm": 8000, "sglang": 30000, "llama.cpp": 8080, "semantic-router": 8000}
"""Server -> port of serve.sh. The semantic router stands before a vLLM server."""
CONVERTER = "convert_hf_to_gguf.py"
_TOGETHER = 8  # adapters in one batch of a server
_OUTTYPES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}


@dataclass(frozen=True)
class Serving:
    """The models that a script serves.

    Attributes:
        server: One of `SERVERS`.
        name: Name of the recipe or run.
        served: Name of the base on the server, or of the whole model.
        place: Directory of a whole model; None if adapters act on a base.
        base: Directory or hub id of the base, or of the whole model.
        adapters: Names of the adapters.
        rank: Rank of the adapters; None without adapters.
        dtype: Data type of the base.
    """

    server: str
    name: str
    served: str
    place: Path | None
    base: str
    adapters: Sequence[str]
    rank: int | None
    dtype: str


def adapter_path(server: str, adapter: str) -> str:
    """Return the path of an adapter in an export."""
    return f"{ADAPTERS}/{adapter}.gguf" if server == "llama.cpp" else f"{ADAPTERS}/{adapter}"


def request_name(server: str, served: str, adapter: str) -> str:
    """Return the `model` of a request for an adapter."""
    return f"{served}:{adapter}" if server == "sglang" else adapter


def request_fields(server: str, adapters: Sequence[str]) -> dict[str | None, dict[str, Any]]:
    """Return adapter, or None for the base -> fields that a request needs beside `model`.

    llama.cpp ignores the name and takes the scale of each adapter, numbered in the order of its command.
    """
    if server != "llama.cpp" or not adapters:
        return {}
    return {
        acting: {"lora": [{"id": i, "scale": float(acting == name)} for i, name in enumerate(adapters)]}
        for acting in (None, *adapters)
    }


def converter(base: object, dtype: str, out: object) -> list[str]:
    """Return the words after the interpreter and llama.cpp's directory that convert a model to GGUF."""
    return [CONVERTER, str(base), "--outtype", _OUTTYPES.get(dtype, "auto"), "--outfile", str(out)]


def check_llama_cpp(server: str, directory: Path | None) -> None:
    """Check the value of `--llama-cpp`.

    Raises:
        UsageError: If it is given for another server, or the directory has no converter.
    """
    if directory is None:
        return
    if server != "llama.cpp":
        raise UsageError(f"--llama-cpp {directory}: only --for llama.cpp converts models", "Leave --llama-cpp out.")
    if not (directory / CONVERTER).is_file():
        raise UsageError(
            f"--llama-cpp {directory}: expected llama.cpp's folder, which has {CONVERTER}", "Name the folder of its source code."
        )


def convert(directory: Path, base: Path, dtype: str, out: Path, events: Events) -> None:
    """Run llama.cpp's converter.

    Raises:
        WorkbenchError: If it fails; the message has the last lines that it printed.
    """
    script, *words = converter(base, dtype, out)
    events({"stage": "convert", "text": f"{script} {base}"})
    command = [sys.executable, str(directory / script), *words]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)  # noqa: S603  the user named the program
    if done.returncode or not out.is_file():
        last = "\n".join(done.stderr.strip().splitlines()[-3:])
        raise WorkbenchError(
            f"{directory / script} failed with status {done.returncode}:\n{printable(last)}",
            "Leave --llama-cpp out, and run the command that `export` prints with the Python of llama.cpp.",
        )


def script(serving: Serving, out: Path) -> str:
    """Return serve.sh: the command that serves the model and its adapters.

    Args:
        serving: What it serves.
        out: Directory of the script.
    """
    write = {"vllm": _vllm, "sglang": _sglang, "llama.cpp": _llama_cpp, "semantic-router": _vllm}[serving.server]
    count = len(serving.adapters)
    notes = [
        "#!/bin/sh",
        f"# Serves {'the adapters of ' if count else ''}{serving.name}. Further options are passed on.",
        f"# Compare the server with expected.jsonl: workbench export check http://localhost:{PORTS[serving.server]} --expected DIR",
    ]
    here = 'here=$(CDPATH=\'\' cd -- "$(dirname -- "$0")" && pwd)'
    return "\n".join([*notes, *write(serving, out, here), ""])


def _command(parts: Sequence[str]) -> str:
    return " \\\n  ".join(["exec " + parts[0], *parts[1:], '"$@"'])


def _start(serving: Serving, out: Path, here: str) -> list[str]:
    """Return the lines that find the model of a server which reads checkpoints."""
    place = serving.place
    where = shell(serving.served) if place is None else f"$here/{shell(os.path.relpath(place, out.resolve()))}"
    return ["set -eu", here, f"model={where}"]


def _named(adapters: Sequence[str]) -> str:
    return " ".join(f'{name}="$here/{ADAPTERS}/{name}"' for name in adapters)


def _vllm(serving: Serving, out: Path, here: str) -> list[str]:
    count = len(serving.adapters)
    notes = ["# MODEL=DIR serves the base from a directory."]
    parts = [
        'vllm serve "${MODEL:-$model}"',
        f"--served-model-name {shell(serving.served)} --dtype {serving.dtype}",
        # settings of generation_config.json, such as a repetition penalty, would change greedy texts
        "--generation-config vllm",
    ]
    if count:
        together = min(count, _TOGETHER)
        parts += [
            f"--enable-lora --max-lora-rank {serving.rank} --max-loras {together} --max-cpu-loras {max(count, together)}",
            f"--lora-modules {_named(serving.adapters)}",
        ]
        notes += [
            "# Adapters loaded when they are first asked for: leave out --lora-modules, and set VLLM_ALLOW_RUNTIME_LORA_UPDATING=1",
            f'# VLLM_PLUGINS=lora_filesystem_resolver VLLM_LORA_RESOLVER_CACHE_DIR="$here/{ADAPTERS}".',
        ]
    return [*notes, *_start(serving, out, here), _command(parts)]


def _sglang(serving: Serving, out: Path, here: str) -> list[str]:
    count = len(serving.adapters)
    parts = [
        'python3 -m sglang.launch_server --model-path "${MODEL:-$model}"',
        f"--served-model-name {shell(serving.served)} --dtype {serving.dtype}",
        "--sampling-defaults openai",
    ]
    if count:
        parts += [
            f"--enable-lora --max-lora-rank {serving.rank} --max-loras-per-batch {min(count + 1, _TOGETHER)}",
            f"--lora-paths {_named(serving.adapters)}",
        ]
    return ["# MODEL=DIR serves the base from a directory.", *_start(serving, out, here), _command(parts)]


def _llama_cpp(serving: Serving, out: Path, here: str) -> list[str]:
    convert = shell("python3", *converter(serving.base, serving.dtype, out.resolve() / GGUF))
    parts = ['llama-server -m "$model"', f"--alias {shell(serving.served)} --port {PORTS['llama.cpp']}"]
    if serving.dtype == "float32":  # llama.cpp keeps attention's keys and values in float16, which changes log-probabilities
        parts += ["--cache-type-k f32 --cache-type-v f32"]
    if serving.adapters:
        # a request names the adapters that act on it; those that are loaded with scale 1 act on every other request
        parts += [f"--lora-scaled {adapter_path('llama.cpp', name)}:0" for name in serving.adapters]
    lines = [
        "# MODEL=FILE serves the base from another GGUF file.",
        "set -eu",
        here,
        f'model=${{MODEL:-"$here/{GGUF}"}}',
        "case $model in /*) ;; *) model=$PWD/$model ;; esac",
        'if [ ! -f "$model" ]; then',
        "  cat >&2 <<'END'",
        "The base is not there as a GGUF file. Make it in the folder of llama.cpp:",
        f"  {convert}",
        "or name another file: MODEL=FILE sh serve.sh",
        "END",
        "  exit 1",
        "fi",
        'cd "$here"',
    ]
    if serving.adapters:
        fields = ", ".join(f'{{"id": {i}, "scale": 1}}: {name}' for i, name in enumerate(serving.adapters))
        lines.insert(1, f'# A request chooses adapters with "lora": [...], whose entries are {fields}. Weights may be mixed.')
    return [*lines, _command(parts)]
