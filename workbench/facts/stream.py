"""Streams of facts: files whose rows are read in order, so that a later row updates or removes an earlier fact.

A row with the prompt of an earlier fact and another target updates it; a row {"action": "rm", "prompt": …, "subject": …} removes it.
A file may continue an earlier stream: its rows then update and remove facts of that one too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from workbench.facts.facts import ACTION, EXPECTED, Fact, FactRow, fact_of, has_action, read_rows
from workbench.facts.log import REMOVE
from workbench.facts.published import Published, Skip, convert, format_of, merged, read_all
from workbench.ground.errors import WorkbenchError, nearest, refuse_unknown
from workbench.ground.recognize import expecting

REMOVAL = '{"action": "rm", "prompt": "The capital of {subject} is", "subject": "Atlantis"}'


@dataclass(frozen=True)
class Removal:
    """A row that removes a fact.

    Attributes:
        text: The fact's prompt with the subject filled in.
        place: file:line, for messages.
    """

    text: str
    place: str


@dataclass(frozen=True)
class Start:
    """An earlier stream that a file continues.

    Attributes:
        name: Where the stream is stored, for messages.
        facts: Its statements, in order.
    """

    name: str
    facts: tuple[Fact, ...]


@dataclass(frozen=True)
class Stream:
    """The content of a facts file that is read in order.

    Attributes:
        events: The rows that change something: new facts, updates and removals.
        skipped: Rows and parts of rows of a published file that were skipped.
        format: Name of the published format; "facts" for the project's own.
        before: Statements of the earlier stream that the file continues.
    """

    events: tuple[Fact | Removal, ...]
    skipped: tuple[Skip, ...] = ()
    format: str = "facts"
    before: tuple[Fact, ...] = ()

    def first(self, count: int | None) -> Stream:
        """Return the stream of the file's first events; None returns all."""
        return replace(self, events=self.events[:count])

    @property
    def statements(self) -> list[Fact]:
        """All values of the facts that are not removed, in order; an updated fact has several.

        A removed fact leaves no value, so that the stream equals one that never had it. It may be stated again later.
        """
        events = (*self.before, *self.events)
        removed = {event.text: number for number, event in enumerate(events) if isinstance(event, Removal)}
        return [event for number, event in enumerate(events) if isinstance(event, Fact) and number > removed.get(event.text, -1)]

    @property
    def current(self) -> list[Fact]:
        """The facts with their latest values, in the order in which these were stated."""
        return latest(self.statements)


def latest(statements: Iterable[Fact]) -> list[Fact]:
    """Return the last statement of every prompt, in order."""
    stated = list(statements)
    last = {fact.text: number for number, fact in enumerate(stated)}
    return [fact for number, fact in enumerate(stated) if last[fact.text] == number]


def read_stream(path: Path, label: str, start: Start | None = None) -> Stream:
    """Read a facts file in order; a row that repeats a fact's current target changes nothing.

    Args:
        path: A file in the project's own format, or a published benchmark without removals.
        label: The file's name in messages.
        start: An earlier stream that the file continues.

    Raises:
        WorkbenchError: If a row is invalid (see `read_facts`); if a removal names no fact, or one that is removed already; if an
            update has another subject than the fact; if two facts have the same id; or if there are no facts. The message names
            file and line.
    """
    with expecting(path, "a file of facts", "facts", "benchmark"):
        rows = read_rows(path, label, EXPECTED)
    before = start.facts if start else ()
    reader = _Reader(format_of(rows), start.name if start else None)
    for fact in before:
        reader.add(fact)
    for row in rows:
        reader.read(row)
    if not rows or not reader.events:
        read_all(path, label)  # raises: it names the rows that are skipped
    stated = [event for event in reader.events[: len(before)] if isinstance(event, Fact)]
    return Stream(tuple(reader.events[len(before) :]), tuple(reader.skipped), reader.format or "facts", tuple(stated))


@dataclass
class _Reader:
    """The state of the stream after the rows so far.

    Attributes:
        format: Name of the published format; None for the project's own.
        start: Name of the earlier stream; None if there is none.
        events: The events, those of the earlier stream first.
        current: Prompt -> number of the event with its current value.
        ids: ID -> prompt of the current fact that has it.
        removed: Prompt -> its last removal.
        skipped: Rows that were skipped.
    """

    format: str | None
    start: str | None = None
    events: list[Fact | Removal] = field(default_factory=list)
    current: dict[str, int] = field(default_factory=dict)
    ids: dict[str, str] = field(default_factory=dict)
    removed: dict[str, Removal] = field(default_factory=dict)
    skipped: list[Skip] = field(default_factory=list)

    def read(self, row: FactRow) -> None:
        """Add a row."""
        if has_action(row):
            self._remove(_removal(row, self.format))
            return
        read = convert([row], self.format) if self.format else Published([fact_of(row.data, row.place)], [], "facts")
        self.skipped += read.skipped
        for fact in read.facts:
            self._state(fact)

    def _state(self, fact: Fact) -> None:
        """Add a fact, or its new value."""
        number = self.current.get(fact.text)
        if number is None:
            self.add(fact)
            return
        earlier = self.events[number]
        assert isinstance(earlier, Fact)
        if earlier.target == fact.target:
            if self.format:  # a published row may bring further test prompts
                self.events[number] = merged(earlier, fact)
            return
        if earlier.subject != fact.subject:
            raise WorkbenchError(
                f"{fact.place}: updates {fact.text!r} of {earlier.place}, but its subject is {fact.subject!r} instead of "
                f"{earlier.subject!r}",
                "An update has the prompt and the subject of the fact.",
            )
        self.add(fact)

    def add(self, fact: Fact) -> None:
        """Make a fact's value the current one of its prompt."""
        if (number := self.current.get(fact.text)) is not None:
            earlier = self.events[number]
            assert isinstance(earlier, Fact)
            del self.ids[earlier.id]
        # No other current fact has the id; published rows get a number if needed.
        name, number = fact.id, 2
        while name in self.ids:
            if not self.format:
                other = self.events[self.current[self.ids[name]]]
                raise WorkbenchError(f"{fact.place}: same id '{name}' as {other.place}", "Give every fact its own id.")
            name, number = f"{fact.id}-{number}", number + 1
        named = fact if name == fact.id else replace(fact, id=name)
        self.ids[named.id] = named.text
        self.current[named.text] = len(self.events)
        self.events.append(named)

    def _remove(self, removal: Removal) -> None:
        """Remove a fact."""
        number = self.current.pop(removal.text, None)
        if number is None:
            earlier = self.removed.get(removal.text)
            problem = f"{earlier.place} has already removed" if earlier else "no earlier line teaches"
            problem += f", and {self.start} does not hold" if self.start and not earlier else ""
            raise WorkbenchError(
                f"{removal.place}: cannot remove {removal.text!r}, which {problem}",
                "Delete this line." if earlier else nearest(removal.text, self.current) or "Delete this line.",
            )
        fact = self.events[number]
        assert isinstance(fact, Fact)
        del self.ids[fact.id]
        self.removed[removal.text] = removal
        self.events.append(removal)


def _removal(row: FactRow, published: str | None) -> Removal:
    """Return the removal that a row describes."""
    data = row.data
    assert isinstance(data, Mapping)
    hint = f"A removal is {REMOVAL}."
    if data[ACTION] != REMOVE:
        raise WorkbenchError(
            f"{row.place}: expected '{REMOVE}' in '{ACTION}', found {data[ACTION]!r}",
            f"{hint} To update a fact, write a row with its prompt and the new target, without '{ACTION}'.",
        )
    if published:
        raise WorkbenchError(
            f"{row.place}: a removal in a file of the format {published}",
            "Convert the file first with `workbench facts import FILE -o FACTS.jsonl`, and add the removal there.",
        )
    refuse_unknown(data, (ACTION, "prompt", "subject"), row.place, "a removal")
    if not isinstance(data.get("prompt"), str) or not data["prompt"].strip():
        raise WorkbenchError(f"{row.place}: a removal needs the fact's 'prompt'", hint)
    same = fact_of({**{key: data[key] for key in data if key != ACTION}, "target": REMOVE}, row.place)
    return Removal(same.text, row.place)
