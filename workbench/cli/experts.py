"""Command `experts`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from workbench.console.options import DeviceOpt, JsonOpt, QuietOpt, RunsOpt
from workbench.console.output import out
from workbench.console.trust import reads_recipes

if TYPE_CHECKING:
    from workbench.grow.mixtures.mixture import Usage

_LONGEST = 512
"""Maximum number of tokens per text, the same as in steps that read texts."""
_BAR = 6
"""Length of a full bar in characters."""
_PARTS = " ▏▎▍▌▋▊▉█"
_MOST = 32
"""Maximum number of experts in a row of the table; --json has all."""


@reads_recipes
def experts(
    target: Annotated[str, typer.Argument(help="Recipe, run, or model directory.", show_default=False)],
    texts: Annotated[
        Path, typer.Option("--texts", help='JSONL file of {"text":} or {"prompt":, "completion":}.', show_default=False)
    ],
    samples: Annotated[int, typer.Option("--samples", min=1, help="Number of texts to read, evenly spaced in the file.")] = 256,
    device: DeviceOpt = "auto",
    runs_dir: RunsOpt = None,
    json: JsonOpt = False,
    quiet: QuietOpt = False,
) -> None:
    """Count how often each expert of a mixture is used, layer by layer."""
    from workbench.api.chatting import open_speakers
    from workbench.grow.mixtures.mixture import ExpertsUsed, usage
    from workbench.models.hooks import expert_modules
    from workbench.models.identity import pick_device
    from workbench.models.texts import encode, longest_row, read_texts

    out.quiet = quiet or json
    read = read_texts(texts, str(texts), samples)
    place = pick_device(device)
    (speaker,) = open_speakers([target], runs_dir, place, plain=True, say=out.say, events=out.event)
    model, tokenizer = speaker.model(), speaker.tokenizer
    expert_modules(model)
    rows = encode(read, tokenizer, longest_row(model.config.get_text_config().to_dict(), _LONGEST))
    result = usage(model, rows, place, lambda done, of: out.event({"stage": "count", "text": target, "done": done, "total": of}))
    used = ExpertsUsed(model=target, texts=str(texts), samples=len(rows), **result.counts().to_dict())
    out.result(lambda: used, lambda: _print(result), json=json)


def _print(result: Usage) -> None:
    """Print each layer's shares of the experts and their entropy, and the mean over layers."""
    shares, entropy = result.shares, result.entropy
    count = shares.shape[1]
    out.line(f"{result.tokens} tokens, {result.top_k} of {count} experts per token; share of the choices, %")
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("layer")
    for expert in range(min(count, _MOST)):
        table.add_column(str(expert), justify="right", no_wrap=True)
    table.add_column("entropy, bits", justify="right")
    top = float(shares.max()) or 1.0
    for layer, row, bits in zip(result.layers, shares.tolist(), entropy.tolist(), strict=True):
        table.add_row(str(layer), *(_cell(share, top) for share in row[:_MOST]), f"{bits:.2f}")
    table.add_row("mean", *(_cell(share, top) for share in shares.mean(0).tolist()[:_MOST]), f"{float(entropy.mean()):.2f}")
    out.data.print(table)
    if count > _MOST:
        out.say(f"{count - _MOST} more experts are not shown; --json has all")


def _cell(share: float, top: float) -> Text:
    """Return a cell with the share in percent, and a bar on a terminal."""
    number = f"{100 * share:.1f}"
    if not sys.stdout.isatty():
        return Text(number)
    eighths = round(8 * _BAR * share / top)
    return Text(f"{number} {('█' * (eighths // 8) + _PARTS[eighths % 8]).strip():<{_BAR}}")
