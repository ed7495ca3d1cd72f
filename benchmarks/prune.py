"""Prune a quarter of a model's layers in several ways and train what is left: the source of a table and a figure in docs/growing-results.md.

    python benchmarks/prune.py
    python benchmarks/prune.py --arms influence last --steps 20 --limit 40        a quick look
    python benchmarks/prune.py --tiny --steps 2 --limit 4 --calibration 4 --held-out 8   tries the whole on a random model
    python benchmarks/prune.py --folder DIR                                        keeps models and scores, so that a later call goes on

Arms: `influence` and `perplexity` are the choices of `grow: prune`, measured on the first texts; `last` removes the last layers; `random-N`
removes random ones. Each pruned model is then trained by `train: {teacher: before}`, with the same texts, steps and seed. Measured before and
after the training are the perplexity on texts that neither chose layers nor trained, and the accuracy on the suite `retention`, paired with the
base item by item. Texts are the English running text that edits take their statistics from. The results file is written after every arm.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from edit_setup import CPU, PROJECT, STARTER, make_project, one_thread, show
from record import parser_of, write_results

from workbench.activations.labelled import ItemRow
from workbench.activations.losses import losses
from workbench.compare.tables import tables_of
from workbench.edit.inputs import statistics_texts
from workbench.evaluate.lineup import LineupEntry
from workbench.evaluate.plans import plans
from workbench.evaluate.scoring import score_all
from workbench.models.live import compute, live_model
from workbench.models.prompts import load_tokenizer
from workbench.recipe.recipe import from_data
from workbench.resolve.resolve import resolve
from workbench.resolve.resolved import Resolved
from workbench.run.compose import compose
from workbench.scores.paired import paired
from workbench.scores.store import ScoreStore
from workbench.scores.suite import load_suite

ARMS = ("influence", "perplexity", "last", "random-0", "random-1", "random-2")
MARGIN = 8
"""Tokens by which a text is shorter than a row, because a cut text may be tokenized in another way."""


def main() -> None:
    """Prune, train and measure every arm, and write the results file after each."""
    options = options_of(parser_of(__doc__, "prune"), list(ARMS))
    one_thread()
    started, rows = time.perf_counter(), list[dict[str, Any]]()
    with tempfile.TemporaryDirectory() as scratch:
        project = (options.folder or Path(scratch)).resolve()
        base = make_tiny(Path(scratch) / "tiny") if options.tiny else options.base
        make_project(project, base, [])
        held_out = write_texts(project, options)
        before = measured(project, "base", [], held_out, options)
        for arm in options.arms:
            row = arm_row(project, arm, held_out, before, options)
            rows.append(row)
            print(json.dumps(row), flush=True)
            write_results(options.out, document(project, before, rows, options, time.perf_counter() - started))


def options_of(parser: argparse.ArgumentParser, arms: list[str], calibration: int = 8) -> argparse.Namespace:
    """Add the options to a command line, and read them."""
    parser.add_argument("--base", type=Path, default=PROJECT / STARTER, help="directory of the model")
    parser.add_argument("--share", type=float, default=0.25, help="share of the layers or neurons that is removed")
    parser.add_argument("--arms", nargs="+", default=arms, choices=arms)
    parser.add_argument("--steps", type=int, default=140, help="training steps of each arm")
    parser.add_argument("--batch-size", type=int, default=8, help="texts of a training step")
    parser.add_argument("--rate", type=float, default=2e-4, help="peak learning rate")
    parser.add_argument("--length", type=int, default=128, help="tokens of a text")
    parser.add_argument("--calibration", type=int, default=calibration, help="texts that layers or neurons are chosen on")
    parser.add_argument("--held-out", type=int, default=100, help="texts whose perplexity is measured")
    parser.add_argument("--limit", type=int, help="maximum number of retention items, for a quick look")
    parser.add_argument("--items", type=int, default=32, help="retention items of a batch")
    parser.add_argument("--tiny", action="store_true", help="a random model of eight layers, to try the whole")
    parser.add_argument("--folder", type=Path, help="project folder to keep, so that a later call can resume")
    parser.add_argument("--note", default="", help="sentence for the results file, such as what else ran on the machine")
    return parser.parse_args()


def document(
    project: Path, before: dict[str, Any], rows: list[dict[str, Any]], options: argparse.Namespace, seconds: float
) -> dict[str, Any]:
    """Return the results file."""
    config = json.loads((project / "base" / "config.json").read_text("utf-8"))
    return {
        **({"note": options.note} if options.note else {}),
        "base": "a random tiny model"
        if options.tiny
        else "the starter base"
        if options.base == PROJECT / STARTER
        else options.base.name,
        "layers": config["num_hidden_layers"],
        "share": options.share,
        "steps": options.steps,
        "batch_size": options.batch_size,
        "length": options.length,
        "rate": options.rate,
        "texts": {"calibration": options.calibration, "held_out": options.held_out},
        "limit": options.limit,
        "seconds": round(seconds),
        "before": {key: value for key, value in before.items() if key != "items"},
        "rows": rows,
    }


def make_tiny(out: Path) -> Path:
    """Write a random model of eight layers with the starter's tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = load_tokenizer(PROJECT / STARTER)
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, **sizes)).save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


def write_texts(project: Path, options: argparse.Namespace) -> list[ItemRow]:
    """Write calibration.jsonl and train.jsonl, and return the held-out texts as tokens."""
    tokenizer = load_tokenizer(project / "base")
    cut = []
    for text in statistics_texts():
        ids = tokenizer(text)["input_ids"][: options.length - MARGIN]
        cut.append(tokenizer.decode(ids, skip_special_tokens=True))
    first, held = options.calibration, cut[options.calibration : options.calibration + options.held_out]
    for name, part in (("calibration", cut[:first]), ("train", cut[first + options.held_out :])):
        lines = [json.dumps({"text": text}, ensure_ascii=False) for text in part]
        (project / f"{name}.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    return [ItemRow(ids, len(ids)) for ids in (tokenizer(text)["input_ids"] for text in held)]


def arm_row(
    project: Path, arm: str, held_out: list[ItemRow], before: dict[str, Any], options: argparse.Namespace
) -> dict[str, Any]:
    """Prune in one way, train, and return the measurements of the pruned and of the trained model."""
    depth = json.loads((project / "base" / "config.json").read_text("utf-8"))["num_hidden_layers"]
    count = int(options.share * depth + 0.5)
    row: dict[str, Any] = {"arm": arm}
    if arm == "last":
        gone = list(range(depth - count, depth))
    elif arm.startswith("random"):
        gone = sorted(random.Random(int(arm.rpartition("-")[2])).sample(range(depth), count))
    else:
        step = {"grow": "prune", "layers": count, "by": arm, "calibration": "calibration.jsonl", "max_length": options.length}
        record, row["choosing_seconds"] = timed(project, f"choose-{arm}", [step])
        gone, row["importance"] = record["gone_layers"], record["importance"]
    row["gone"] = gone
    pruned = {"grow": "prune", "layers": gone, "check": "tensors"}
    row["pruned"] = measured(project, f"{arm}-pruned", [pruned], held_out, options, before)
    train = {
        "data": "train.jsonl",
        "steps": options.steps,
        "batch_size": options.batch_size,
        "learning_rate": options.rate,
        "max_length": options.length,
    }
    record, row["training_seconds"] = timed(project, f"{arm}-trained", [{**pruned, "train": train}])
    row |= {"parameters": record["parameters"], "divergence": record["train"]["loss"]}
    row["trained"] = measured(project, f"{arm}-trained", [{**pruned, "train": train}], held_out, options, before)
    return row


def timed(project: Path, name: str, steps: list[dict[str, Any]]) -> tuple[dict[str, Any], float]:
    """Return the record of a step, and its CPU seconds; those of a step that is cached are of the call that computed it."""
    recipe, file = resolved(project, name, steps), project / "seconds.json"
    known: dict[str, float] = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    clock = time.process_time()
    record = compose(recipe, CPU, show).records()[0]
    seconds = known.setdefault(recipe.keys[0], round(time.process_time() - clock, 1))
    file.write_text(json.dumps(known, indent=1), "utf-8")
    return record, seconds


def resolved(project: Path, name: str, steps: list[dict[str, Any]]) -> Resolved:
    """Return a recipe on the base."""
    return resolve(from_data({"version": 1, "name": name, "base": "base", "steps": steps}, project))


def measured(
    project: Path,
    name: str,
    steps: list[dict[str, Any]],
    held_out: list[ItemRow],
    options: argparse.Namespace,
    before: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Return perplexity and retention of a configuration; beside the base also the paired difference of retention."""
    recipe = resolved(project, name, steps)
    model = compose(recipe, CPU).model
    live = live_model(model.config, compute(model, torch.float32, CPU), recipe.tokenizer_path, CPU)
    loss = losses(live, held_out).mean
    del live
    suite, store = load_suite("retention", project), ScoreStore(project / "scores")
    entry = LineupEntry(name, "base" if before is None else "configuration", recipe)
    planned = plans([entry], [suite], batch_size=options.items, limit=options.limit, device=CPU, events=show)
    (score,) = score_all([entry], planned, store, device=CPU, events=show)
    (table,) = tables_of(store, [score], {suite.suite: suite})
    digest = score.configuration.digest
    low, high = table.interval(digest)
    found: dict[str, Any] = {
        "loss": loss,
        "perplexity": math.exp(loss),
        "retention": {"n": len(table.items), "value": table.value(digest), "low": low, "high": high},
    }
    values = table.values[digest]
    if before is None:
        return {**found, "items": values}
    pair = paired(before["items"], values, table.cluster.tolist())
    low, high = pair.interval()
    return {**found, "difference": {"diff": pair.diff, "low": low, "high": high}}


if __name__ == "__main__":
    main()
