"""Files with several documents, for `mergekit-multi`: each document may use the results of others by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from workbench import yamldoc
from workbench.errors import InvalidRecipeError


def in_order(documents: list[yamldoc.Document], to: Path | None) -> list[tuple[str, yamldoc.Document]]:
    """Return the documents with their names, each after those that it uses; the result comes last.

    The result is the document without a name; if all have one, it is the last of the file.

    Args:
        documents: The documents of the file.
        to: The recipe file of the result.

    Raises:
        WorkbenchError: If there is no output file, names repeat, two documents have no name, or documents use each other in a circle.
    """
    if to is None:
        raise documents[1].error(
            (),
            f"the file has {len(documents)} documents, which become {len(documents)} recipes",
            "Name the file of the last one with -o.",
        )
    named: dict[str, yamldoc.Document] = {}
    for document in documents:
        data = document.data
        if not isinstance(data, Mapping) or "merge_method" not in data:
            raise document.error((), "expected a mergekit configuration with a merge_method", "Give a file for `mergekit-multi`.")
        name = str(data.get("name") or "")
        if name in named:
            what = f"two documents are called '{name}'" if name else "two documents have no name"
            raise document.error(("name",), f"{what}; mergekit rejects this too", "Add `name:` to all but the last document.")
        named[name] = replace(document, data={key: value for key, value in data.items() if key != "name"})
    uses = {name: [other for other in named if other and other in set(_texts(document.data))] for name, document in named.items()}
    order: list[str] = []
    for name in named:
        _visit(name, uses, order, ())
    result = "" if "" in named else list(named)[-1]
    order.sort(key=lambda name: name == result)
    if any(result in uses[name] for name in order):
        raise documents[-1].error((), f"'{result}' is used by another document, so it is not the result", "Move it to the front.")
    return [(name if name != result else "", named[name]) for name in order]


def _visit(name: str, uses: Mapping[str, list[str]], order: list[str], above: tuple[str, ...]) -> None:
    """Append a document to `order` after those that it uses."""
    if name in above:
        raise InvalidRecipeError(
            f"documents use each other: {' -> '.join((*above[above.index(name) :], name))}", "Remove one of these uses."
        )
    if name in order:
        return
    for other in uses[name]:
        _visit(other, uses, order, (*above, name))
    order.append(name)


def _texts(value: Any) -> Iterator[str]:
    """Yield every text in a document, and the model in references such as MODEL+LORA."""
    if isinstance(value, str):
        yield value.partition("+")[0].partition("@")[0]
    for inner in value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ():
        yield from _texts(inner)
