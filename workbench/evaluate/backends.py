"""Score written checkpoints through lm-eval's classes for vLLM and for servers with the OpenAI completions API."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from workbench.evaluate.measured import SEED
from workbench.ground.errors import WorkbenchError
from workbench.ground.http import ask
from workbench.models.architecture import max_positions
from workbench.scores.plan import ScorePlan
from workbench.weights.checkpoint import read_config


@dataclass(frozen=True)
class WrittenCheckpoint:
    """A configuration as a checkpoint on disk.

    Attributes:
        path: Its directory.
        name: Its name on the server.
        server: Address of the server, such as "http://127.0.0.1:8000".
    """

    path: Path
    name: str
    server: str | None = None


def written_model(plan: ScorePlan, model: WrittenCheckpoint) -> Any:
    """Return lm-eval's model for the plan's backend.

    Raises:
        WorkbenchError: If packages are missing, or the server is missing or does not serve the model.
    """
    from lm_eval.api.registry import get_model

    if plan.suite.backend == "vllm":
        if find_spec("vllm") is None:
            raise WorkbenchError(
                f"suite '{plan.suite.suite}': backend vllm needs the package vllm, which is not installed",
                "Run pip install 'lm-eval[vllm]' on a machine with a GPU, or set `backend: hf` in the suite.",
            )
        return get_model("vllm")(
            pretrained=str(model.path), tokenizer=str(plan.tokenizer), dtype=plan.dtype, batch_size="auto", seed=SEED
        )
    if missing := [name for name in ("aiohttp", "tenacity", "requests") if find_spec(name) is None]:
        raise WorkbenchError(
            f"suite '{plan.suite.suite}': backend server needs {', '.join(missing)}", "pip install 'lm-eval[api]'"
        )
    _check_server(model)
    return get_model("local-completions")(
        model=model.name,
        base_url=f"{str(model.server).rstrip('/')}/v1/completions",
        tokenizer=str(plan.tokenizer),
        tokenizer_backend="huggingface",
        batch_size=1,
        num_concurrent=plan.batch_size,
        max_retries=3,
        seed=SEED,
        max_length=_length(model.path),
    )


def failures(backend: str) -> tuple[type[Exception], ...]:
    """Return the exceptions that lm-eval raises if a server stops answering."""
    if backend != "server":
        return ()
    from aiohttp import ClientError
    from tenacity import RetryError

    return (ClientError, RetryError, OSError, AssertionError, KeyError)


def _check_server(model: WrittenCheckpoint) -> None:
    """Check that the server has the configuration's name; nothing else tells which weights it serves."""
    serve = f"vllm serve {shlex.quote(str(model.path))} --served-model-name {shlex.quote(model.name)}"
    if model.server is None:
        raise WorkbenchError(
            f"'{model.name}' is scored by a server, but no address was given", f"{serve}; then --server http://HOST:8000"
        )
    address = f"{model.server.rstrip('/')}/v1/models"
    try:
        names = [str(entry["id"]) for entry in ask(address, serve, seconds=10)["data"]]
    except (KeyError, TypeError):
        raise WorkbenchError(f"{address}: the answer is not a list of models", serve) from None
    if model.name not in names:
        raise WorkbenchError(f"{address} serves {', '.join(names) or 'no model'}, expected '{model.name}'", serve)


def _length(path: Path) -> int:
    """Return the largest number of tokens that the model accepts."""
    return max_positions(read_config(path, str(path))) or 2048
