"""Output to the terminal: data goes to stdout, messages to stderr, and progress bars only to a terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from workbench.ground.errors import WorkbenchError, duration, printable, shortened

if TYPE_CHECKING:
    from workbench.ground.events import Event, Whole
    from workbench.ground.results import JsonObject

    Document = JsonObject | Sequence[JsonObject]

# json.dumps escapes characters below U+0020 itself. Other control characters and lone surrogates are escaped here as \\uXXXX.
_IN_JSON = {i: f"\\u{i:04x}" for i in (*range(127, 160), *range(0x2028, 0x202F), *range(0x2066, 0x206A), *range(0xD800, 0xE000))}


def shown(text: str) -> str:
    """Return a text escaped for rich, so that names from files neither style the line nor move the cursor."""
    return escape(printable(text))


def styled(text: str, style: str) -> str:
    """Return an escaped text in rich's markup for a style."""
    return f"[{style}]{text}[/]" if style else text


class Terminal:
    """The only place that prints.

    Attributes:
        quiet: Print data and errors only.
        verbose: Print every progress event, also where no terminal shows a bar.
    """

    def __init__(self) -> None:
        self.quiet = False
        self.verbose = False
        self.talk = Console(stderr=True, highlight=False, soft_wrap=True)
        # A pipe has no width, so cells are not wrapped there.
        self.data = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 400)
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._whole = False  # the bar is that of the whole work
        self.begin()

    def begin(self) -> None:
        """Forget the last line and the warnings of the command before, where several run in one process."""
        self._last: tuple[Any, ...] = ()
        self._warned: dict[str, None] = {}

    def result(
        self, document: Callable[[], Document], text: Callable[[], None], *, json: bool, warnings: Iterable[str] = ()
    ) -> None:
        """Print the result of a command.

        Args:
            document: Returns the document that `--json` prints; a sequence is printed as a list. One object gets all warnings of the
                command so far as its field `warnings`, and so does each entry of a list that has this field.
            text: Prints the result for people. Its messages (`say`, `warn`) are not printed if quiet.
            json: Value of `--json`.
            warnings: Warnings about the result, which are printed after the text.
        """
        if not json:
            text()
        for warning in warnings:
            self.warn(warning)
        if not json:
            return
        result = document()
        listed = isinstance(result, Sequence)
        documents = [one.to_dict() for one in (result if isinstance(result, Sequence) else [result])]
        for one in documents:
            if not listed or "warnings" in one:
                one["warnings"] = list(dict.fromkeys([*(one.get("warnings") or ()), *self._warned]))
        self.json(documents if listed else documents[0])

    def json(self, document: Any) -> None:
        """Print one JSON document on stdout."""
        sys.stdout.write(json.dumps(document, indent=2, ensure_ascii=False).translate(_IN_JSON) + "\n")

    def line(self, text: str) -> None:
        """Print a line of data on stdout."""
        sys.stdout.write(printable(text) + "\n")

    def say(self, text: str) -> None:
        """Print a message on stderr, unless quiet."""
        if not self.quiet:
            self.stop()
            self.talk.print(shown(text))

    def always(self, text: str) -> None:
        """Print a message on stderr, also if quiet: one that the user asked for."""
        self.stop()
        self.talk.print(shown(text))

    def warn(self, text: str) -> None:
        """Print a warning on stderr, once a command and unless quiet. `result` adds it to the document."""
        known = text in self._warned
        self._warned[text] = None
        if not self.quiet and not known:
            self.stop()
            self.talk.print(f"[yellow]warning:[/] {shown(text)}")

    def error(self, error: WorkbenchError) -> None:
        """Print an error with its hint on stderr."""
        self.stop()
        self.talk.print(f"[bold red]error:[/] {shown(shortened(error.message))}")
        if error.hint:
            self.talk.print(f"  [bold]hint:[/] {shown(shortened(error.hint))}")

    @property
    def width(self) -> int:
        """Columns of the terminal; 400 for a pipe."""
        return self.data.width

    def heading(self, text: str) -> None:
        """Print a line of data on stdout, in bold on a terminal."""
        self.colored([(text, "bold")])

    def table(
        self,
        columns: Sequence[str],
        rows: Iterable[Sequence[str]],
        right: Iterable[int] = (),
        style: Callable[[int, str], str] = lambda _, __: "",
    ) -> None:
        """Print a table on stdout.

        Args:
            columns: Heads of the columns.
            rows: Cells of each row.
            right: Indices of the columns that are aligned right.
            style: Returns the style of a cell on a terminal, such as "green", from the index of its column and its text; "" for none.
        """
        numbers = set(right)
        table = Table(box=None, pad_edge=False, header_style="bold")
        for i, column in enumerate(columns):
            table.add_column(column, justify="right" if i in numbers else "left", no_wrap=i == 0)
        for row in rows:
            table.add_row(*(styled(shown(cell), style(i, cell)) for i, cell in enumerate(row)))
        self.data.print(table)

    def colored(self, parts: Sequence[tuple[str, str]]) -> None:
        """Print a line of data on stdout in which each part has a style of its own, such as "cyan"; "" for none."""
        from rich.text import Text

        self.data.print(Text.assemble(*((printable(text), style) for text, style in parts)))

    def event(self, event: Event) -> None:
        """Show a progress event: one line per stage, or a bar on a terminal if the event has counts.

        Events that tell of the whole work have one bar together on a terminal, and elsewhere the time left at the end of their lines.
        """
        if self.quiet:
            return
        whole = event.get("overall")
        if whole and self.talk.is_terminal:
            self._advance_whole(event, whole)
            return
        if "scored" in event:
            return
        stage, text = str(event.get("stage", "")), str(event.get("text", ""))
        name = (
            f"{event['configuration']} ({event['number']}/{event['of']})"
            if "configuration" in event
            else str(event.get("step", ""))
        )
        head = f"{stage:<8}{name}{'  ' if name and text else ''}"
        if "done" not in event:
            if (stage, name, text) != self._last:
                self.say(f"{head}{text}")
            self._last = (stage, name, text)
        elif self.talk.is_terminal:
            self._advance(head + text, int(event["done"]), int(event["total"]))
        elif self.verbose or stage == "search" or (event["done"] == event["total"] and stage in ("score", "train", "edit")):
            self.say(f"{head}{text}{_whole_text(whole)}")

    def _advance(self, text: str, done: int, total: int) -> None:
        columns = TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn()
        self._show(False, columns, description=printable(text), completed=done, total=total)
        if done == total:
            self.stop()
            self.say(text)

    def _advance_whole(self, event: Event, whole: Whole) -> None:
        """Show the line of the whole work: what is in progress, the share that is done, and the time left."""
        text = printable(f"{event['stage']:<8}{event['number']}/{event['of']} {event['configuration']}  {event.get('text', '')}")
        columns = (
            TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis")),
            BarColumn(20),
            TextColumn("{task.percentage:>3.0f} %{task.fields[left]}", markup=False, table_column=Column(no_wrap=True)),
        )
        named = {"description": text} if "text" in event or self._bar is None or not self._whole else {}
        self._show(True, columns, total=1.0, completed=whole["share"], left=time_left(whole), **named)
        if "scored" in event and whole["finished"] == whole["of"]:
            what = event["configuration"] if whole["of"] == 1 else f"{whole['of']}/{whole['of']} configurations"
            self.say(f"{event['stage']:<8}{what} {'is' if whole['of'] == 1 else 'are'} scored")

    def _show(self, whole: bool, columns: Sequence[ProgressColumn], **values: Any) -> None:
        """Show values in the bar, which is begun anew if the one before was of another kind."""
        if self._whole != whole:
            self.stop()
        if self._bar is None or self._task is None:
            self._bar, self._whole = Progress(*columns, console=self.talk, transient=True), whole
            self._task = self._bar.add_task("", total=1.0, left="")
            self._bar.start()
        self._bar.update(self._task, **values)

    def stop(self) -> None:
        """Remove the progress bar before something else is printed."""
        if self._bar is not None:
            bar, self._bar, self._whole = self._bar, None, False
            bar.stop()


def _whole_text(whole: Whole | None) -> str:
    """Return how much of the whole work is done, for the end of a line; "" where it is the only part of the work."""
    if whole is None or whole["of"] == 1:
        return ""
    return f"  ({100 * whole['share']:.0f} % of {whole['of']} configurations{time_left(whole)})"


def time_left(whole: Whole) -> str:
    """Return the time left of the whole work for the end of a text; "" where it is not known or nothing is left."""
    return f", about {duration(whole['left'])} left" if whole["left"] and whole["left"] >= 0.5 else ""


out = Terminal()
