"""Command `chat`: the answers of one or two models, one below the other."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from workbench.console.options import DeviceOpt, RunsOpt
from workbench.console.output import out
from workbench.console.trust import reads_recipes
from workbench.ground.errors import UsageError, printable, shell


@reads_recipes
def chat(
    targets: Annotated[
        list[str],
        typer.Argument(
            help="Recipe, point of a sweep, run, or model; two to see both answers to each prompt.",
            metavar="TARGET [OTHER]",
            show_default=False,
        ),
    ],
    device: DeviceOpt = "auto",
    runs_dir: RunsOpt = None,
    plain: Annotated[bool, typer.Option("--plain", help="Continue each line as plain text, without the chat template.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum length of an answer in tokens.")] = 128,
) -> None:
    """Chat with a recipe's result, a run or a model, or with two of them at once.

    One line per turn, with greedy decoding. Also reads lines from a pipe. With two, both get the same prompt, each with its own
    chat template and history; `workbench view` shows their answers side by side. Standard error says what acted: a router's bricks, a
    memory's facts, or a codebook's entries.
    """
    from workbench.api.chatting import open_speakers
    from workbench.models.identity import pick_device

    if len(targets) > 2:
        raise UsageError(f"expected one or two models, found {len(targets)}", "workbench chat TARGET OTHER")
    speakers = open_speakers(targets, runs_dir, pick_device(device), plain=plain, say=out.say, events=out.event)
    if sys.stdin.isatty():
        kinds = ["the chat template" if speaker.templated else "plain text" for speaker in speakers]
        each = ", ".join(f"{kind} for {speaker.name}" for kind, speaker in zip(kinds, speakers, strict=True))
        used = kinds[0] if len(set(kinds)) == 1 else each
        out.say(f"enter an empty line or Ctrl-D to quit; using {used}")
        if len(speakers) == 2:
            out.say(f"side by side in a browser: {shell('workbench', 'view')}")
    while line := _ask():
        acted = []
        for speaker in speakers:
            if len(speakers) > 1:
                _write(f"[{speaker.name}]\n")
            reply = speaker.answer(line, max_new_tokens, _write)
            acted += [(speaker.name, what if kind == "router" else f"{kind}: {what}") for kind, what in reply.acted]
            _write("\n")
        for name, what in acted:
            out.say(f"[{what}]" if len(speakers) == 1 else f"[{name}: {what}]")


def _ask() -> str:
    try:
        return (input("> ") if sys.stdin.isatty() else sys.stdin.readline()).strip()
    except EOFError:
        return ""


def _write(text: str) -> None:
    sys.stdout.write(printable(text))
    sys.stdout.flush()
