"""Cards and measures of bricks as text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from workbench.console.output import out
from workbench.ground.errors import UsageError, shell, size

if TYPE_CHECKING:
    from workbench.bricks.brick import Brick
    from workbench.bricks.card import Score
    from workbench.merge.measuring.delta_sums import Measures


def say_measures(name: str, measured: Measures, metric: str | None) -> None:
    """Print measures of a brick: totals, and a table of layers.

    Args:
        name: Name of the brick.
        measured: Its measures.
        metric: Value of `--metric`; default: cosine if other bricks were measured, else relative.

    Raises:
        WorkbenchError: If the metric compares bricks and there is only one.
    """
    from workbench.report.heatmap import totals
    from workbench.upkeep.commands.heat import MEETING, by_brick, by_kind

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


def score_text(score: Score) -> str:
    """Return a score of a card with its interval, the number of items, and the base's score if the card has one."""
    from workbench.bricks.card import level

    ends = ", ".join(level(score, end) for end in (score.low, score.high))
    base = "" if score.base_value is None else f", base {level(score, score.base_value)}"
    return f"{score.task} {score.metric} {level(score, score.value)} [{ends}], n = {score.n}{base}"


def axes_text(axes: dict[str, str]) -> str:
    """Return axes as one line: "customized, layer, low-rank update, routing: none, ..."."""
    plain = {name: value.replace("_", " ") for name, value in axes.items()}
    first = [plain[name] for name in ("origin", "granularity", "computation")]
    return ", ".join([*first, *(f"{name}: {plain[name]}" for name in ("routing", "aggregation", "training"))])
