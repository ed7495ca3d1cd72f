"""The advice on bricks as a result: what `brick advise` prints as JSON, and the recipe that it writes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from workbench.advice.evidence import ScoredBefore, Trial
from workbench.advice.groups import Group, Places, route_recipes
from workbench.advice.pools import Pair, Regime
from workbench.ground import yamldoc
from workbench.ground.errors import shell
from workbench.ground.project import find_project
from workbench.ground.results import JsonObject, Number, Result


class AdvisedBrick(JsonObject):
    """A brick."""

    name: str
    """Name of its directory."""
    path: str
    """Its directory."""
    kind: Literal["adapter", "checkpoint"]
    """The kind of brick."""
    relative_norm: Number
    """Norm of its delta over that of the base's same tensors."""
    weight: Number
    """1 / Σ RV, the weight that `weights: auto` gives it."""
    texts: str | None
    """File of its own texts; null if none was found."""


class LeftOut(JsonObject):
    """A brick that the recommended step leaves out."""

    name: str
    """The brick."""
    because: str
    """Why, as the rest of a sentence that starts with the name."""


class Advice(Result):
    """Advice on merging bricks."""

    base: str
    """The base."""
    bricks: list[AdvisedBrick]
    """The bricks, as named."""
    pairs: list[Pair]
    """All pairs of bricks."""
    regime: Regime
    """The relation of the bricks to each other."""
    says: str
    """The regime as a sentence."""
    step: dict[str, object] | None
    """The recommended step: a merge of the bricks, or a route between the groups; null if nothing is recommended."""
    groups: list[Group]
    """The bricks that are used, in groups of one skill. A route chooses among the groups, and merges the bricks of each."""
    reasons: list[str]
    """Reasons for the step, or what to do instead of a merge."""
    unknown: list[str]
    """Sentences on what the advice does not cover, and how to find out."""
    left_out: list[LeftOut]
    """Bricks that the step leaves out: copies, bricks that point against another one, and bricks that change nothing."""
    warnings: list[str]
    """Properties of these bricks that can spoil any merge of them."""
    sweep: list[Number]
    """Values of lambda that the written recipe compares; empty if it has one configuration."""
    trial: Trial | None
    """The models that were run; null without --measure."""
    scored_before: list[ScoredBefore]
    """The best stored configurations of the same bricks."""
    recipe: str | None
    """The file that was written with --write."""

    def recipes(self, path: Path) -> dict[Path, str]:
        """Return file -> YAML: the recipes of the groups that are routed between, and last the recommended recipe with its reasons."""
        assert self.step is not None
        command = shell("workbench", "eval" if self.sweep else "run", path)
        left_out = [f"left out: {brick.name} {brick.because}" for brick in self.left_out]
        lines = (command, self.says, *left_out, *self.warnings, *self.reasons)
        project = find_project(path)
        texts = {brick.name: brick.texts for brick in self.bricks if brick.texts}
        places = Places.of(self.base, {brick.name: brick.path for brick in self.bricks}, texts, project, Path.cwd())
        if "route" in self.step:
            beside = path.resolve().relative_to(project).with_suffix("").as_posix()
            recipe, merges = route_recipes(self.groups, places, beside)
        else:
            recipe, merges = self._merge(self.step, places), {}
        found = {project / file: f"# A group of {path.name}\n{yamldoc.dump(merge, width=120)}" for file, merge in merges.items()}
        return {**found, path: "".join(f"# {line}\n" for line in lines) + yamldoc.dump(recipe, width=120)}

    def _merge(self, step: Mapping[str, object], places: Places) -> dict[str, object]:
        """Return the recipe of one merge as plain data."""
        used = [name for group in self.groups for name in group.bricks]
        bricks = {name: place for name, place in places.bricks.items() if name in used}
        step = {key: value for key, value in step.items() if not (key == "bricks" and isinstance(value, list))}
        sweep = {"sweep": {"mix.lambda": list(self.sweep)}} if self.sweep else {}
        output = {"output": {"form": "adapter"}} if all(brick.kind == "adapter" for brick in self.bricks) else {}
        return {"version": 1, "base": places.base, "bricks": bricks, "steps": [{"id": "mix", **step}], **sweep, **output}
