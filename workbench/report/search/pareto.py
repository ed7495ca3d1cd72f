"""Two objectives against each other: candidates, the front that they make, and the controls."""

from __future__ import annotations

from workbench.report.numbers import listed
from workbench.report.scatter import Point, Scatter, ScatterAxis, drawing, front
from workbench.report.search.view import Candidate, ObjectiveView, SearchView
from workbench.report.search.wording import tip


def pareto(view: SearchView) -> Scatter | None:
    """Candidates that have seen all items, and controls. None unless there are two objectives and something to draw."""
    if len(view.objectives) != 2:
        return None
    x, y = view.objectives
    found = [c for c in view.searched if c.complete and c.scores]
    best = front([_up(c, view) for c in found])
    names = tuple(c.name for c, on in zip(found, best, strict=True) if on)
    points = [
        Point(c.name, False, c.scores[0], c.scores[1], tip(c, view), None, None, on, c.name in view.front or on)
        for c, on in zip(found, best, strict=True) if c.scores
    ]  # fmt: skip
    points += [
        Point(c.name, True, c.scores[0], c.scores[1], f"{c.name}\n{x.measure}: {x.unit.score(c.scores[0])}\n{y.measure}: {y.unit.score(c.scores[1])}", None, None)
        for c in view.controls if len(c.scores) == 2
    ]  # fmt: skip
    if not names or len(points) < 2:
        return None
    caption = (
        f"Scores on the search items of candidates that have seen all of them, and of the controls. The front joins the candidates that no "
        f"other candidate beats on both: {listed(names)}."
    )
    title = "Pareto front"
    return Scatter(title, caption, names, drawing(points, _axis(x), _axis(y), title))


def _up(c: Candidate, view: SearchView) -> tuple[float, float]:
    """Scores with more as better."""
    scores = c.scores or (0.0, 0.0)
    a, b = (-v if o.lower else v for v, o in zip(scores, view.objectives, strict=True))
    return a, b


def _axis(o: ObjectiveView) -> ScatterAxis:
    return ScatterAxis(o.measure, o.unit.scale, o.lower)
