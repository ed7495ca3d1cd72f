"""Command `chat`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from workbench.api.naming import no_subject, recipe_path
from workbench.cli._options import DeviceOpt, RunsOpt
from workbench.cli._output import out
from workbench.cli._recipes import load
from workbench.errors import WorkbenchError, shell

if TYPE_CHECKING:
    import torch


def chat(
    target: Annotated[str, typer.Argument(help="Recipe, run, or model directory.", show_default=False)],
    device: DeviceOpt = "auto",
    runs_dir: RunsOpt = None,
    plain: Annotated[bool, typer.Option("--plain", help="Continue each line as plain text, without the chat template.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum length of an answer in tokens.")] = 128,
) -> None:
    """Chat with a recipe's result, a run or a model.

    One line per turn, with greedy decoding. Also reads lines from a pipe. After each answer of a routed model, the bricks that gave
    it are printed to standard error.
    """
    from workbench.models.device import pick_device

    model, tokenizer = open_live(target, runs_dir, pick_device(device))
    history: list[dict[str, str]] = []
    templated = bool(tokenizer.chat_template) and not plain
    if sys.stdin.isatty():
        out.say("enter an empty line or Ctrl-D to quit; " + ("using the chat template" if templated else "using plain text"))
    while line := _ask():
        history.append({"role": "user", "content": line})
        if templated:
            tokens = tokenizer.apply_chat_template(history, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        else:
            tokens = tokenizer(line, return_tensors="pt")
        answer = _answer(model, tokenizer, tokens, max_new_tokens)
        if (routing := getattr(model, "routing", None)) is not None and not routing.by_token:
            out.say(f"[{routing.label(routing.last.weights[0])}]")
        history.append({"role": "assistant", "content": answer})


def _ask() -> str:
    try:
        return (input("> ") if sys.stdin.isatty() else sys.stdin.readline()).strip()
    except EOFError:
        return ""


def _answer(model: Any, tokenizer: Any, tokens: Any, limit: int) -> str:
    from transformers import TextStreamer

    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    made = model.generate(
        **tokens.to(model.device),
        max_new_tokens=limit,
        do_sample=False,
        streamer=streamer,
        pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
    )
    return str(tokenizer.decode(made[0, tokens["input_ids"].shape[1] :], skip_special_tokens=True))


def open_live(target: str, runs_dir: Path | None, device: torch.device) -> tuple[Any, Any]:
    """Load the model of a recipe, a run or a model directory, and its tokenizer.

    Args:
        target: Recipe, run or model directory as named on the command line.
        runs_dir: Directory of runs; default: runs/.
        device: Device of the model.

    Raises:
        WorkbenchError: If there is no such recipe, run or model, or if it has no model that can be loaded.
    """
    from transformers import AutoModelForCausalLM

    from workbench.models.tokenizer import load_tokenizer
    from workbench.run.saved import is_configuration

    path = Path(target) if (Path(target) / "config.json").is_file() else recipe_path(target)
    if is_configuration(path):
        return _configured(path, device)
    if path.suffix in (".yaml", ".yml"):
        from workbench.run.materialize import materialize

        resolved, _ = load(path, None, runs_dir)
        return materialize(resolved, device, events=out.event), load_tokenizer(resolved.tokenizer_path)
    if not (path / "config.json").is_file():
        from workbench.run.directory import find_run, list_runs

        runs = runs_dir or Path("runs")
        names = [run.name for run in list_runs(runs)]
        if not path.exists() and not any(name.startswith(target) for name in names):
            raise no_subject(target, f"a model directory, or a run in {runs}", names)
        run = find_run(runs, target)
        if not run.done:
            raise WorkbenchError(f"{run.path}: the run is not finished", "Resume it with `workbench run` on its recipe.")
        if run.adapter.is_dir():
            raise WorkbenchError(
                f"{run.path}: the run wrote an adapter, not a whole model",
                f"`workbench chat {shell(run.path / 'recipe.yaml')}` composes the same configuration in memory.",
            )
        if run.configuration.is_dir():
            return _configured(run.configuration, device)
        path = run.model
    from workbench.models.cleanup import native
    from workbench.models.skeleton import check_decoder
    from workbench.weights.checkpoint import read_config

    config = read_config(path, target)
    native(config, f"{target}: config.json")
    check_decoder(config)
    model = (
        AutoModelForCausalLM.from_pretrained(path, trust_remote_code=False, use_safetensors=True, dtype="auto").to(device).eval()
    )
    return model, load_tokenizer(path)


def _configured(path: Path, device: torch.device) -> tuple[Any, Any]:
    """Load the model of a configuration directory with its memory or router attached, and its tokenizer."""
    from workbench.api.loading import load, load_tokenizer

    return load(path, device=str(device)), load_tokenizer(path)
