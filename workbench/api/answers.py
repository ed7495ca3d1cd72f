"""Answers of two configurations side by side, for `scores items` and for Python."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from workbench.api.results import find_scores
from workbench.api.subjects import Listener, Request, refuse_left_out
from workbench.ground.errors import LeftOut, UsageError, nearest
from workbench.ground.tables import as_html, data_frame

if TYPE_CHECKING:
    from workbench.compare.answers import Answer, Item, Items

Only = Literal["changed", "won", "lost", "all"]
ONLY: tuple[Only, ...] = ("changed", "won", "lost", "all")
SHOWN = 20
"""Items that are printed, or shown in a notebook, by default."""
LONGEST = 600
"""Characters of a prompt or answer that are printed, or shown in a notebook."""
WAYS = {"won": "won", "lost": "lost", "same": "same score"}


@dataclass(frozen=True)
class Choice:
    """The items that a user asks for.

    Attributes:
        tasks: Names of tasks; none for all.
        only: Items with another score or answer, won or lost by the second configuration, or all.
        text: Text that occurs in the prompt, the right answer or an answer; None for any.
    """

    tasks: Sequence[str] = ()
    only: Only = "changed"
    text: str | None = None

    def wants(self, item: Item) -> bool:
        """Return True if the item is asked for."""
        way = self.only == "all" or item.change == self.only or (self.only == "changed" and item.differs)
        return bool(way) and _holds(item, self.text)


@dataclass(frozen=True, repr=False)
class ItemsBeside:
    """Items with the answers of two configurations.

    Attributes:
        first: Name of the first configuration.
        second: Name of the second configuration.
        counts: Number of items of the tasks asked for (`items`), and how many of them the second `won`, `lost` and scored the `same`.
        rows: The items that are asked for; each has the question, `metric`, `change`, and the answers `first` and `second`.
        left_out: Configurations that are skipped, with reasons.
    """

    first: str
    second: str
    counts: Mapping[str, int]
    rows: Sequence[Item]
    left_out: Sequence[LeftOut] = ()

    @property
    def document(self) -> Items:
        """The document that `workbench scores items --json` prints."""
        from workbench.compare.answers import Items

        return Items(first=self.first, second=self.second, shown=list(self.rows), **self.counts)

    def tables(self) -> dict[str, list[dict[str, object]]]:
        """Return one flat table, `items`: the question, the change, and score and answer of both configurations."""
        plain = ("task", "id", "cluster", "metric", "change", "prompt")
        rows = []
        for item in self.rows:
            row = {**{key: getattr(item, key) for key in plain}, "right": right_answer(item)}
            for side, answer in (("first", item.first), ("second", item.second)):
                row |= {f"{side}_score": answer.score, f"{side}_answer": answer_text(item, answer)}
            rows.append(row)
        return {"items": rows}

    def to_pandas(self, table: str | None = None) -> Any:
        """Return the table of items as a data frame.

        Args:
            table: Name of the table; default: `items`, the only one.

        Raises:
            WorkbenchError: If there is no such table, or pandas is not installed.
        """
        return data_frame(self.tables(), "items" if table is None else table)

    def _repr_html_(self) -> str:
        head = "".join(
            f"<th>{as_html(text)}</th>" for text in ("item", "change", "prompt", "right answer", self.first, self.second)
        )
        body = "".join(self._row(item) for item in self.rows[:SHOWN])
        rest = len(self.rows) - SHOWN
        more = f"<p>{rest} more items are in <code>rows</code> and <code>to_pandas()</code>.</p>" if rest > 0 else ""
        return f"<p>{as_html(self.sentence)}</p><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{more}"

    def _row(self, item: Item) -> str:
        """Return an item as a row of the table in a notebook."""
        said = [scored_answer(item, answer) for answer in (item.first, item.second)]
        cells = [f"{item.task} {item.id}", WAYS[item.change], item.prompt or "", right_answer(item), *said]
        style = 'style="text-align: left; white-space: pre-wrap"'
        return f"<tr>{''.join(f'<td {style}>{as_html(cut(cell))}</td>' for cell in cells)}</tr>"

    @property
    def sentence(self) -> str:
        """The numbers of items in words."""
        n = self.counts
        return f"{n['items']} items: {n['won']} won, {n['lost']} lost, {n['same']} with the same score"

    def __repr__(self) -> str:
        return f"<{self.second} beside {self.first}: {self.sentence}, {len(self.rows)} here>"


def compared_items(request: Request, choice: Choice, listener: Listener) -> ItemsBeside:
    """Return the items that two configurations answered, with both answers, from the score store.

    Args:
        request: Two configurations, or one to show beside the baseline.
        choice: The items that are asked for.
        listener: Who is told what is left out.

    Raises:
        UsageError: If there are not one or two configurations, or a task was not scored.
        WorkbenchError: If one of them is not scored.
    """
    from workbench.compare.answers import paired_answers

    names = request.names
    if len(dict.fromkeys(names)) not in (1, 2) or len(names) > 2:
        raise UsageError(f"expected one or two configurations, found {len(names)}", "workbench scores items FIRST SECOND")
    if len(names) == 2 and names[0] == names[1]:
        raise UsageError(f"{names[0]} is named twice", "Name two configurations, or one to see it beside the baseline.")
    found = find_scores(request, None, listener)
    if len(names) == 2 and found.pair is None:
        refuse_left_out(found.left_out)
        raise UsageError(f"{names[0]} and {names[1]} are one configuration", "Name two configurations.")
    before, after = found.pair or (found.baseline or found.suite_baseline, found.named[-1])
    every = paired_answers(found.store, found.scores, before, after)
    known = list(dict.fromkeys(item.task for item in every))
    for name in choice.tasks:
        if name not in known:
            raise UsageError(f"--task {name}: no items of this task were scored", nearest(name, known))
    asked = [item for item in every if not choice.tasks or item.task in choice.tasks]
    counts = {"items": len(asked), **{way: sum(item.change == way for item in asked) for way in WAYS}}
    return ItemsBeside(before, after, counts, [item for item in asked if choice.wants(item)], tuple(found.left_out))


def cut(text: str) -> str:
    """Return a text with at most `LONGEST` characters, and how many more there are."""
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} … ({len(text) - LONGEST} more characters)"


def right_answer(item: Item) -> str:
    """Return the right answer: a text, or the right choices."""
    choices, gold = item.choices, item.gold
    if not choices:
        return str(gold)
    right: Sequence[Any] = gold if isinstance(gold, list) else [gold]
    return " | ".join(str(choices[g]) if isinstance(g, int) and 0 <= g < len(choices) else str(g) for g in right)


def answer_text(item: Item, answer: Answer) -> str:
    """Return an answer: the generated text, the chosen choice, or log-likelihoods."""
    if answer.response is not None:
        return str(answer.response or "(empty)")
    if answer.picked is not None:
        return str((item.choices or ())[answer.picked])
    logs = answer.loglikelihoods
    return f"log-likelihood {', '.join(f'{x:.4g}' for x in logs)}" if logs else ""


def scored_answer(item: Item, answer: Answer) -> str:
    """Return an answer with its score before it, such as "[1] w3"."""
    score = answer.score
    shown = "–" if score is None else "/".join(f"{x:g}" for x in score) if isinstance(score, list) else f"{score:g}"
    return f"[{shown}] {answer_text(item, answer)}".rstrip()


def _holds(item: Item, text: str | None) -> bool:
    """Return True if a text occurs in an item's prompt, choices, right answer or answers; upper and lower case are the same."""
    if not text:
        return True
    parts = [item.prompt, item.gold, *(item.choices or ()), item.first.response, item.second.response]
    return any(text.lower() in str(part).lower() for part in parts if part is not None)
