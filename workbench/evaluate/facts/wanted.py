"""Which facts are scored: those of a file, of an edit brick, or of every edit that a recipe uses."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import xxhash

from workbench.bricks.brick import Brick
from workbench.errors import WorkbenchError
from workbench.facts import Fact, read_facts
from workbench.files import json_digest
from workbench.recipe.eval_fields import FactsEval
from workbench.recipe.recipe import Recipe, load_recipe
from workbench.resolve.resolved import Resolved
from workbench.run.kinds.edit import FACTS
from workbench.steps import Step

EDITS = "edits"
PREFIX = "facts:"


@dataclass(frozen=True)
class Wanted:
    """Facts to score. The suite needs the base's answers, so it is made later: `build`.

    Attributes:
        options: As the recipe gives them.
        source: The file, as people call it.
        everything: All facts of the file.
        text: The text file of the perplexity task; None for the bundled one.
        cohorts: Number of facts taught -> first, last and sample -> ids, where facts are scored one after another.
    """

    options: FactsEval
    source: str
    everything: tuple[Fact, ...] = field(repr=False)
    text: Path | None = None
    cohorts: Mapping[int, Mapping[str, tuple[str, ...]]] = field(default_factory=dict, repr=False)

    @cached_property
    def digest(self) -> str:
        """Of all facts of the file, whatever its format."""
        return facts_digest(self.everything)

    @cached_property
    def facts(self) -> tuple[Fact, ...]:
        """Those that are scored."""
        chosen = {i for groups in self.cohorts.values() for ids in groups.values() for i in ids}
        chosen = chosen or ranked(self.everything, self.options.limit or len(self.everything))
        return tuple(fact for fact in self.everything if fact.id in chosen)

    @property
    def stem(self) -> str:
        """What tasks are called by: the file's stem; of a brick's facts.jsonl the name of its folder."""
        path = Path(self.source)
        name = path.parent.name if path.name == FACTS and path.parent.name else path.stem
        name = re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-._") or "facts"
        return f"{name}-sequential" if self.cohorts else name

    @property
    def suite(self) -> str:
        """The suite's name."""
        return self.stem if self.cohorts or self.stem.endswith("facts") else f"{self.stem}-facts"


def ranked(facts: Sequence[Fact], count: int) -> set[str]:
    """Ids of so many facts: those with the smallest hash of their id, a sample that does not depend on the file's order."""
    return {f.id for f in sorted(facts, key=lambda f: (xxhash.xxh3_64_intdigest(f.id.encode()), f.id))[:count]}


def wanted(options: FactsEval, project: Path) -> Wanted:
    """The facts of a file, or of an edit brick's directory. Errors: as `read_facts`; a text file that is not there."""
    path = project / options.facts
    shown = options.facts
    if path.is_dir():
        path, shown = path / FACTS, f"{shown.rstrip('/')}/{FACTS}"
    text = project / options.text if options.text else None
    if text is not None and not text.is_file():
        raise WorkbenchError(f"{options.text}: no such text file", "One passage a line, relative to the project.")
    return Wanted(options, shown, tuple(read_facts(path, shown)), text)


def facts_of_edits(recipe: Recipe) -> Iterator[Wanted]:
    """The facts of every edit step of a recipe, then those of its edit bricks, then those of recipes that are its bricks."""
    for step in recipe.steps:
        if named := facts_file(step):
            yield wanted(FactsEval(facts=named), recipe.project)
    for ref in recipe.fields.bricks.values():
        target = recipe.project / ref.target
        if ref.kind == "recipe":
            yield from facts_of_edits(load_recipe(target))
        elif (target / FACTS).is_file():
            yield wanted(FactsEval(facts=ref.target), recipe.project)


def edited_for(resolved: Resolved) -> tuple[str, ...]:
    """Digests of the facts that a configuration was edited for, by its steps or by the bricks that its steps use."""
    return tuple(dict.fromkeys(_edited_for(resolved)))


def _edited_for(resolved: Resolved) -> Iterator[str]:
    for step in resolved.recipe.steps:
        if facts_file(step):
            yield facts_digest(read_step(step, resolved.recipe.project))
    for name in resolved.parents:
        brick = resolved.bricks[name]
        if not isinstance(brick, Brick):
            yield from _edited_for(brick)
        elif (file := brick.path / FACTS).is_file():
            yield facts_digest(read_facts(file, str(file)))


def facts_file(step: Step) -> str | None:
    """The facts file that an edit step names, of the weights or of a memory."""
    named = getattr(step, "facts", None) if step.verb == "edit" else None
    return named if isinstance(named, str) else None


def read_step(step: Step, project: Path) -> list[Fact]:
    """All facts of the file that an edit step names; none where it names none."""
    named = facts_file(step)
    return read_facts(project / named, named) if named else []


def facts_digest(facts: Sequence[Fact]) -> str:
    """Of a set of facts as documents: the same for a file and for the copy that a brick keeps, sorted by id."""
    return json_digest([fact.document() for fact in sorted(facts, key=lambda fact: fact.id)])
