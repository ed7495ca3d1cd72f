"""Optional parts of the workbench: folders of this package with a `part.py`, which names what the part gives. A part can be left out.

A place is a dotted name below `workbench`, such as "serve.commands.serve". It is imported when it is used, and no earlier.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from workbench.ground.errors import WorkbenchError

FILE = "part.py"


@dataclass(frozen=True, kw_only=True)
class Part:
    """Name what a part gives, without importing it.

    Attributes:
        commands: Command, such as "serve" or "brick advise" -> place of its function, or of the group that it is.
        documents: Command with --json -> place of the class that it prints; a list of one place stands for a list.
        kinds: Kind of step -> place of the `Kind` that applies it.
        watch: Module whose functions `check` and `page` show a growing report for --watch.
        searches: Module whose functions `searched` and `write_pages` add pages to `workbench report`.
        runs: Module whose function `recipe_of` gives the recipe that averages the checkpoints of a training run.
        sentences: Module whose function `compare_modules` compares what sentence-transformers adds to two transformers.
        weights: Quantization, as `weights.packed.reader_of` names it -> place of the function that finds its tensors.
        trackers: Module whose `open_tracker`, `log_runs` and `runs_of_scores` log results for --log.
        outputs: Module whose `refusal` and `PackedWeights` write results in the format of their base.
        extras: Extra of pyproject.toml -> library that the part imports -> its distribution.
        needs: Other parts that it imports.
    """

    commands: Mapping[str, str] = field(default_factory=dict)
    documents: Mapping[str, str | Sequence[str]] = field(default_factory=dict)
    kinds: Mapping[str, str] = field(default_factory=dict)
    watch: str = ""
    searches: str = ""
    runs: str = ""
    sentences: str = ""
    weights: Mapping[str, str] = field(default_factory=dict)
    trackers: str = ""
    outputs: str = ""
    extras: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    needs: Sequence[str] = ()


HOOKS = {
    "watch": "view",
    "searches": "search",
    "runs": "averaging",
    "sentences": "embeddings",
    "trackers": "trackers",
    "outputs": "quantized",
}
"""Hook -> the part that has it, whether it is there or not."""


@cache
def parts() -> Mapping[str, Part]:
    """Return the parts that can be used, by the names of their folders. Imports their `part.py` and nothing else.

    A part is left out if one that it needs is missing.
    """
    here = _folders()
    return {name: part for name, part in here.items() if _lacking(name, here) is None}


def imported(place: str) -> Any:
    """Return what a place names."""
    module, _, name = place.rpartition(".")
    return getattr(import_module(f"workbench.{module}"), name)


def hook(name: str, what: str | None = None) -> Any:
    """Return the module that a part names for a hook, such as "watch"; None if no part has it.

    Args:
        name: Field of `Part`.
        what: What cannot do without it, such as "--watch"; None if it can.

    Raises:
        WorkbenchError: If `what` is given and no part has it.
    """
    place = next((place for part in parts().values() if (place := getattr(part, name))), None)
    if place is None and what:
        raise missing(HOOKS[name], what)
    return place and import_module(f"workbench.{place}")


def missing(part: str, what: str) -> WorkbenchError:
    """Return the error for something that a part gives, if the part cannot be used.

    Args:
        part: Name of the part.
        what: What needs it, such as "`workbench serve`".
    """
    lacking = _lacking(part, _folders()) or part
    because = "" if lacking == part else f", which needs the part '{lacking}'"
    return WorkbenchError(
        f"{what} needs the part '{part}'{because}, and this installation lacks it: there is no folder workbench/{lacking}",
        "Install the whole package: pip install --force-reinstall --no-deps brick-workbench; in a clone, restore the folder.",
    )


@cache
def _folders() -> Mapping[str, Part]:
    """Return all parts whose folder is there."""
    files = sorted(file for folder in sys.modules["workbench"].__path__ for file in Path(folder).glob(f"*/{FILE}"))
    return {file.parent.name: import_module(f"workbench.{file.parent.name}.part").PART for file in files}


def _lacking(name: str, here: Mapping[str, Part]) -> str | None:
    """Return the part that is missing if one is to be used: the part itself, or one that it needs."""
    if name not in here:
        return name
    return next((lacking for need in here[name].needs if (lacking := _lacking(need, here))), None)
