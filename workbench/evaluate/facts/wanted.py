"""The facts that are scored: those of files, of edits, and of the checkpoints of an edit that teaches one after another."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import xxhash

from workbench.facts.facts import FACTS, Fact
from workbench.facts.published import read_facts
from workbench.facts.stream import Start, Stream, read_stream
from workbench.ground.errors import InvalidRecipeError, WorkbenchError
from workbench.ground.files import json_digest
from workbench.recipe.fields import FactsEval, SequentialEval
from workbench.recipe.recipe import Recipe, dump_step, load_recipe
from workbench.resolve.resolved import Resolved
from workbench.steps import EditMethod, Step

EDITS = "edits"
PREFIX = "facts:"
FEWEST = 10  # smallest number of facts in a cohort if batches are smaller


@dataclass(frozen=True)
class Wanted:
    """Facts to score. The suite needs the base's answers, so `build` makes it later.

    Attributes:
        options: Options from the recipe.
        source: Display name of the file.
        everything: All facts of the file; of a stream, with their current values.
        text: Text file of the perplexity task; None: the bundled one.
        stream: The rows of the file, if an edit step reads it in order.
        cohorts: Number of facts edited -> "first", "last" and "sample" -> IDs, if facts are scored one after another.
    """

    options: FactsEval
    source: str
    everything: tuple[Fact, ...] = field(repr=False)
    text: Path | None = None
    stream: Stream | None = field(default=None, repr=False)
    cohorts: Mapping[int, Mapping[str, tuple[str, ...]]] = field(default_factory=dict, repr=False)

    @property
    def in_any_order(self) -> bool:
        """True if steps that do not read the file in order can use it: no row updates, removes or continues earlier facts."""
        return self.stream is None or (not self.stream.before and len(self.stream.events) == len(self.everything))

    @cached_property
    def digest(self) -> str:
        """Digest of all facts of the file, independent of its format."""
        return facts_digest(self.everything)

    @cached_property
    def facts(self) -> tuple[Fact, ...]:
        """The facts that are scored."""
        chosen = {i for groups in self.cohorts.values() for ids in groups.values() for i in ids}
        chosen = chosen or ranked(self.everything, self.options.limit or len(self.everything))
        return tuple(fact for fact in self.everything if fact.id in chosen)

    @property
    def stem(self) -> str:
        """Beginning of the tasks' names: the file's stem, or the folder's name for a brick's facts.jsonl."""
        path = Path(self.source)
        name = path.parent.name if path.name == FACTS and path.parent.name else path.stem
        name = re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-._") or "facts"
        return f"{name}-sequential" if self.cohorts else name

    @property
    def suite(self) -> str:
        """Name of the suite."""
        return self.stem if self.cohorts or self.stem.endswith("facts") else f"{self.stem}-facts"


def ranked(facts: Sequence[Fact], count: int) -> set[str]:
    """Return the IDs of `count` facts with the smallest hash of their ID, a sample that does not depend on the file's order."""
    return {f.id for f in sorted(facts, key=lambda f: (xxhash.xxh3_64_intdigest(f.id.encode()), f.id))[:count]}


def wanted(options: FactsEval, project: Path, streams: Mapping[Path, Start | None] | None = None) -> Wanted:
    """Return the facts of a file, or of an edit brick's directory.

    Args:
        options: Options with the file.
        project: Folder that the file is relative to.
        streams: Resolved path of each file that is read in order -> the earlier stream that it continues; see `streams_of`.

    Raises:
        WorkbenchError: If the facts are invalid, or the text file does not exist.
    """
    path = project / options.facts
    display_name = options.facts
    if path.is_dir():
        path, display_name = path / FACTS, f"{display_name.rstrip('/')}/{FACTS}"
    text = project / options.text if options.text else None
    if text is not None and not text.is_file():
        raise WorkbenchError(
            f"{options.text}: the text file does not exist", "Give a file with one passage per line, relative to the project."
        )
    if streams is None or path.resolve() not in streams:
        return Wanted(options, display_name, tuple(read_facts(path, display_name)), text)
    stream = read_stream(path, display_name, streams[path.resolve()])
    return Wanted(options, display_name, tuple(stream.current), text, stream)


def streams_of(recipes: Iterable[Recipe]) -> dict[Path, Start | None]:
    """Return the facts files that edit steps of recipes, and of recipes that are their bricks, read in order.

    Returns:
        Resolved path of each file -> the earlier stream that it continues.
    """
    files: dict[Path, Start | None] = {}
    remaining, seen = list(recipes), set[Path]()
    while remaining:
        recipe = remaining.pop()
        for step in recipe.steps:
            if isinstance(step, EditMethod) and step.in_order and (file := facts_file(step)):
                files[(recipe.project / file).resolve()] = step.stream_start(recipe.project)
        for ref in recipe.fields.bricks.values():
            nested = (recipe.project / ref.target).resolve()
            if ref.kind == "recipe" and nested not in seen:  # a circle of recipes is refused when it is resolved
                seen.add(nested)
                remaining.append(load_recipe(nested))
    return files


def facts_of_edits(recipe: Recipe) -> Iterator[Wanted]:
    """Yield the facts of a recipe's edit steps, then of its edit bricks, then of recipes that are its bricks."""
    for step in recipe.steps:
        if file := facts_file(step):
            yield wanted(FactsEval(facts=file), recipe.project, streams_of([recipe]))
    for ref in recipe.fields.bricks.values():
        target = recipe.project / ref.target
        if ref.kind == "recipe":
            yield from facts_of_edits(load_recipe(target))
        elif (target / FACTS).is_file():
            yield wanted(FactsEval(facts=ref.target), recipe.project)


def edited_for(resolved: Resolved) -> tuple[str, ...]:
    """Return the digests of the facts that a configuration is edited for, by its steps or by the bricks they use."""
    return tuple(dict.fromkeys(_edited_for(resolved)))


def _edited_for(resolved: Resolved) -> Iterator[str]:
    """Yield the digests of the facts of a configuration's steps and bricks."""
    for step in resolved.recipe.steps:
        if facts_file(step):
            yield facts_digest(read_step(step, resolved.recipe.project))
    for name in resolved.parents:
        if name in resolved.nested:
            yield from _edited_for(resolved.nested[name])
        elif (file := resolved.on_disk[name].path / FACTS).is_file():
            yield facts_digest(read_facts(file, str(file)))


def facts_file(step: Step) -> str | None:
    """Return the facts file of an edit step; None for other steps."""
    file = getattr(step, "facts", None) if step.verb == "edit" else None
    return file if isinstance(file, str) else None


def read_step(step: Step, project: Path) -> list[Fact]:
    """Return all facts of an edit step's file, with their current values; none for other steps."""
    file = facts_file(step)
    if not file:
        return []
    if isinstance(step, EditMethod) and step.in_order:
        return read_stream(project / file, file, step.stream_start(project)).current
    return read_facts(project / file, file)


def facts_digest(facts: Sequence[Fact]) -> str:
    """Return the digest of a set of facts, equal for a file and for the copy in a brick, which is sorted by ID."""
    return json_digest([fact.document() for fact in sorted(facts, key=lambda fact: fact.id)])


# -- facts that are edited one after another


def sequential(recipe: Recipe, options: FactsEval) -> Wanted:
    """Return the facts to score at an edit's checkpoints, with the cohorts of each checkpoint.

    Raises:
        WorkbenchError: If no edit step has these facts, or the step cannot use the first facts of a file.
    """
    facts = wanted(options, recipe.project, streams_of([recipe]))
    step, total = _step(recipe, facts)
    settings = options.sequential or SequentialEval()
    batch = getattr(getattr(getattr(step, "mode", None), "sequential", None), "batch", 1)
    size = settings.cohort or max(batch, FEWEST)
    states = {n: _lasting(facts, n) for n in _numbers(settings, facts, total)}
    return replace(facts, cohorts={n: _cohorts(state, size, settings.sample) for n, state in states.items()})


def checkpoints(recipe: Recipe, options: FactsEval) -> Iterator[tuple[int, Recipe]]:
    """Yield (n, the recipe with only the first n facts) for every checkpoint except the last, which is the recipe itself.

    Raises:
        WorkbenchError: If no edit step has these facts, or the step cannot use the first facts of a file.
    """
    facts = wanted(options, recipe.project, streams_of([recipe]))
    step, total = _step(recipe, facts)
    for n in _numbers(options.sequential or SequentialEval(), facts, total)[:-1]:
        steps: list[Mapping[str, object]] = [{**dump_step(s), **({"first": n} if s is step else {})} for s in recipe.steps]
        yield n, recipe.derive(f"{recipe.stem}-first-{n}", steps, recipe.fields.bricks)


def _step(recipe: Recipe, facts: Wanted) -> tuple[Step, int]:
    """Return the edit step with these facts, and the number of its facts; of a stream, the number of its rows."""
    for step in recipe.steps:
        taught = read_step(step, recipe.project)
        if [fact.document() for fact in taught] != [
            fact.document() for fact in facts.everything
        ]:  # order matters, because cohorts follow it
            continue
        if "first" not in type(step).model_fields:
            raise InvalidRecipeError(
                f"recipe {recipe.name}: sequential: edit {step.name} has no field `first`",
                "Score it without `sequential`, or use a method that has the field `first`.",
            )
        return step, int(getattr(step, "first", None) or len(facts.stream.events if facts.stream else facts.everything))
    raise InvalidRecipeError(
        f"recipe {recipe.name}: sequential: no edit step uses the facts of {facts.source}",
        "Give the facts file of an edit step.",
    )


def _numbers(settings: SequentialEval, facts: Wanted, total: int) -> list[int]:
    """Return the checkpoints that have facts to score; the last one is the complete edit."""
    return [*sorted({n for n in settings.checkpoints if n < total and _lasting(facts, n)}), total]


def _lasting(facts: Wanted, n: int) -> Sequence[Fact]:
    """Return the facts of the first n rows, without those that later rows update or remove: they have another target there."""
    if facts.stream is None:
        return facts.everything[:n]
    final = {fact.text: fact.target for fact in facts.everything}
    return [fact for fact in facts.stream.first(n).current if final.get(fact.text) == fact.target]


def _cohorts(facts: Sequence[Fact], size: int, sample: int) -> dict[str, tuple[str, ...]]:
    """Return IDs of the first facts, the last ones, and a sample of all: those with the smallest hash of their ID."""
    chosen = ranked(facts, sample)
    return {"first": _ids(facts[:size]), "last": _ids(facts[-size:]), "sample": _ids([f for f in facts if f.id in chosen])}


def _ids(facts: Sequence[Fact]) -> tuple[str, ...]:
    return tuple(fact.id for fact in facts)
