"""Scatter plot of two objectives: candidates, their Pareto front and the controls."""

from __future__ import annotations

from workbench.report.numbers import listed
from workbench.report.scatter import Point, Scatter, ScatterAxis, drawing, front
from workbench.report.search.view import Candidate, ObjectiveView, SearchView
from workbench.report.search.wording import tip


def pareto(view: SearchView) -> Scatter | None:
    """Return the plot of complete candidates and controls, or None if there are not two objectives or nothing to draw."""
    if len(view.objectives) != 2:
        return None
    x, y = view.objectives
    names = on_front(view)
    points = [
        Point(c.name, False, c.scores[0], c.scores[1], tip(c, view), None, None, c.name in names, c.name in (*view.front, *names))
        for c in view.searched
        if c.complete and c.scores
    ]
    for control in view.controls:
        if len(control.scores) == 2:
            across, up = control.scores
            text = f"{control.name}\n{x.measure}: {x.unit.score(across)}\n{y.measure}: {y.unit.score(up)}"
            points.append(Point(control.name, True, across, up, text, None, None))
    if not names or len(points) < 2:
        return None
    caption = (
        "Scores on search items of the controls and of the candidates that were scored on all of them. The front joins the candidates that "
        f"no other candidate beats on both objectives: {listed(names)}."
    )
    title = "Pareto front"
    return Scatter(title, caption, names, drawing(points, _axis(x), _axis(y), title))


def on_front(view: SearchView) -> tuple[str, ...]:
    """Return the names of the candidates that no other candidate beats on both objectives; none if there are not two objectives."""
    if len(view.objectives) != 2:
        return ()
    complete = [c for c in view.searched if c.complete and c.scores]
    return tuple(c.name for c, on in zip(complete, front([_up(c, view) for c in complete]), strict=True) if on)


def _up(c: Candidate, view: SearchView) -> tuple[float, float]:
    """Return the scores with their sign changed where lower is better."""
    scores = c.scores or (0.0, 0.0)
    a, b = (-v if o.lower else v for v, o in zip(scores, view.objectives, strict=True))
    return a, b


def _axis(o: ObjectiveView) -> ScatterAxis:
    return ScatterAxis(o.measure, o.unit.scale, o.lower)
