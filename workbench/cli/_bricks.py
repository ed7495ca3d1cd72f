"""Find bricks named on the command line, measure them, and print their cards."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from workbench.cli._output import out
from workbench.errors import GateFailedError, UsageError, WorkbenchError, nearest, shell, size

if TYPE_CHECKING:
    from workbench.bricks.brick import Brick
    from workbench.merge.measuring.deltas import Measures
    from workbench.merge.streaming.deltas import Deltas
    from workbench.models.layout import Model


def measure_brick(brick: Brick, others: list[str], base: str, device: str) -> Measures:
    """Measure a brick's delta on its base, and compare it with those of other bricks.

    Args:
        brick: The brick.
        others: Names or directories of other bricks.
        base: Directory or hub id of the base.
        device: Value of `--device`.

    Raises:
        WorkbenchError: If a brick does not fit the base, or if two bricks have the same name.
    """
    from workbench.bricks.locate import resolve_base
    from workbench.bricks.tied import base_for
    from workbench.merge.measuring.deltas import measure
    from workbench.models.device import pick_device
    from workbench.run.compose import deltas
    from workbench.weights.device import exact
    from workbench.weights.parallel import default_threads

    checkpoint, _ = resolve_base(base, Path.cwd())
    compared = {b.name: b for b in map(find_brick, others)}
    model, on = base_for([brick, *compared.values()], checkpoint), pick_device(device)
    if len(compared) < len(others) or brick.name in compared:
        raise WorkbenchError("two bricks have the same name", "Rename the directory of one of them.")
    for one in (brick, *compared.values()):
        check_fit(one, model)
    with exact(on):
        return measure(
            model,
            deltas(brick, model),
            {n: deltas(b, model) for n, b in compared.items()},
            device=on,
            threads=default_threads(),
            progress=lambda done, total: out.event(
                {"stage": "measure", "done": done, "total": total, "text": f"{total} tensors"}
            ),
        )


def check_fit(brick: Brick, base: Model) -> Deltas:
    """Return a brick's deltas on a base.

    Raises:
        WorkbenchError: If the brick does not fit the base.
    """
    from workbench.bricks.brick import fitted
    from workbench.run.compose import deltas

    if brick.kind == "checkpoint":
        fitted(brick, base)
    return deltas(brick, base)


def base_of_brick(brick: Brick) -> str:
    """Return the base that a brick names: a directory or hub id.

    Raises:
        WorkbenchError: If it names none.
    """
    from workbench.bricks.locate import base_of

    return base_of(
        brick.path if brick.card is None else card_directory(brick),
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
    from workbench.cli._heat import MEETING, by_brick, by_kind, totals

    others = list(measured.total.meetings)
    metric = metric or ("cosine" if others else "relative")
    if metric in MEETING and not others:
        raise UsageError(
            f"--metric {metric} compares bricks, but only {name} is named", f"workbench brick show {shell(name)} OTHER"
        )
    totals(name, measured)
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
            base = f", base {100 * s.base_value:.1f}" if s.base_value is not None else ""
            out.line(f"score    {s.task} {s.metric} {100 * s.value:.1f} [{100 * s.low:.1f}, {100 * s.high:.1f}], n = {s.n}{base}")
        if card.training:
            out.line("training " + ", ".join(f"{k} {v}" for k, v in card.training.items() if not isinstance(v, dict)))


def axes_text(axes: dict[str, str]) -> str:
    """Return axes as one line: "customized, layer, low-rank update, routing: none, ..."."""
    plain = {name: value.replace("_", " ") for name, value in axes.items()}
    told = [plain[name] for name in ("origin", "granularity", "computation")]
    return ", ".join([*told, *(f"{name}: {plain[name]}" for name in ("routing", "aggregation", "training"))])


def read_all(bound: Deltas, base: Model) -> int:
    """Read every delta of a brick, which refuses NaN and infinities, and return the number of tensors that it may change."""
    import torch

    from workbench.weights.specs import block_elements, buffer, matrix

    cpu = torch.device("cpu")
    touched = [name for name in base.weights.specs if bound.touches(name)]
    for name in touched:
        spec = base.weights.specs[name]
        if not spec.is_float:
            continue
        source, delta, rooms = base.weights.open(name, cpu), bound.open_delta(name, cpu), (buffer(spec, cpu), buffer(spec, cpu))
        for start, stop in spec.blocks(block_elements(cpu)):
            weights, out_rows = (matrix(room, start, stop, spec.cols) for room in rooms)
            source.read(start, stop, weights)
            delta.read_delta(start, stop, weights, out_rows)
    return len(touched)


def card_directory(brick: Brick) -> Path:
    """Return the directory of a brick's card."""
    from workbench.run.brick_statistics import card_folder

    return card_folder(brick)


def verify_statistics(brick: Brick, name: str) -> None:
    """Raise GateFailedError if the routing statistics beside a card are not those that it names."""
    if brick.card is None or brick.card.routing is None:
        return
    from workbench.run.brick_statistics import read_statistics

    try:
        read_statistics(card_directory(brick), brick.card.routing)
    except WorkbenchError as error:
        raise GateFailedError(error.message, shell("workbench", "route", "measure", name)) from error


def brick_directory(name: str) -> Path:
    """Return a brick's directory, given the directory or its name in bricks/. A GGUF file is returned itself.

    Raises:
        WorkbenchError: If there is no such directory.
    """
    if Path(name).suffix == ".gguf" and Path(name).is_file():
        return Path(name)
    path = Path(name) if Path(name).is_dir() else Path("bricks") / name
    if not path.is_dir():
        known = [p.name for p in Path("bricks").iterdir() if p.is_dir()] if Path("bricks").is_dir() else []
        raise WorkbenchError(
            f"no brick '{name}': expected a directory, or a name in bricks/. {nearest(name, known)}",
            "`workbench brick ls` lists all bricks.",
        )
    return path


def find_brick(name: str) -> Brick:
    """Open a brick, given its directory or its name in bricks/."""
    from workbench.bricks.locate import resolve_brick
    from workbench.steps.fields import BrickRef

    folder = brick_directory(name)
    return resolve_brick(folder.resolve().name, BrickRef(path=str(folder.resolve())), Path.cwd())


def made_again(brick: Brick, name: str) -> str:
    """Return the command that makes a brick again."""
    made = brick.card.extraction if brick.card else {}
    if made and brick.card:
        return shell("workbench", "brick", "extract", made.get("checkpoint"), "--base", brick.card.base.id, "-o", "NEW")
    if brick.card and (carried := brick.card.transplant):
        return shell("workbench", "brick", "transplant", carried.get("brick"), "--to", brick.card.base.id, "-o", "NEW")
    if brick.card and brick.card.kind == "edit":
        return shell("workbench", "edit", "rebase", name, "--onto", brick.card.base.id, "-o", "NEW")
    return shell("workbench", "brick", "train", name)
