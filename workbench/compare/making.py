"""The commands that make a configuration and use the result."""

from __future__ import annotations

from workbench.ground.errors import shell
from workbench.scores.store import Configuration

RUN = "workbench run"


def commands(c: Configuration) -> list[str]:
    """Return the command lines that make a configuration and use the result, in this order; empty if only its scores are known.

    The first one is `workbench run`, unless the configuration is a model that is there already. `push` takes results of `run` alone.
    """
    if not c.target and not c.made:
        return []
    made = [shell(*RUN.split(), *c.made)] if c.made else []
    if not c.target:
        return made
    served = [] if c.form in (None, "checkpoint") else ["--served-base", "ORG/BASE"]
    push = [shell("workbench", "push", c.target, "ORG/NAME")] if c.made else []
    export = [shell("workbench", "export", c.target, "--for", "vllm", *served, "-o", "served")]
    holds_memory = c.form == "configuration" and c.edits
    return [*made, shell("workbench", "chat", c.target), *push, *([] if holds_memory else export)]
