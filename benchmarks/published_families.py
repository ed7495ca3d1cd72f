"""Families as the hub publishes them: bricks as people make them on such a base, each merged and compared with a merge by hand.

    python benchmarks/published_families.py
    python benchmarks/published_families.py --only gemma3 qwen3_omni

A tiny base has the tensor names and dtypes of the hub's files, with the tensors that transformers does not load. On it people make a full fine-tune,
a LoRA, a save of the text model alone, a LoRA on it, and an adapter that `brick extract` takes from the fine-tune; tests/worlds/published_pairs.py says what is
compared with what. With `--only`, the other rows of the results file stay as they are. Each family is written when it is done; it takes one to ten
CPU seconds. The families are in published.json beside the checkout, and further ones in tests/worlds/published_more.py.
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
    parser = parser_of(__doc__, "published-families")
    parser.add_argument("--only", nargs="+", metavar="FAMILY", help="walk these families")
    options = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    import torch
    import transformers

    from worlds.published_bases import certainty, kind_of, sources
    from worlds.published_pairs import cells, entries

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    before = json.loads(options.out.read_text("utf-8")) if options.out.is_file() and options.only else {}
    known = entries()
    walked: dict[str, Any] = before.get("families", {})
    for name in options.only or known:
        about = known[name]
        with tempfile.TemporaryDirectory() as folder:
            found = cells(name, about, Path(folder) / "project")
        walked[name] = {
            "models": about["models"],
            "model_type": kind_of(name, about),
            "class": found["class"].said,
            "names": certainty(about),
            "sources": sources(name, about),
            **{pair: {"status": o.status, "said": o.said.replace(folder, "")} for pair, o in found.items() if pair != "class"},
        }
        print(name, {pair: o.status for pair, o in found.items() if pair != "class"}, flush=True)
        order = {name: position for position, name in enumerate(known)}
        document = {
            "transformers": transformers.__version__,
            "families": dict(sorted(walked.items(), key=lambda row: order.get(row[0], len(order)))),
        }
        write_results(options.out, document)
    if options.only and before:
        keep_head(options.out, before, options.only)


if __name__ == "__main__":
    main()
