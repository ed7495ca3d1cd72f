"""Answers of one or two models on the terminal: in panes beside each other where it is wide enough, else one below the other."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from workbench.errors import printable

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
