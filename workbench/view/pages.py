"""The pages of the viewer, each from what the project has now. The templates beside the report's say what they show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from workbench.api.naming import Variation, load_named
from workbench.errors import UsageError, WorkbenchError, duration, printable, shell
from workbench.manifest import CARD, read_manifest
from workbench.project import relative
from workbench.report.numbers import POINTS
from workbench.report.page import Viewer, filled
from workbench.report.page import html as report_page
from workbench.report.search import page_text as search_page
from workbench.run.directory import UNSEALED, RunDirectory
from workbench.scores.files import SHARES
from workbench.scores.suite import metric_of
from workbench.search.result import SearchResult
from workbench.view.folder import Folder, PlanLine, log_lines

if TYPE_CHECKING:
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
        helpers = {"duration": duration, "shell": shell, "relative": relative, "project": self.folder.project}
        context = {"viewer": Viewer(self.links, place), "title": title, **helpers, **words}
        return filled(f"view_{template}.html.j2", context, ("report.js",), ("report.css",))

    def home(self) -> str:
        """Return the first page: what there is, what is in progress, and what came last."""
        have = {"runs": self.folder.runs(), "recipes": self.folder.recipes(), "plans": self.folder.plans()}
        searches = len(self.folder.searches())
        return self._page(
            "home", "Home", self.folder.project.name or "Project", **have, searches=searches, working=self.progress()
        )

    def progress(self) -> str:
        """Return the part of a page that says what is in progress."""
        return filled("view_progress.html.j2", {"working": self.folder.in_progress(), "duration": duration}, (), ())

    def live(self) -> str:
        """Return the page of what is in progress, which is sent anew when it changes."""
        return self._page("live", "Live", "In progress", working=self.progress())

    def recipes(self) -> str:
        """Return the list of recipes."""
        return self._page("recipes", "Recipes", "Recipes", recipes=self.folder.recipes(), runs=self.folder.runs())

    def recipe(self, file: str, against: str | None) -> str:
        """Return the page of a recipe.

        Args:
            file: Its file's name.
            against: File of a recipe to compare it with; None for none.
        """
        from workbench.bricks.hub import HEADERS
        from workbench.upkeep.recipediff import recipe_difference

        every = {line.file: line for line in self.folder.recipes()}
        line, path = _one(every, file, "recipe"), self.folder.project / "recipes" / file
        points, swept = ([], None) if line.problem else Variation().recipes(str(path), lambda _: None)
        difference = None
        if against is not None and _one(every, against, "recipe"):
            pair = load_named(str(path)), load_named(str(path.with_name(against)))
            difference = recipe_difference(*pair, HEADERS, (file, against))
        words = {
            "recipe": line,
            "text": _text(path),
            "others": [other for other in every.values() if other != line and not other.problem],
            "against": against,
            "difference": difference,
            "runs": [run for run in self.folder.runs() if run.recipe == line.name],
            "swept": [point.name for point in points] if swept else [],
        }
        return self._page("recipe", "Recipes", line.name, **words)

    def plan(self, file: str) -> str:
        """Return the part of a recipe's page that says what a run would do, from headers of its inputs."""
        from workbench.bricks.hub import HEADERS
        from workbench.resolve.resolve import resolve
        from workbench.run.plan import plan

        _one({line.file: line for line in self.folder.recipes()}, file, "recipe")
        recipes, _ = Variation().recipes(str(self.folder.project / "recipes" / file), lambda _: None)
        plans = [plan(resolve(one, HEADERS), self.folder.runs_folder) for one in recipes[:_POINTS]]
        words = {"plans": plans, "more": len(recipes) - len(plans), "duration": duration}
        return filled("view_plan.html.j2", words, (), ())

    def runs(self) -> str:
        """Return the list of runs."""
        return self._page("runs", "Runs", "Runs", runs=self.folder.runs())

    def run(self, name: str) -> str:
        """Return the page of a run."""
        line = _one({line.name: line for line in self.folder.runs()}, name, "run")
        run = RunDirectory(self.folder.runs_folder / line.name)
        sealed = read_manifest(run.path)
        words = {
            "run": line,
            "record": run.record,
            "files": sorted(sealed.files.items()) if sealed else [],
            "card": _text(run.result / CARD),
            "recipe": _text(run.path / "recipe.yaml"),
            "log": log_lines(run),
            "raw": _text(run.path / "run.json"),
            "path": relative(run.path),
            "result": relative(run.result),
            "unsealed": UNSEALED,
        }
        return self._page("run", "Runs", line.name, **words)

    def scores(self) -> str:
        """Return the stored scores, by suite and plan."""
        plans = self.folder.plans()
        words = {"beside": {plan.folder: _beside(plan, plans) for plan in plans}, "score": _score}
        return self._page("scores", "Scores", "Scores", plans=plans, **words)

    def report(self, folder: str, names: Sequence[str], baseline: str | None, beside: Sequence[str] | None) -> str:
        """Return the report of stored scores.

        Args:
            folder: Folder of the plan.
            names: Names of configurations, to which their controls are added; none for all.
            baseline: Name of the baseline; None if the suite decides.
            beside: Folders of plans of other suites that are compared with it, guarded tasks among them; None for all that fit.

        Raises:
            WorkbenchError: If fewer than two configurations are stored, or scores are damaged.
        """
        from workbench.compare.compare import compare

        plans = {plan.folder: plan for plan in self.folder.plans()}
        first = _one(plans, folder, "plan")
        others = _beside(first, list(plans.values())) if beside is None else [_one(plans, one, "plan") for one in beside]
        parts = [plan.scores for plan in (first, *others)]
        chosen = [s for scores in parts for s in (_with_controls(scores, names) if names else scores)]
        every = dict.fromkeys(s.configuration.name for s in chosen)
        if len(every) < 2:
            raise WorkbenchError(
                f"suite {first.record.name}: a comparison needs two scored configurations", "workbench eval RECIPE"
            )
        lacking = [name for name in every if not all(any(name in s.names for s in scores) for scores in parts)]
        if baseline is None and not any(first.record.suite.get("baseline", "base") in s.names for s in chosen):
            baseline = chosen[0].configuration.name
        recipes = dict.fromkeys(s.configuration.recipe for s in chosen if s.configuration.recipe)
        suites = [word for plan in (first, *others) for word in ("--suite", plan.record.name)]
        command = shell("workbench", "report", *recipes, *suites)
        comparison = compare(self.folder.store, chosen, baseline=baseline, project=self.folder.project, command=command)
        warnings = [f"Not scored on every suite: {', '.join(lacking)}."] if lacking else []
        return report_page(comparison.warned(warnings), Viewer(self.links, "Scores"))

    def searches(self) -> str:
        """Return the list of searches."""
        return self._page("searches", "Searches", "Searches", searches=self.folder.searches())

    def search(self, name: str) -> str:
        """Return the page of a search: its report, or the candidates so far."""
        found = _one(self.folder.searches(), name, "search")
        if isinstance(found, SearchResult):
            return search_page(found, Viewer(self.links, "Searches"))
        part = "" if found else self.candidates(name)
        return self._page("search", "Searches", name, name=name, problem=found, part=part)

    def candidates(self, name: str) -> str:
        """Return the part of a page with the finished candidates of a search that has not ended."""
        from workbench.search.study import recorded

        ended = _one(self.folder.searches(), name, "search") is not None
        rows = recorded(self.folder.runs_folder / "search" / name)
        rows.sort(key=lambda row: (not row.complete, [-score for score in row.scores or ()]))
        words = {"rows": rows, "axes": list(dict.fromkeys(axis for row in rows for axis in row.values)), "ended": ended}
        return filled("view_candidates.html.j2", words, (), ())

    def chat(self) -> str:
        """Return the page that asks up to three configurations at once."""
        recipes = [line for line in self.folder.recipes() if not line.problem]
        bases = dict.fromkeys(line.base for line in recipes if (self.folder.project / line.base).is_dir())
        runs = [relative(self.folder.runs_folder / run.name) for run in self.folder.runs() if run.seal in ("whole", "not sealed")]
        return self._page("chat", "Chat", "Chat side by side", names=[*bases, *(Path(r.file).stem for r in recipes), *runs])

    def error(self, error: WorkbenchError) -> str:
        """Return the page of an error."""
        return self._page("error", "", "This cannot be shown", error=error)


def _score(metric: str, value: float) -> str:
    """Return a score as reports write it: in percent where it is a share."""
    return POINTS.score(value) if metric_of(metric) in SHARES else f"{value:.4g}"


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


def _beside(plan: PlanLine, plans: Sequence[PlanLine]) -> list[PlanLine]:
    """Return the newest plan of each other suite that scored some of the same configurations in the same way."""
    names = {name for s in plan.scores for name in s.names}
    found: dict[str, PlanLine] = {}
    for other in plans:
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
