"""Configurations to score: a recipe's result and its controls.

Controls are the base, single bricks, their average, edits before a merge, and other ways to teach an edit's facts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from workbench.bricks.hub import FETCH, Hub
from workbench.evaluate.facts.wanted import Wanted, checkpoints, edited_for, facts_digest, read_step
from workbench.ground.errors import LeftOut, UsageError, WorkbenchError
from workbench.models.identity import identity, tokenizer_digest
from workbench.recipe.fields import FactsEval
from workbench.recipe.recipe import Recipe, described, dump_step
from workbench.resolve.resolve import resolve
from workbench.resolve.resolved import Resolved
from workbench.run.forms import form_of
from workbench.run.kind import written_specs
from workbench.run.materialize import known_digest
from workbench.run.opened import NamedModel
from workbench.scores.plan import ScorePlan
from workbench.scores.store import Configuration
from workbench.steps import EditMethod

CONTROL_FIELDS: Mapping[str, Mapping[str, float]] = {"adapter": {"preserve_generated": 0, "replay_weight": 0.0}}
"""Way to teach facts -> fields of its step as a control, besides the defaults: the adapter learns facts and paraphrases only."""


@dataclass(frozen=True)
class LineupEntry:
    """A configuration to score.

    Attributes:
        name: Name in tables.
        role: base, brick, average, memory, finetune, adapter or configuration.
        resolved: The recipe that makes it. Controls are recipes too; a model is a base without steps.
        unscored: Names of its bricks that here belong to other scored weights.
    """

    name: str
    role: str
    resolved: Resolved
    unscored: frozenset[str] = frozenset()

    @property
    def parents(self) -> tuple[str, ...]:
        """Names of the bricks that it is made from. A recipe as a brick counts by its name, and so do that recipe's bricks."""
        return tuple(name for name in dict.fromkeys(_ancestors(self.resolved)) if name not in self.unscored)

    @cached_property
    def tokenizer(self) -> str:
        """Digest of its own tokenizer, with which its texts are read whatever else is scored beside it."""
        return tokenizer_digest(self.resolved.tokenizer_path)

    def digest(self) -> str | None:
        """Return the configuration's digest if an earlier run or evaluation has computed it."""
        return known_digest(self.resolved.cache, self.resolved.key)

    def configuration(self, digest: str) -> Configuration:
        """Return the configuration as the score store describes it.

        Args:
            digest: Digest of its weights, as `digest` returns it.
        """
        path = self.resolved.recipe.path
        recipe_file = path.resolve() if path else None
        project = self.resolved.recipe.project.resolve()
        recipe_path = str(recipe_file.relative_to(project)) if recipe_file and recipe_file.is_relative_to(project) else None
        specs = written_specs(self.resolved).values()
        bricks = {name: self.resolved.bricks[name].stored_bytes for name in self.resolved.parents}
        form = form_of(self.resolved) if self.role == "configuration" else None
        return Configuration(
            self._identity(digest),
            self.name,
            self.role,
            self.parents,
            recipe_path,
            self.resolved.base_digest,
            sum(s.numel for s in specs),
            sum(s.nbytes for s in specs),
            bricks,
            edited_for(self.resolved),
            _facts_used(self.resolved.recipe),
            digest,
            {name: self.resolved.on_disk[name].axes for name in self.resolved.parents if name in self.resolved.on_disk},
            form.name if form else None,
            form.size(self.resolved) if form else None,
            _members(self.resolved),
            self.resolved.licences,
            self.tokenizer,
            described(self.resolved.recipe),
            *self._made(),
        )

    def _made(self) -> tuple[tuple[str, ...], str]:
        """Return the words after `workbench run` that make it, and the name of the result for other commands; see `Configuration`."""
        recipe = self.resolved.recipe
        if self.role == "configuration" and recipe.path is None and not recipe.steps:
            return (), "".join(recipe.typed)  # a model or run that is there
        return recipe.typed, f"{recipe.name}-{self.resolved.run_key[:10]}" if self.resolved.known else ""

    def plan(self, plan: ScorePlan) -> ScorePlan:
        """Return a plan for this configuration's own tokenizer."""
        return plan.tokenized(self.resolved.tokenizer_path, self.tokenizer)

    def key(self, plan: ScorePlan, digest: str | None = None) -> str | None:
        """Return the key of its scores under a plan (`Configuration.key`); None if the digest of its weights is not known.

        Args:
            plan: The plan.
            digest: Digest of its weights. Default: the known one.
        """
        digest = digest or self.digest()
        return digest and identity(self._identity(digest) if plan.generates else digest, {}, self.tokenizer)

    def _identity(self, digest: str) -> str:
        return identity(digest, self.resolved.generation, self.tokenizer)


def _facts_used(recipe: Recipe) -> int | None:
    """Return the number of facts of the edit step that does not use all of them."""
    return next((n for step in recipe.steps if step.verb == "edit" and (n := getattr(step, "first", None))), None)


def lineup(
    recipes: Iterable[Recipe],
    controls: bool = True,
    hub: Hub = FETCH,
    models: Iterable[NamedModel] = (),
    sequences: bool = True,
    left_out: list[LeftOut] | None = None,
    facts: Iterable[Wanted] = (),
) -> list[LineupEntry]:
    """Return the configurations of some recipes with their controls first, each weight state once; then other models.

    Args:
        recipes: The recipes.
        controls: Include base, single bricks, edits and averages.
        hub: Access to the hub.
        models: Models that no recipe makes.
        sequences: Include the checkpoints that the recipes' `eval` asks for, each before its recipe, as NAME@FACTS.
        left_out: List that receives the controls which are skipped because another configuration has their name; None: such
            controls are errors.
        facts: Facts that are scored. If a recipe is edited for some, other ways to teach the same facts become controls (`controls` of
            the facts' options).

    Raises:
        WorkbenchError: If bases or the vocabularies that recipes write differ, or different recipes, bricks or models have the same name.
    """
    requested = [LineupEntry(recipe.name, "configuration", resolve(recipe, hub)) for recipe in recipes]
    keys = {entry.resolved.key for entry in requested}
    others = [LineupEntry(model.name, "configuration", model.resolved) for model in models]
    if not requested and not others:
        raise UsageError("no recipe given", "workbench eval recipes/NAME.yaml")
    _check_bases(requested)
    control_entries = _controls(requested) if controls and requested else []
    if controls:
        taken = {entry.name for entry in (*requested, *others, *control_entries)}
        control_entries += _taught_otherwise(requested, facts, taken)
    # A recipe that is also a brick of another one stays at its own place in the list.
    checkpoints_of = {e.name: list(_checkpoints(e.resolved.recipe, hub)) if sequences else [] for e in requested}
    entries = [
        *(e for e in control_entries if e.resolved.recipe.path is None or e.resolved.key not in keys),
        *(e for entry in requested for e in (*checkpoints_of[entry.name], entry)),
        *others,
    ]
    return _one_of_each_name(entries, left_out)


RENAME = "Two configurations have this name. Rename one of them: `name:` in the recipe, the brick's name under `bricks`, or the model's folder."


def _one_of_each_name(entries: Iterable[LineupEntry], left_out: list[LeftOut] | None) -> list[LineupEntry]:
    """Keep one configuration per name: those that the call names take precedence over bricks and averages."""
    by_name: dict[str, LineupEntry] = {}
    skipped: dict[str, LineupEntry] = {}
    for entry in entries:
        other = by_name.get(entry.name)
        if other is None or other.resolved.key == entry.resolved.key:
            by_name.setdefault(entry.name, entry)
            continue
        control = next((e for e in (entry, other) if e.role not in ("base", "configuration")), None)
        if control is None or left_out is None:
            files = " and ".join(str(e.resolved.recipe.path) for e in (other, entry) if e.resolved.recipe.path)
            raise WorkbenchError(f"two different configurations are called '{entry.name}'{files and f' ({files})'}", RENAME)
        skipped[entry.name] = control
        if control is other:
            del by_name[entry.name]
            by_name[entry.name] = entry
    unique = []
    for entry in by_name.values():
        unscored = frozenset(_scored_under_another_name(entry.resolved, by_name))
        unique.append(replace(entry, unscored=unscored))
        if left_out is None or entry.role != "configuration":
            continue
        for name in sorted(unscored & by_name.keys()):
            what = "recipe" if by_name[name].role == "configuration" else "brick"
            reason = f"brick '{name}' of {entry.name} is not scored alone: another {what} has its name"
            left_out.append(LeftOut(name, reason, RENAME))
            skipped.pop(name, None)
    for name, entry in skipped.items():
        what = "average of the bricks" if entry.role == "average" else "brick"
        assert left_out is not None  # otherwise an error was raised above
        left_out.append(LeftOut(name, f"the {what} '{name}' is not scored: another configuration has its name", RENAME))
    return unique


def _scored_under_another_name(resolved: Resolved, by_name: Mapping[str, LineupEntry]) -> Iterator[str]:
    """Yield the names of a recipe's bricks under which other weights are scored."""
    for name in resolved.parents:
        if name in resolved.recipe.teachers:
            continue
        if name in resolved.nested:
            nested = resolved.nested[name]
            other = by_name.get(nested.recipe.name)
            if other is not None and other.resolved.key != nested.key:
                yield nested.recipe.name
            yield from _scored_under_another_name(nested, by_name)
        elif (other := by_name.get(name)) is not None and (
            other.role != "brick" or other.resolved.digests.get(name) != resolved.digests[name]
        ):
            yield name


def _checkpoints(recipe: Recipe, hub: Hub) -> Iterator[LineupEntry]:
    for item in recipe.fields.eval:
        if isinstance(item, FactsEval) and item.sequential is not None:
            for n, part in checkpoints(recipe, item):
                yield LineupEntry(f"{recipe.name}@{n}", "configuration", resolve(part, hub))


def _check_bases(entries: Sequence[LineupEntry]) -> None:
    """Check that recipes that are scored together have the same base and write the same vocabulary."""
    if not entries:
        return
    first = entries[0].resolved
    for entry in entries[1:]:
        if entry.resolved.base_digest != first.base_digest:
            raise WorkbenchError(
                f"{entries[0].name} and {entry.name} have different bases "
                f"({first.recipe.fields.base_name}, {entry.resolved.recipe.fields.base_name})",
                "Score them in two calls.",
            )
        if _vocabulary(entry.resolved) != _vocabulary(first):
            raise WorkbenchError(
                f"{entries[0].name} and {entry.name} write different tokenizers",
                "The base and other controls are scored with one tokenizer: score the recipes in two calls.",
            )


def _controls(entries: Sequence[LineupEntry]) -> list[LineupEntry]:
    """Return base, single bricks, edits and averages as recipes on the same base, in the same output dtype."""
    base = [LineupEntry("base", "base", resolve(entries[0].resolved.recipe.derive("base", [])))]
    bricks: dict[str, LineupEntry] = {}
    averages: dict[tuple[tuple[str, str], ...], LineupEntry] = {}
    for entry in entries:
        recipe, parents = entry.resolved.recipe, tuple(entry.resolved.parents)
        for name in parents:
            if name in recipe.teachers:
                continue  # a teacher may have other tokens, so that its scores cannot be compared
            if name in entry.resolved.nested:
                nested = entry.resolved.nested[name]
                bricks.setdefault(nested.recipe.name, LineupEntry(nested.recipe.name, "brick", nested))
            else:
                alone = recipe.derive(name, [_alone(name, entry.resolved)], [name])
                bricks.setdefault(name, LineupEntry(name, "brick", resolve(alone)))
        if edits := _leading_edits(recipe):
            name = f"{recipe.stem}-edited"
            edited = resolve(recipe.derive(name, edits))
            if recipe.point and name in bricks:  # another point of the sweep has edits too
                name = f"{recipe.name}-edited"
            if not (recipe.point and any(entry.resolved.key == edited.key for entry in bricks.values())):
                bricks.setdefault(name, LineupEntry(name, "brick", edited))
        deltas = [name for name in parents if name not in recipe.whole_models and name not in recipe.teachers]
        contents = tuple((name, entry.resolved.digests[name]) for name in deltas)
        if len(deltas) > 1 and contents not in averages:
            name = "average" if not averages else "average-" + "-".join(deltas)
            mean = recipe.derive(name, [{"merge": "average", "bricks": deltas}], deltas)
            averages[contents] = LineupEntry(name, "average", resolve(mean))
    return [*base, *bricks.values(), *averages.values()]


def _taught_otherwise(entries: Sequence[LineupEntry], facts: Iterable[Wanted], taken: set[str]) -> Iterator[LineupEntry]:
    """Yield the controls that teach the facts of edits in another way, such as in the prompt: one per way and facts file.

    A recipe with one step that teaches the same facts in that way is that control itself. Streams with updates or removals have no such
    controls, because other methods do not read files in order.
    """
    edited_by = {entry.name: (entry, edited_for(entry.resolved)) for entry in entries}
    made: set[tuple[str, str]] = set()
    for wanted in facts:
        edited = [entry.resolved.recipe for entry, digests in edited_by.values() if wanted.digest in digests]
        for way in wanted.options.controls if edited and wanted.in_any_order else ():
            present = any(
                step.verb == "edit" and step.name == way and facts_digest(read_step(step, recipe.project)) == wanted.digest
                for recipe in edited
                for step in recipe.steps
            )
            if present or (way, wanted.digest) in made or not (edited[0].project / wanted.source).is_file():
                continue
            made.add((way, wanted.digest))
            names = (way, f"{wanted.stem}-{way}", *(f"{wanted.stem}-{way}-{n}" for n in range(2, len(taken) + 3)))
            name = next(name for name in names if name not in taken)
            taken.add(name)
            step = {"edit": way, "facts": wanted.source, "min_efficacy": 0, **CONTROL_FIELDS.get(way, {})}
            yield LineupEntry(name, way, resolve(edited[0].derive(name, [step])))


def _alone(name: str, resolved: Resolved) -> dict[str, object]:
    """Return the step that makes the base into one brick's model."""
    if name not in resolved.recipe.whole_models or resolved.bricks[name].kind == "adapter":
        return {"merge": "task_arithmetic", "bricks": {name: 1.0}}
    return {"grow": "stack", "slices": [{"brick": name}], "embeddings": name, "norm": name, "head": name, "check": "off"}


def _leading_edits(recipe: Recipe) -> list[dict[str, object]]:
    """Return the edit steps before all other steps; scored alone, they show how much of them the other steps keep."""
    count = next((i for i, step in enumerate(recipe.steps) if not isinstance(step, EditMethod)), 0)
    return [dump_step(step) for step in recipe.steps[:count]]


def _vocabulary(resolved: Resolved) -> str | None:
    return resolved.vocabulary.digest if resolved.vocabulary else None


def _members(resolved: Resolved) -> dict[str, tuple[str, ...]]:
    """Return routed brick -> the names that it counts as, for routed bricks that are recipes."""
    router = resolved.recipe.router
    names = resolved.recipe.used_bricks(router) if router else ()
    nested = {name: resolved.nested[name] for name in names if name in resolved.nested}
    return {name: (inner.recipe.name, *dict.fromkeys(_ancestors(inner))) for name, inner in nested.items()}


def _ancestors(resolved: Resolved) -> Iterator[str]:
    for name in resolved.parents:
        if name in resolved.recipe.teachers:
            continue
        nested = resolved.nested.get(name)
        if nested is None:
            yield name
        else:
            yield nested.recipe.name
            yield from _ancestors(nested)
