"""Put many bricks into groups of one skill, and write the recipes of a route between the groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from workbench.advice.pools import UNEQUAL, Pair, equal_weights, equalized
from workbench.ground.project import relative
from workbench.ground.results import JsonObject

MOST = 6
"""Largest number of groups for which one merge is recommended from the weights alone: of six disjoint skills one merge kept 81 %, and
a route all of them (docs/merging-advice.md, docs/routing-or-merge.md)."""


class Group(JsonObject):
    """Bricks that a route treats as one."""

    name: str
    """Name of the brick, or of the merge of several."""
    bricks: list[str]
    """The bricks."""
    step: dict[str, object] | None
    """The step that merges them; null for one brick."""


def grouped(norms: Mapping[str, float], pairs: Sequence[Pair]) -> list[Group]:
    """Put bricks of one skill together: every two bricks of a group are alike (`Pair.alike`). Pairs with the largest RV are joined first.

    A router cannot tell such bricks apart, because they act on the same prompts, and their average keeps what each of them can.

    Args:
        norms: Brick -> norm of its delta, above 0.
        pairs: All pairs of these bricks.
    """
    alike = [pair for pair in pairs if pair.alike]
    may_join = {frozenset((pair.one, pair.two)) for pair in alike}
    group_of = {name: [name] for name in norms}
    for pair in sorted(alike, key=lambda pair: -pair.rv):
        one, two = group_of[pair.one], group_of[pair.two]
        if one is not two and all(frozenset(names) in may_join for names in product(one, two)):
            one += two
            group_of |= dict.fromkeys(two, one)
    order = list(norms)
    found = [sorted(names, key=order.index) for names in {id(names): names for names in group_of.values()}.values()]
    return [_group(names, norms) for names in sorted(found, key=lambda names: order.index(names[0]))]


def _group(names: list[str], norms: Mapping[str, float]) -> Group:
    """Return a group with the step that merges it."""
    if len(names) == 1:
        return Group(name=names[0], bricks=names, step=None)
    own = {name: norms[name] for name in names}
    step: dict[str, object] = {"merge": "average"}
    if max(own.values()) > UNEQUAL * min(own.values()):
        step = equalized(step, equal_weights(own))
    name = f"{names[0]}-group"
    while name in norms:
        name += "-group"
    return Group(name=name, bricks=names, step=step)


@dataclass(frozen=True)
class Places:
    """Name base, bricks and files of prompts as a recipe of its project names them.

    Attributes:
        base: The base.
        bricks: Brick -> directory or hub id.
        texts: Brick -> file of its prompts.
    """

    base: str
    bricks: Mapping[str, str]
    texts: Mapping[str, str]

    @staticmethod
    def of(base: str, bricks: Mapping[str, str], texts: Mapping[str, str | Path], project: Path, start: Path) -> Places:
        """Return places for the recipes of a project. What lies outside of it becomes an absolute path.

        Args:
            base: Directory or hub id.
            bricks: Brick -> directory or hub id.
            texts: Brick -> file.
            project: The project of the recipes.
            start: Folder that relative paths start from now.
        """

        def place(name: str | Path) -> str:
            if not (start / name).exists():
                return str(name)
            inside = relative(start / name, project)
            return str(inside.resolve()) if inside.is_absolute() else inside.as_posix()

        return Places(place(base), {n: place(p) for n, p in bricks.items()}, {n: place(p) for n, p in texts.items()})


def route_recipes(groups: Sequence[Group], places: Places, beside: str) -> tuple[dict[str, object], dict[str, dict[str, object]]]:
    """Return the recipe of a route between groups, and file -> recipe of each group of several bricks, as plain data.

    Args:
        groups: Two groups or more.
        places: Base, bricks and files of prompts.
        beside: Path of the route's recipe in its project, without suffix; a group's recipe stands at `BESIDE-GROUP.yaml`.
    """
    merges, bricks, routed = dict[str, dict[str, object]](), dict[str, object](), dict[str, object]()
    for group in groups:
        files = list(dict.fromkeys(places.texts[name] for name in group.bricks))
        routed[group.name] = {"calibration": files[0] if len(files) == 1 else files}
        if group.step is None:
            bricks[group.name] = places.bricks[group.name]
            continue
        file = f"{beside}-{group.name}.yaml"
        bricks[group.name] = {"recipe": file}
        merges[file] = {
            "version": 1,
            "base": places.base,
            "bricks": {name: places.bricks[name] for name in group.bricks},
            "steps": [group.step],
            "output": {"form": "adapter"},
        }
    route = {"version": 1, "base": places.base, "bricks": bricks, "steps": [{"route": "ridge", "bricks": routed}]}
    return route, merges
