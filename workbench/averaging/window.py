"""The average of the last checkpoints of a training run, as a recipe of its own.

A run with a constant learning rate whose checkpoints θ_0 … θ_{n-1} are averaged with the weights c_j ends where a run would have ended whose steps between
θ_{j-1} and θ_j had been multiplied by w_j = c_j + … + c_{n-1}, if its gradients had been the same. So the weights that stand for a decay of the
learning rate are differences of its shape: c_j = w_j − w_{j+1}, with w_j = shape(j / n) (WSM, arXiv 2507.17634, theorem 3.1; the same points as
Megatron-LM's weighted_merge.py). A linear decay is the plain average (LAWA, arXiv 2209.14981).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path

from workbench.averaging.checkpoints import Saved, checkpoints_of, gaps, revisions_of
from workbench.bricks.hub import Hub
from workbench.bricks.locate import locate
from workbench.ground.errors import WorkbenchError
from workbench.ground.foreign_names import ADAPTER, as_name, retyped
from workbench.ground.numbers import size
from workbench.recipe.recipe import Recipe, from_data
from workbench.steps.fields import BrickRef, Window

_SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda x: 1 - x,
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
    "sqrt": lambda x: math.sqrt(1 - x),
    "1-sqrt": lambda x: 1 - math.sqrt(x),
}


def weights_of(count: int, window: Window) -> list[float]:
    """Return the weights of checkpoints in the order of their steps; they sum to 1.

    Args:
        count: Number of checkpoints, at least 1.
        window: `ema: b` is an exponential moving average that starts at the first checkpoint: b^(n-1), then (1 - b) b^(n-1-j). `decay` is the shape of the
            learning rate's decay that the average stands for.
    """
    if window.ema is not None:
        rest = [(1 - window.ema) * window.ema ** (count - 1 - j) for j in range(1, count)]
        return [window.ema ** (count - 1), *rest]
    shape = _SHAPES[window.decay]
    factors = [*(shape(j / count) for j in range(count)), 0.0]
    return [factors[j] - factors[j + 1] for j in range(count)]


def recipe_of(name: str, ref: BrickRef, outer: Recipe, hub: Hub) -> tuple[Recipe, list[str]]:
    """Return the recipe that averages a window of a training run, and what to say of the window.

    Args:
        name: The brick's name in the outer recipe.
        ref: The brick: the run's folder or hub repository, and the window.
        outer: The recipe that has the brick. The average has its base, and is an adapter if the result is one.
        hub: Resolver of hub ids.

    Raises:
        WorkbenchError: As `window_of`.
    """
    chosen, every = window_of(name, ref.target, ref.window, outer.project)
    adapts = (locate(chosen[-1].place, outer.project, f"brick '{name}'", hub)[0] / ADAPTER).is_file()
    weights = weights_of(len(chosen), ref.window)
    output = outer.fields.output
    base = outer.fields.base
    data = {
        "version": 1,
        "name": as_name(f"{name}-{chosen[0].step}-{chosen[-1].step}"),
        "base": base if isinstance(base, str) else base.model_dump(exclude_none=True),
        "bricks": {f"step-{one.step}": {one.kind: one.place, "any_base": ref.any_base} for one in chosen},
        # Of adapters the deltas, so that the average of adapters is one; of checkpoints the weights, so that the base rounds nothing.
        "steps": [
            {
                "id": "average",
                "merge": "task_arithmetic" if adapts else "linear",
                "bricks": {f"step-{o.step}": w for o, w in zip(chosen, weights, strict=True)},
            }
        ],
        "output": {"form": "adapter"} if adapts and output.form == "adapter" else {},
        "seed": outer.fields.seed,
    }
    return from_data(data, outer.project), _said(name, ref.target, every, chosen, weights)


def window_of(name: str, run: str, window: Window, project: Path) -> tuple[list[Saved], list[Saved]]:
    """Return the checkpoints of a window and all of the run, in the order of their steps.

    Args:
        name: The brick's name, for errors.
        run: The run's folder or hub repository.
        window: Which of its checkpoints are meant.
        project: Directory that relative paths start from.

    Raises:
        WorkbenchError: If there are no such checkpoints, or one in the window is unfinished or of another kind.
    """
    folder = (project / Path(run).expanduser()).resolve()
    if folder.is_dir():
        every = checkpoints_of(folder, run)
    elif re.fullmatch(r"\w[\w.-]*/[\w.-]+", run) and not folder.parent.is_dir() and not retyped(run):
        every = revisions_of(run, f"brick '{name}'")
    else:
        raise WorkbenchError(f"brick '{name}': no such directory: {run}", "Write the folder that the trainer wrote to.")
    low, high = window.start, window.to
    found = [one for one in every if (low is None or one.step >= low) and (high is None or one.step <= high)]
    listed = [str(one.step) for one in every]
    steps = f"there are steps {', '.join(listed if len(listed) < 20 else [*listed[:3], '…', *listed[-3:]])}"
    if window.every is not None:
        found = [one for one in found if one.step % window.every == 0]
    if window.last is not None:
        if window.last > len(found):
            raise WorkbenchError(f"brick '{name}': last: {window.last}, but {len(found)} checkpoints are in the window; {steps}")
        found = found[-window.last :]
    if not found:
        raise WorkbenchError(f"brick '{name}': no checkpoint is in the window; {steps}", "Change `from`, `to` or `every`.")
    if unfinished := next((one for one in found if one.lacks), None):
        raise WorkbenchError(
            f"brick '{name}': {unfinished.name} is unfinished: {unfinished.lacks} is missing or empty",
            f"Wait until it is written, or end the window before it: `to: {unfinished.step - 1}`.",
        )
    if other := next((one for one in found if one.kind != found[0].kind), None):
        text = f"brick '{name}': {found[0].name} is an {found[0].kind} and {other.name} a {other.kind}"
        raise WorkbenchError(
            text.replace("an checkpoint", "a checkpoint").replace("a adapter", "an adapter"), "Average one kind."
        )
    return found, every


def _said(name: str, typed: str, every: list[Saved], chosen: list[Saved], weights: list[float]) -> list[str]:
    """Return a line about the window, and one about gaps in it."""
    days, nbytes = sorted({chosen[0].day, chosen[-1].day}), sum(one.nbytes for one in chosen)
    steps = [one.step for one in chosen]
    even = (
        "equal weights" if max(weights) - min(weights) < 1e-12 else "weights " + ", ".join(f"{weight:.3g}" for weight in weights)
    )
    lines = [
        f"brick '{name}': average of {len(chosen)} of {len(every)} checkpoints in {typed}, steps {', '.join(map(str, steps))} "
        f"{f'({size(nbytes)}, written ' + ' to '.join(days) + ')' if nbytes else 'of the hub'}, {even}"
    ]
    if missing := gaps(steps):
        between = ", ".join(f"{low} and {high}" for low, high in missing)
        lines.append(
            f"brick '{name}': checkpoints are missing between steps {between}; the weights take them as equally far apart"
        )
    return lines
