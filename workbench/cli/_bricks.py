"""Find bricks named on the command line, and print their cards and measures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from workbench.cli._output import out
from workbench.ground.errors import UsageError, WorkbenchError, nearest, shell, size

if TYPE_CHECKING:
    from workbench.bricks.brick import Brick
    from workbench.bricks.card import Score
    from workbench.merge.measuring.delta_sums import Measures


def base_of_brick(brick: Brick) -> str:
    """Return the base that a brick names: a directory or hub id.

    Raises:
        WorkbenchError: If it names none.
    """
    from workbench.bricks.locate import base_of
    from workbench.run.route_statistics import card_folder

    return base_of(
        brick.path if brick.card is None else card_folder(brick),
        Path.cwd(),
        "Name the model that it was made on with --base DIR.",
    )


def say_measures(name: str, measured: Measures, metric: str | None) -> None:
    """Print measures of a brick: totals, and a table of layers.

    Args:
        name: Name of the brick.
        measured: Its measures.
        metric: Value of `--metric`; default: cosine if other bricks were measured, else relative.

    Raises:
        WorkbenchError: If the metric compares bricks and there is only one.
    """
    from workbench.cli._heat import MEETING, by_brick, by_kind
    from workbench.report.heatmap import totals

    others = list(measured.total.meetings)
    metric = metric or ("cosine" if others else "relative")
    if metric in MEETING and not others:
        raise UsageError(
            f"--metric {metric} compares bricks, but only {name} is named", f"workbench brick show {shell(name)} OTHER"
        )
    columns, rows = totals(name, measured)
    out.table(columns, rows, right=range(1, len(columns)))
    out.line("")
    if metric in MEETING and len(others) > 1:
        by_brick(measured, metric)
    else:
        by_kind(measured, metric, others[0] if metric in MEETING else None)


def say_card(brick: Brick) -> None:
    """Print a brick's card."""
    card = brick.card
    out.line(
        f"{brick.name}: {card.kind if card else brick.kind}, {size(sum(f.stat().st_size for f in brick.files()))}"
        + (f", {card.skill}" if card and card.skill else "")
    )
    if brick.kind == "adapter":
        modules = brick.adapter.modules()
        ranks = sorted({a.spec.shape[0] for a, _ in modules.values()})
        out.line(
            f"updates  {len(modules)} modules ({', '.join(sorted({m.rpartition('.')[2] for m in modules}))}), rank {', '.join(map(str, ranks))}"
        )
    else:
        out.line(
            f"tensors  {len(brick.checkpoint.specs)}, {sum(s.numel for s in brick.checkpoint.specs.values()) / 1e6:.1f} M parameters"
        )
        for note in brick.checkpoint.notes:
            out.line(f"stored   {note}")
    out.line(f"axes     {axes_text(brick.axes)}")
    if card:
        out.line(f"base     {card.base.title or card.base.id}  {(card.base.digest or '')[:12]}")
        for label, value in (("prompt", card.prompt_format), ("made by", card.generator), ("license", card.licence)):
            if value:
                out.line(f"{label:<8} {value}")
        if carried := card.transplant:
            out.line(f"carried  {carried['brick']} from {carried['base']}, by {carried['by']}, {carried['modules']} modules")
        if card.routing:
            r = card.routing
            out.line(f"routing  statistics of {r.prompts} prompts of {r.source}, layer {r.layer}, last {r.window} tokens")
        for s in card.scores:
            out.line(f"score    {score_text(s)}")
        if card.training:
            out.line("training " + ", ".join(f"{k} {v}" for k, v in card.training.items() if not isinstance(v, dict)))


def level(score: Score, value: float | None, decimals: int = 1) -> str:
    """Return a value in the units of a score: a share in percent, any other metric as it is; empty if there is none."""
    from workbench.scores.tasks import LOWER

    if value is None:
        return ""
    share = score.metric not in LOWER and all(0 <= v <= 1 for v in (score.value, score.base_value or 0.0))
    return f"{100 * value:.{decimals}f}" if share else f"{value:.4g}"


def score_text(score: Score) -> str:
    """Return a score of a card with its interval, the number of items, and the base's score if the card has one."""
    ends = ", ".join(level(score, end) for end in (score.low, score.high))
    base = "" if score.base_value is None else f", base {level(score, score.base_value)}"
    return f"{score.task} {score.metric} {level(score, score.value)} [{ends}], n = {score.n}{base}"


def axes_text(axes: dict[str, str]) -> str:
    """Return axes as one line: "customized, layer, low-rank update, routing: none, ..."."""
    plain = {name: value.replace("_", " ") for name, value in axes.items()}
    first = [plain[name] for name in ("origin", "granularity", "computation")]
    return ", ".join([*first, *(f"{name}: {plain[name]}" for name in ("routing", "aggregation", "training"))])


def brick_directory(name: str) -> Path:
    """Return a brick's directory, given the directory or its name in bricks/. A GGUF file is returned itself.

    Raises:
        WorkbenchError: If there is no such directory.
    """
    from workbench.ground.recognize import look

    if Path(name).suffix == ".gguf" and Path(name).is_file():
        return Path(name)
    path = Path(name) if Path(name).is_dir() else Path("bricks") / name
    if not path.is_dir():
        known = [p.name for p in Path("bricks").iterdir() if p.is_dir()] if Path("bricks").is_dir() else []
        thing = look(Path(name))
        raise WorkbenchError(
            f"no brick '{name}': expected a directory, or a name in bricks/. {f'Found {thing.says}.' if thing else nearest(name, known)}",
            thing.hint if thing else "`workbench brick ls` lists all bricks.",
        )
    return path


def find_brick(name: str) -> Brick:
    """Open a brick, given its directory or its name in bricks/."""
    from workbench.bricks.locate import resolve_brick
    from workbench.steps.fields import BrickRef

    folder = brick_directory(name)
    return resolve_brick(folder.resolve().name, BrickRef(path=str(folder.resolve())), Path.cwd())
