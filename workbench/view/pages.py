"""The pages of the viewer, each from what the project has now. The templates beside the report's say what they show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from workbench.api.loading import LoadedRecipe
from workbench.api.naming import Variation, load_named
from workbench.ground.errors import UsageError, WorkbenchError, duration, printable, shell
from workbench.ground.manifest import CARD, read_manifest
from workbench.ground.project import relative
from workbench.recipe.recipe import Recipe
from workbench.report import page_text
from workbench.report.numbers import Unit, unit_for
from workbench.report.page import Viewer, filled
from workbench.run.directory import RECORD, UNSEALED
from workbench.search.pages import page_text as search_text
from workbench.search.result import SearchResult, SearchState
from workbench.view.folder import Folder, PlanLine, log_lines

if TYPE_CHECKING:
    from workbench.compare.comparison import Comparison
    from workbench.scores.store import Scores

T = TypeVar("T")
LINKS = (
    ("Home", "/"),
    ("Recipes", "/recipes"),
    ("Runs", "/runs"),
    ("Scores", "/scores"),
    ("Searches", "/searches"),
    ("Live", "/live"),
    ("Chat", "/chat"),
)
_HELPERS = {"duration": duration, "shell": shell, "relative": relative}
Work = Literal["evaluation", "search"]
_LONGEST = 200_000
"""Largest number of characters of a file that a page shows."""
_POINTS = 6
"""Largest number of points of a sweep that a page plans."""


class MissingError(UsageError):
    """The project has nothing of this name."""


@dataclass
class Site:
    """The pages of a project.

    Attributes:
        folder: The project.
        links: Name and path of each part.
    """

    folder: Folder = field(default_factory=Folder)
    links: Sequence[tuple[str, str]] = LINKS

    def _page(self, template: str, place: str, title: str, **words: object) -> str:
        words = {"viewer": Viewer(self.links, place), "title": title, "folder": self.folder, **_HELPERS, **words}
        return filled(f"view_{template}.html.j2", words, ("report.js", "filter.js"), ("report.css",))

    def _part(self, template: str, **words: object) -> str:
        """Return a part of a page, which is sent alone."""
        return filled(f"view_{template}.html.j2", {**words, **_HELPERS}, (), ())

    def place(self, name: str) -> str:
        """Return the page behind a link, with what the project has of its kind."""
        titles = {"Home": self.folder.project.name or "Project", "Live": "In progress", "Chat": "Chat side by side"}
        words = {"progress": self.progress, "beside": _beside, "units": _units, "names": self._names}
        return self._page(name.lower(), name, titles.get(name, name), **words)

    def progress(self) -> str:
        """Return the part of a page that says what is in progress."""
        return self._part("progress", working=self.folder.in_progress())

    def _names(self) -> list[str]:
        """Return the names that the chat page offers: bases, recipes and finished runs."""
        recipes = {file: recipe for file, recipe in self.folder.recipes().items() if isinstance(recipe, Recipe)}
        bases = dict.fromkeys(recipe.fields.base_name for recipe in recipes.values())
        made = [str(relative(run.path)) for run in self.folder.runs().values() if run.seal in ("whole", "not sealed")]
        return [*(base for base in bases if (self.folder.project / base).is_dir()), *(Path(file).stem for file in recipes), *made]

    def growing(self, work: Work, document: Comparison | SearchState | None = None, version: int = 0) -> str:
        """Return the page of what this process does: the report of what is scored, or that there is none yet."""
        viewer = Viewer(self.links, "Live", version)
        if document is not None:
            return search_text(document, viewer) if isinstance(document, SearchState) else page_text(document, viewer)
        title = {"search": "No candidate is scored yet", "evaluation": "Nothing can be compared yet"}[work]
        return self._page("growing", "Live", title, viewer=viewer, work=work)

    def recipe(self, file: str, against: Sequence[str]) -> str:
        """Return the page of a recipe.

        Args:
            file: Its file's name.
            against: File of a recipe to compare it with, if one is named.
        """
        from workbench.bricks.hub import HEADERS
        from workbench.upkeep.recipediff import recipe_difference

        every = self.folder.recipes()
        recipe, path = _one(every, file, "recipe"), self.folder.project / "recipes" / file
        points, swept = ([], None) if isinstance(recipe, str) else Variation().recipes(str(path), lambda _: None)
        other, difference = next(filter(None, against), None), None
        if other is not None and _one(every, other, "recipe"):
            pair = load_named(str(path)), load_named(str(path.with_name(other)))
            difference = recipe_difference(*pair, HEADERS, (file, other))
        words = {
            "file": file,
            "recipe": recipe,
            "text": _text(path),
            "others": {name: other for name, other in every.items() if name != file and isinstance(other, Recipe)},
            "against": other,
            "difference": difference,
            "swept": [point.name for point in points] if swept else [],
        }
        return self._page("recipe", "Recipes", path.stem if isinstance(recipe, str) else recipe.name, **words)

    def plan(self, file: str) -> str:
        """Return the part of a recipe's page that says what a run would do, from headers of its inputs."""
        _one(self.folder.recipes(), file, "recipe")
        recipes, _ = Variation().recipes(str(self.folder.project / "recipes" / file), lambda _: None)
        plans = [LoadedRecipe(one).plan() for one in recipes[:_POINTS]]
        return self._part("plan", plans=plans, more=len(recipes) - len(plans))

    def run(self, name: str) -> str:
        """Return the page of a run."""
        run = _one(self.folder.runs(), name, "run")
        sealed = read_manifest(run.path)
        words = {
            "run": run,
            "files": sorted(sealed.files.items()) if sealed else [],
            "card": _text(run.result / CARD),
            "recipe": _text(run.path / "recipe.yaml"),
            "log": log_lines(run),
            "raw": _text(run.path / RECORD),
            "unsealed": UNSEALED,
        }
        return self._page("run", "Runs", run.name, **words)

    def report(self, folder: str, name: Sequence[str], baseline: Sequence[str], beside: Sequence[str]) -> str:
        """Return the report of stored scores.

        Args:
            folder: Folder of the plan.
            name: Names of configurations, to which their controls are added; none for all.
            baseline: Name of the baseline, if the suite does not decide.
            beside: Folders of plans of other suites that are compared with it, guarded tasks among them, and perhaps "" for none of them;
                none for all that fit.

        Raises:
            WorkbenchError: If fewer than two configurations are stored, or scores are damaged.
        """
        from workbench.compare.compare import compare

        plans = self.folder.plans()
        first = _one(plans, folder, "plan")
        others = [_one(plans, one, "plan") for one in beside if one] if beside else _beside(first, plans)
        parts = [plan.scores for plan in (first, *others)]
        chosen = [s for scores in parts for s in (_with_controls(scores, name) if name else scores)]
        every = dict.fromkeys(s.configuration.name for s in chosen)
        if len(every) < 2:
            raise WorkbenchError(
                f"suite {first.record.name}: a comparison needs two scored configurations", "workbench eval RECIPE"
            )
        lacking = [one for one in every if not all(any(one in s.names for s in scores) for scores in parts)]
        against = next(filter(None, baseline), None)
        if against is None and not any(first.record.suite.get("baseline", "base") in s.names for s in chosen):
            against = chosen[0].configuration.name
        recipes = dict.fromkeys(s.configuration.recipe for s in chosen if s.configuration.recipe)
        suites = [word for plan in (first, *others) for word in ("--suite", plan.record.name)]
        command = shell("workbench", "report", *recipes, *suites)
        comparison = compare(self.folder.store, chosen, baseline=against, project=self.folder.project, command=command)
        warnings = [f"Not scored on every suite: {', '.join(lacking)}."] if lacking else []
        return page_text(comparison.warned(warnings), Viewer(self.links, "Scores"))

    def search(self, name: str) -> str:
        """Return the page of a search: its report, or the candidates so far."""
        found = _one(self.folder.searches(), name, "search")
        if isinstance(found, SearchResult):
            return search_text(found, Viewer(self.links, "Searches"))
        part = "" if found else self.candidates(name)
        return self._page("search", "Searches", name, name=name, problem=found, part=part)

    def candidates(self, name: str) -> str:
        """Return the part of a page with the finished candidates of a search that has not ended."""
        from workbench.search.study import recorded

        ended = _one(self.folder.searches(), name, "search") is not None
        rows = recorded(self.folder.runs_folder / "search" / name)
        rows.sort(key=lambda row: (not row.complete, [-score for score in row.scores or ()]))
        axes = list(dict.fromkeys(axis for row in rows for axis in row.values))
        return self._part("candidates", rows=rows, axes=axes, ended=ended)

    def neurons(self, model: str, file: str) -> str:
        """Return a page that `analyze` wrote."""
        return _one(self.folder.neurons(), f"{model}/{file}", "page of neurons").read_text("utf-8", "replace")

    def error(self, error: WorkbenchError) -> str:
        """Return the page of an error."""
        return self._page("error", "", "This cannot be shown", error=error)


def _units(plan: PlanLine) -> dict[str, Unit]:
    """Return the unit in which reports write the scores of each task."""
    found = {}
    for task, about in plan.record.tasks.items():
        metrics = [s.tasks[task].metrics.get(about.primary) for s in plan.scores if task in s.tasks]
        levels = [metric.value for metric in metrics if metric]
        found[task] = unit_for(levels, about.primary in about.lower, about.ratios.get(about.primary))
    return found


def _one(found: Mapping[str, T], name: str, what: str) -> T:
    """Return what has a name among all that the project has; nothing else is read."""
    if name not in found:
        raise MissingError(f"the project has no {what} {name}", "The lists have all names.")
    return found[name]


def _text(path: Path) -> str | None:
    """Return a text file's content, cut where it is long; None if there is none."""
    try:
        text = path.read_text("utf-8", "replace")
    except OSError:
        return None
    return printable(text[:_LONGEST]) + (f"\n… ({len(text) - _LONGEST:,} more characters)" if len(text) > _LONGEST else "")


def _beside(plan: PlanLine, plans: Mapping[str, PlanLine]) -> list[PlanLine]:
    """Return the newest plan of each other suite that scored some of the same configurations in the same way."""
    names = {name for s in plan.scores for name in s.names}
    found: dict[str, PlanLine] = {}
    for other in plans.values():
        alike = [getattr(one.record, key) for one in (plan, other) for key in ("partial", "imported", "dtype")]
        shared = {name for s in other.scores for name in s.names} & names
        if other.record.name != plan.record.name and not other.outdated and alike[:3] == alike[3:] and len(shared) > 1:
            found.setdefault(other.record.name, other)
    return list(found.values())


def _with_controls(scores: Sequence[Scores], names: Sequence[str]) -> list[Scores]:
    """Return the named configurations with the base, their bricks alone, and the other controls on the same bricks."""
    parents = {s.configuration.parents for s in scores if s.configuration.name in names}
    bricks = {*names, *(brick for some in parents for brick in some)}
    controls = ("average", "memory", "finetune", "adapter")
    return [
        s
        for s in scores
        if s.configuration.name in (bricks if s.configuration.role == "brick" else names)
        or s.configuration.role == "base"
        or (s.configuration.role in controls and s.configuration.parents in parents)
    ]
