"""Command `chat`: the answers of one or two models, in panes beside each other where the terminal is wide enough, else one below the other."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from workbench.api.naming import open_named
from workbench.cli._options import DeviceOpt, RunsOpt
from workbench.cli._output import out
from workbench.cli.trust import reads_recipes
from workbench.errors import UsageError, printable, size

if TYPE_CHECKING:
    import torch

    from workbench.resolve.resolved import Resolved


@reads_recipes
def chat(
    targets: Annotated[
        list[str],
        typer.Argument(
            help="Recipe, point of a sweep, run, or model; two to see both answers to each prompt.",
            metavar="TARGET [OTHER]",
            show_default=False,
        ),
    ],
    device: DeviceOpt = "auto",
    runs_dir: RunsOpt = None,
    plain: Annotated[bool, typer.Option("--plain", help="Continue each line as plain text, without the chat template.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum length of an answer in tokens.")] = 128,
) -> None:
    """Chat with a recipe's result, a run or a model, or with two of them at once.

    One line per turn, with greedy decoding. Also reads lines from a pipe. With two, both get the same prompt, each with its own
    chat template and history; their answers stand beside each other in a terminal of at least 80 columns. After each answer of a
    routed model, the bricks that gave it are printed to standard error.
    """
    from workbench.models.identity import pick_device

    if len(targets) > 2:
        raise UsageError(f"expected one or two models, found {len(targets)}", "workbench chat TARGET OTHER")
    if len(targets) == 2 and targets[0] == targets[1]:
        raise UsageError(f"{targets[0]} is named twice", "Name two different models, or one.")
    speakers = _open(targets, runs_dir, pick_device(device), plain)
    panes = Panes([speaker.name for speaker in speakers])
    if sys.stdin.isatty():
        kinds = {speaker.name: "the chat template" if speaker.templated else "plain text" for speaker in speakers}
        used = (
            next(iter(kinds.values()))
            if len(set(kinds.values())) == 1
            else ", ".join(f"{kind} for {name}" for name, kind in kinds.items())
        )
        out.say(f"enter an empty line or Ctrl-D to quit; using {used}")
    while line := _ask():
        panes.answers(partial(_answer, speakers, line, max_new_tokens))
        for speaker in speakers:
            if bricks := speaker.bricks():
                out.say(f"[{bricks}]" if len(speakers) == 1 else f"[{speaker.name}: {bricks}]")


@dataclass
class Speaker:
    """A model that one chats with.

    Attributes:
        name: Its name, as typed.
        model: Returns the live model with its weights.
        tokenizer: Its tokenizer.
        templated: Prompts are put into the tokenizer's chat template, with the turns before them.
        history: The turns so far.
    """

    name: str
    model: Callable[[], Any]
    tokenizer: Any
    templated: bool
    history: list[dict[str, str]] = field(default_factory=list)

    def answer(self, line: str, limit: int, write: Write) -> None:
        """Answer a line.

        Args:
            line: The user's line.
            limit: Maximum length of the answer in tokens.
            write: Takes the answer piece by piece.
        """
        self.history.append({"role": "user", "content": line})
        if self.templated:
            tokens = self.tokenizer.apply_chat_template(
                self.history, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        else:
            tokens = self.tokenizer(line, return_tensors="pt")
        model = self.model()
        with streaming(self.tokenizer, write) as streamer:
            made = model.generate(
                **tokens.to(model.device),
                max_new_tokens=limit,
                do_sample=False,
                streamer=streamer,
                pad_token_id=self.tokenizer.pad_token_id or self.tokenizer.eos_token_id,
            )
        text = self.tokenizer.decode(made[0, tokens["input_ids"].shape[1] :], skip_special_tokens=True)
        self.history.append({"role": "assistant", "content": str(text)})

    def bricks(self) -> str:
        """Return the bricks that gave the last answer of a routed model; "" for other models."""
        routing = getattr(self.model(), "routing", None)
        return str(routing.label(routing.last.weights[0])) if routing is not None and not routing.by_token else ""


def _answer(speakers: Sequence[Speaker], line: str, limit: int, number: int, write: Write) -> None:
    speakers[number].answer(line, limit, write)


def _open(targets: Sequence[str], runs_dir: Path | None, device: torch.device, plain: bool) -> list[Speaker]:
    """Load one or two models; two of the same base share one live model if their weights allow it."""
    from workbench.models.prompts import load_tokenizer

    opened = [open_named(target, out.event, runs_dir).resolved for target in targets]
    tokenizers = [load_tokenizer(resolved.tokenizer_path) for resolved in opened]
    models: list[Callable[[], Any]] = []
    if len(opened) == 2:
        from workbench.run.materialize import shared

        if (one := shared(opened[0], opened[1], device, out.event)) is not None:
            out.say(f"both share one model of {opened[0].recipe.fields.base_name}; {size(one.bytes)} of weights differ")
            models = [partial(one.holding, i) for i in range(2)]
    if not models:
        models = [partial(_itself, _live(resolved, device)) for resolved in opened]
        if len(models) == 2:
            out.say("two models are in memory, because they cannot share their weights")
    return [
        Speaker(target, model, tokenizer, bool(tokenizer.chat_template) and not plain)
        for target, model, tokenizer in zip(targets, models, tokenizers, strict=True)
    ]


def _itself(model: Any) -> Any:
    return model


def _ask() -> str:
    try:
        return (input("> ") if sys.stdin.isatty() else sys.stdin.readline()).strip()
    except EOFError:
        return ""


def open_live(target: str, runs_dir: Path | None, device: torch.device) -> tuple[Any, Any]:
    """Load the model of a recipe, a run or a model, and its tokenizer.

    Args:
        target: The name on the command line; see `find`.
        runs_dir: Directory of runs; default: runs/ in the project.
        device: Device of the model.

    Raises:
        WorkbenchError: If there is no such recipe, run or model, or if it has no model that can be loaded.
    """
    from workbench.models.prompts import load_tokenizer

    resolved = open_named(target, out.event, runs_dir).resolved
    return _live(resolved, device), load_tokenizer(resolved.tokenizer_path)


def _live(resolved: Resolved, device: torch.device) -> Any:
    from workbench.run.materialize import materialize

    return materialize(resolved, device, events=out.event)


PANES = 80
"""Columns of a terminal from which on two answers stand beside each other."""
Write = Callable[[str], None]
"""Callback that takes a piece of an answer as it is generated."""


class Panes:
    """Shows the answers to one prompt.

    Args:
        names: Names of the models.
        console: The terminal; default: stdout.
    """

    def __init__(self, names: Sequence[str], console: Console | None = None) -> None:
        self.names = names
        self.console = console or Console(highlight=False)
        self.beside = len(names) == 2 and self.console.is_terminal and self.console.width >= PANES

    def answers(self, answer: Callable[[int, Write], None]) -> None:
        """Print the answers of all models, each piece as it comes.

        Args:
            answer: Generates the answer of the model of a number, and passes it on piece by piece.
        """
        if not self.beside:
            for number, name in enumerate(self.names):
                if len(self.names) > 1:
                    self._line(f"[{name}]")
                answer(number, _write)
                self._line("")
            return
        texts = [""] * len(self.names)
        with Live(self.drawn(texts), console=self.console, auto_refresh=False, vertical_overflow="visible") as live:
            for number in range(len(self.names)):
                answer(number, self._pane(texts, number, live))

    def drawn(self, texts: Sequence[str]) -> Table:
        """Return the panes with texts, beside each other and equally wide."""
        table = Table.grid(expand=True, padding=(0, 1))
        for _ in self.names:
            table.add_column(ratio=1)
        panels = [
            Panel(Text(printable(text.strip("\n"))), title=Text(printable(name)), title_align="left")
            for name, text in zip(self.names, texts, strict=True)
        ]
        table.add_row(*panels)
        return table

    def _pane(self, texts: list[str], number: int, live: Live) -> Write:
        def write(piece: str) -> None:
            texts[number] += piece
            live.update(self.drawn(texts), refresh=True)

        return write

    @staticmethod
    def _line(text: str) -> None:
        _write(f"{text}\n")


def _write(text: str) -> None:
    sys.stdout.write(printable(text))
    sys.stdout.flush()


@contextmanager
def streaming(tokenizer: Any, write: Write) -> Iterator[Any]:
    """Give the streamer that passes generated text on, without the prompt and special tokens."""
    from transformers import TextStreamer

    class Streamer(TextStreamer):  # type: ignore[misc]
        """Passes text on instead of printing it."""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            """Pass on a piece of text; nothing is added at the end."""
            write(text)

    yield Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
