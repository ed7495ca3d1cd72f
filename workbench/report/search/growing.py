"""Sentences on a search in progress: how many candidates are finished, and the best one so far beside the best control."""

from __future__ import annotations

from workbench.report.numbers import count, listed, plural
from workbench.report.search.charts import best_so_far, on_front
from workbench.report.search.view import ObjectiveView, Progress, SearchView
from workbench.report.search.wording import items, level, tried


def headline(view: SearchView, progress: Progress) -> str:
    """Return the sentences on finished candidates and on the best one so far."""
    if progress.total is None:
        text = f"{plural(progress.done, 'candidate')} {'is' if progress.done == 1 else 'are'} finished."
    else:
        verb = "is" if progress.total == 1 else "are"
        text = f"{count(progress.done)} of {plural(progress.total, 'candidate')} {verb} finished."
    if len(view.objectives) == 1:
        return f"{text} {_best(view, view.objectives[0])}"
    front = on_front(view)
    many = f"{plural(len(front), 'candidate')} {'is' if len(front) == 1 else 'are'} on the Pareto front so far: {listed(front)}."
    return f"{text} {many}" if front else f"{text} {_NONE}"


def sentences(view: SearchView) -> list[str]:
    """Return sentences on the candidates and on what the end of the search adds."""
    last = (
        "Search items select the best candidate, so its score on them is too high on average: at the end it is tested on "
        f"{items(view.objectives[0].test_items if len(view.objectives) == 1 else view.test_items, 'item')} that the search does not use."
    )
    return [*([tried(view)] if view.candidates else []), last]


_NONE = "No candidate is scored on all search items yet."


def _best(view: SearchView, objective: ObjectiveView) -> str:
    """Return the best candidate's score beside the best control's, on search items."""
    control = next(c for c in view.controls if c.name == view.best_control)
    beside = f"the best control, {control.name}, scores {level(objective, control.scores[objective.index])}"
    steps = best_so_far(view.searched, objective)
    if not steps:
        return f"{_NONE} On them, {beside}."
    number, score = steps[-1]
    name = next(c.name for c in view.searched if c.number == number)
    return f"The best so far, {name}, scores {level(objective, score)} on search items, and {beside}."
