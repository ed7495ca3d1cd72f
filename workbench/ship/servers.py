"""Servers that an export is written for: their names for models, the scripts that start them, and the semantic router's configuration."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from workbench.bricks.card import read_card
from workbench.ground import yamldoc
from workbench.ground.errors import UsageError, WorkbenchError, printable, shell
from workbench.ground.events import Events
from workbench.ground.files import write_text
from workbench.ground.foreign_names import CARD
from workbench.ground.project import find_project

if TYPE_CHECKING:
    from workbench.adapters.read import Adapter


ROUTER_FILE = "router.yaml"
EXAMPLES = 16
"""Largest number of example prompts of a brick."""
THRESHOLD = 0.5
"""Least similarity to an example. It depends on the router's embedding model; a user calibrates it."""
_BASE = "base"
_HEAD = """# Configuration of the vLLM semantic router, canonical form v0.3. Check it: vllm-sr config validate --config router.yaml
# endpoint: the vLLM server of serve.sh, as the router's container sees it.
# threshold: least similarity to an example; calibrate it on your own requests, because it depends on the embedding model.
# A request that is near no brick goes to the base.
"""


@dataclass(frozen=True)
class RoutedAdapter:
    """The router's knowledge of an adapter.

    Attributes:
        name: Its name on the server.
        description: One line about its skill.
        examples: Prompts that it should answer; the description, if no others are known.
    """

    name: str
    description: str
    examples: tuple[str, ...]


def routed_adapters(
    adapters: Mapping[str, Adapter], described: Mapping[str, str], examples: Mapping[str, Sequence[str]]
) -> list[RoutedAdapter]:
    """Return the adapters with descriptions and example prompts.

    Args:
        adapters: Name -> files of an adapter.
        described: Name -> description in the route step, which takes precedence over the card's `skill`.
        examples: Name -> calibration prompts. Without any, the card's `prompt_format` and the description serve as examples.

    Raises:
        UsageError: If there are no adapters.
        WorkbenchError: If an adapter has no description, or two have the same examples.
    """
    if not adapters:
        raise UsageError(
            "--for semantic-router: a whole model has no adapters to choose from",
            "Export a recipe with --brick, or a routed configuration.",
        )
    if _BASE in adapters:
        raise UsageError(
            f"--for semantic-router: an adapter is named '{_BASE}', as is the route to the base",
            "Rename the brick in the recipe.",
        )
    found = []
    for name, adapter in adapters.items():
        place = adapter.path
        card = read_card(place) if (place / CARD).is_file() else None
        text = " ".join((described.get(name) or (card.skill if card else "")).split())
        if not text:
            raise WorkbenchError(
                f"brick '{name}': has no description, by which users of the semantic router know it",
                f"Add `skill: ONE LINE` to {place / CARD}"
                + ("." if card else ", or `description:` to the brick in a route step, and export that configuration."),
            )
        prompts = list(examples.get(name, ())) or [*([card.prompt_format] if card and card.prompt_format else []), text]
        found.append(RoutedAdapter(name, text, tuple(dict.fromkeys(prompts))[:EXAMPLES]))
    for i, one in enumerate(found):
        for other in found[i + 1 :]:
            if set(one.examples) == set(other.examples):
                raise WorkbenchError(
                    f"bricks '{one.name}' and '{other.name}' have the same example prompts, so the router cannot tell them apart",
                    "Give them descriptions or calibration prompts of their own.",
                )
    return found


def router_document(served: str, adapters: Sequence[RoutedAdapter], port: int) -> dict[str, object]:
    """Return the configuration as plain data.

    Source: vllm-sr 0.4.0, schema router-config-v0.3; tutorials/signal/learned/embedding of its documentation.
    """
    backend = {"name": "primary", "provider": "vllm", "endpoint": f"host.docker.internal:{port}", "protocol": "http", "weight": 1}
    card = {"name": served, "loras": [{"name": one.name, "description": one.description} for one in adapters]}
    signals = [
        {"name": one.name, "threshold": THRESHOLD, "aggregation_method": "max", "candidates": list(one.examples)}
        for one in adapters
    ]
    decisions = [
        {
            "name": one.name,
            "description": one.description,
            "priority": 100,
            "rules": {"operator": "AND", "conditions": [{"type": "embedding", "name": one.name}]},
            "modelRefs": [{"model": served, "lora_name": one.name, "use_reasoning": False}],
        }
        for one in adapters
    ]
    fallback = {
        "name": _BASE,
        "description": "Requests that are near no brick.",
        "priority": 1,
        "rules": {"operator": "AND", "conditions": []},
        "modelRefs": [{"model": served, "use_reasoning": False}],
    }
    return {
        "version": "v0.3",
        "listeners": [{"name": "http-8899", "address": "0.0.0.0", "port": 8899, "timeout": "300s"}],  # noqa: S104  in its container
        "providers": {"defaults": {"model": served}, "models": [{"name": served, "backend_refs": [backend]}]},
        "routing": {"modelCards": [card], "signals": {"embeddings": signals}, "decisions": [*decisions, fallback]},
    }


def write_router_file(served: str, adapters: Sequence[RoutedAdapter], port: int, out: Path) -> None:
    """Write router.yaml, and read it back."""
    document = router_document(served, adapters, port)
    write_text(out / ROUTER_FILE, _HEAD + yamldoc.dump(document))
    if yamldoc.load(out / ROUTER_FILE).data != document:
        raise WorkbenchError(
            f"{out / ROUTER_FILE}: a description or prompt cannot be written as YAML", "Remove control characters from it."
        )


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
        adapters: Names of the adapters.
        rank: Rank of the adapters; None without adapters.
        dtype: Data type of the base.
    """

    server: str
    name: str
    served: str
    place: Path | None
    adapters: Sequence[str]
    rank: int | None
    dtype: str


def adapter_path(server: str, adapter: str) -> str:
    """Return the path of an adapter in an export."""
    return f"{ADAPTERS}/{adapter}.gguf" if server == "llama.cpp" else f"{ADAPTERS}/{adapter}"


def request_name(server: str, served: str, adapter: str) -> str:
    """Return the `model` of a request for an adapter."""
    return f"{served}:{adapter}" if server == "sglang" else adapter


def request_fields(server: str, adapters: Sequence[str]) -> dict[str | None, dict[str, object]]:
    """Return adapter, or None for the base -> fields that a request needs beside `model`.

    llama.cpp ignores the name and takes the scale of each adapter, numbered in the order of its command. It reuses the keys and
    values of a prompt under other adapters (ggml-org/llama.cpp#26207), so that a request must ask for none.
    """
    if server != "llama.cpp" or not adapters:
        return {}
    return {
        acting: {"lora": [{"id": i, "scale": float(acting == name)} for i, name in enumerate(adapters)], "cache_prompt": False}
        for acting in (None, *adapters)
    }


def converter(base: object, dtype: str, out: object) -> list[str]:
    """Return the words after the interpreter and llama.cpp's directory that convert a model to GGUF."""
    return [CONVERTER, str(base), "--outtype", _OUTTYPES.get(dtype, "auto"), "--outfile", str(out)]


def check_llama_cpp(server: str, directory: Path | None) -> None:
    """Check the value of `--llama-cpp`."""
    if directory is None:
        return
    if server != "llama.cpp":
        raise UsageError(f"--llama-cpp {directory}: only --for llama.cpp converts models", "Leave --llama-cpp out.")
    if not (directory / CONVERTER).is_file():
        raise UsageError(
            f"--llama-cpp {directory}: expected llama.cpp's folder, which has {CONVERTER}", "Name the folder of its source code."
        )


def convert(directory: Path, base: Path, dtype: str, out: Path, events: Events) -> None:
    """Run llama.cpp's converter."""
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
    """Return serve.sh: the command that serves the model and its adapters."""
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


def model_path(place: Path, out: Path) -> str | None:
    """Return the path from an export to a whole model; None if it would name folders outside of the project, which other machines lack."""
    project = find_project()
    inside = place.is_relative_to(project) and out.resolve().is_relative_to(project)
    return os.path.relpath(place, out.resolve()) if inside else None


def _start(serving: Serving, out: Path, here: str) -> list[str]:
    """Return the lines that find the model of a server which reads checkpoints."""
    if serving.place is None:
        where = shell(serving.served)
    elif (found := model_path(serving.place, out)) is not None:
        where = f"$here/{shell(found)}"
    else:
        where = f'"${{MODEL:?name the folder of {serving.served}: MODEL=DIR sh {SCRIPT}}}"'
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
    convert = " ".join(["python3", *converter("DIR", serving.dtype, f"'$here/{GGUF}'")])
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
        "  cat >&2 <<END",
        f"{serving.served} is not there as a GGUF file. Make it of its folder DIR in the folder of llama.cpp:",
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
        # for clients that do not say "cache_prompt": false; a variable, because older releases refuse the option --cache-ram
        lines.append(
            "export LLAMA_ARG_CACHE_RAM=0  # kept prompts would be reused under other adapters: ggml-org/llama.cpp#26207"
        )
    return [*lines, _command(parts)]
