"""Facts in a LoRA (`edit: adapter`), in neurons of their own (`edit: patch`) and in projections (memit, its variants), beside the facts in the prompt.

    python benchmarks/edit_adapter.py                                       100 CounterFact facts at once, on the starter base
    python benchmarks/edit_adapter.py --count 20 --draws 3                  three draws of 20
    python benchmarks/edit_adapter.py --base DIR                            the same on another model
    python benchmarks/edit_adapter.py --count 4 --draws 1 --layers 7 --no-retention --limit 4      a quick look

No arm learns a paraphrase, a neighbor or a portability prompt of its facts, so that all of them are held out. `lora` learns the facts alone; the arms `adapter`
also keep the base's distributions after generated prompts and on the built-in text. `patch` takes the neurons of a layer that write least; `patch at subjects` has one for
each subject, at a quarter of the depth. `then ends` is that edit and then neurons for what it does not say and for the end of each text. `memit, five layers` shares what each layer
leaves with the ones above. Earlier choices used the facts before --skip. With --folder DIR the project is kept, and a later call solves and scores only what is missing. Results
go to benchmarks/results/edit-adapter.json after each draw.
"""

from __future__ import annotations

import argparse
from typing import Any

from edit_draws import measure, options_of
from record import parser_of

MEMIT = {"edit": "memit", "unconverged": "skip"}
ADAPTER = {"edit": "adapter", "paraphrases": False, "min_efficacy": 0}
# `after`: the edit of the same facts that comes before the step.
PATCH = {"edit": "patch", "neighbours": False, "preserve_generated": 400, "min_efficacy": 0}
AT_SUBJECTS = {**PATCH, "position": "subject_last"}
ARMS: dict[str, dict[str, Any]] = {
    "memit": MEMIT,
    # The layer that the sweep chooses on the starter base, and the four below it.
    "memit, five layers": {**MEMIT, "layers": [3, 4, 5, 6, 7]},
    "patch": {**PATCH, "position": "prompt_last"},
    "patch at subjects": AT_SUBJECTS,
    "patch at subjects, then ends": {**PATCH, "end_of_text": True, "after": AT_SUBJECTS},
    "lora": {**ADAPTER, "preserve_generated": 0, "replay_weight": 0.0},
    "adapter from memit": {**ADAPTER, "start": "memit"},
    "memory": {"edit": "memory", "min_efficacy": 0},
}


def main() -> None:
    """Score all arms of all draws, and write the results file after each draw."""
    options = options_of(parser_of(__doc__, "edit-adapter"), list(ARMS), count=100, skip=500, draws=1)
    measure(options, steps(options))


def steps(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Return arm -> its step without the facts; --layers are those of memit, alone and as a start, and of neurons at subjects."""
    arms = {arm: dict(ARMS[arm]) for arm in options.arms}
    for step in arms.values() if options.layers else ():
        step |= placed(step, options.layers)
        if "after" in step:
            step["after"] = {**step["after"], **placed(step["after"], options.layers)}
        if step.get("start") == "memit":
            step["start_fields"] = {"layers": options.layers}
    return arms


def placed(step: dict[str, Any], layers: list[int]) -> dict[str, Any]:
    """Return the field that puts a step at the layers, for steps that write at subjects; a step of several layers keeps their number."""
    if step["edit"] == "memit":
        below = len(step.get("layers", layers[:1])) - 1
        return {"layers": [*range(layers[0] - below, layers[0]), *layers]}
    return {"layer": layers[0]} if step.get("position") == "subject_last" else {}


if __name__ == "__main__":
    main()
