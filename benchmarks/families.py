"""Every causal language model that transformers builds tiny, and multimodal ones: what merges, scores, is edited, grows and is routed, checked by numbers.

    python benchmarks/families.py
    python benchmarks/families.py --only gpt_oss nemotron_h gemma4

A family is built with random weights, two fine-tunes and two adapters of it are merged, questions are scored, one fact is written, it grows and two adapters are
routed; tests/worlds/family_walk.py says what is compared with what. mergekit merges the fine-tunes beside. With `--only`, the other rows of the results file stay as they are. Each family is written when it is done, so that a later call
with `--continue` goes on. A family takes two to four CPU seconds.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from record import keep_head, parser_of, write_results


def main() -> None:
    """Walk the families and write the results file after each."""
    parser = parser_of(__doc__, "families")
    parser.add_argument("--only", nargs="+", metavar="FAMILY", help="walk these families: a model_type, or TYPE:CLASS")
    parser.add_argument("--continue", action="store_true", dest="go_on", help="walk only families that the results file lacks")
    options = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    import torch
    import transformers

    from worlds.family import NotTinyError
    from worlds.family_walk import families, walk

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    before = json.loads(options.out.read_text("utf-8")) if options.out.is_file() and (options.only or options.go_on) else {}
    walked: dict[str, Any] = before.get("families", {})
    not_tiny: dict[str, str] = before.get("not_tiny", {})
    for family in options.only or families():
        if options.go_on and family in {**walked, **not_tiny}:
            continue
        walked.pop(family, None)
        not_tiny.pop(family, None)
        with tempfile.TemporaryDirectory() as folder:
            try:
                found = walk(family, Path(folder) / "project", mergekit=True)
                walked[family] = {name: {"status": o.status, "said": o.said} for name, o in found.items()}
            except NotTinyError as error:
                not_tiny[family] = str(error)
        print(
            family,
            not_tiny.get(family) or {name: o["status"] for name, o in walked[family].items() if name != "class"},
            flush=True,
        )
        order = {name: position for position, name in enumerate(families())}
        document = {
            "transformers": transformers.__version__,
            "families": dict(sorted(walked.items(), key=lambda row: order.get(row[0], len(order)))),
            "not_tiny": dict(sorted(not_tiny.items())),
            "not_walked": [name for name in families() if name not in {**walked, **not_tiny}],
        }
        write_results(options.out, document)
    if options.only and before:
        keep_head(options.out, before, options.only)


if __name__ == "__main__":
    main()
