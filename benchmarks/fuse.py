"""Fusing a teacher with another tokenizer into the starter base: bits per byte on held-out text, by what the base is trained on.

    python benchmarks/fuse.py
    python benchmarks/fuse.py --teacher-steps 2 --steps 2 --texts 8 --scored 4 --seeds 1       a quick look
    python benchmarks/fuse.py --folder DIR                                  keeps the teacher and scores, so that a later call with the same options goes on

The teacher is made here: the starter base with a byte-pair tokenizer of its own, trained on pages of Python's reference that are in
pydoc_data (pages 1, 2, 3 of every five). The base is then trained on other pages (4 of every five): on the text alone, taught by this
teacher alone, and with MinCE and AvgCE, which fuse the base's own distributions too; all with the same texts, steps and seeds. Scored are
pieces of the remaining pages, which no model has seen, each from its beginning. The ensemble is no trained model: at each span between two
places where tokens of base and teacher end together, it has the mean of both models' probabilities of the span. Gains are relative to the
base, with 95 % intervals of the pages drawn again, the same draws for all rows. Results go to benchmarks/results/fuse.json.
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import torch
from record import parser_of, write_results
from retokenized import retokenized
from transformers import AutoModelForCausalLM, AutoTokenizer

from workbench.fuse.teaching.distributions import Vocabulary, sync_points
from workbench.models.texts import Text

PROJECT = Path(__file__).resolve().parents[1]
BASE = PROJECT / "bricks" / "starter" / "base"
PIECE = 400
"""Largest number of characters of a text that is trained on or scored."""
DRAWS = 2000


def main() -> None:
    """Make the teacher, train the base in several ways, and write the results file."""
    parser = parser_of(__doc__, "fuse")
    parser.add_argument("--tokens", type=int, default=8000, help="size of the teacher's vocabulary")
    parser.add_argument("--teacher-steps", type=int, default=100, help="training steps of the teacher, 8 texts each")
    parser.add_argument("--steps", type=int, default=40, help="training steps of the base, 4 texts each")
    parser.add_argument("--rate", type=float, default=5e-5, help="learning rate of the base")
    parser.add_argument("--weight", type=float, default=0.5, help="share of the fused loss; the paper's is 0.1")
    parser.add_argument("--texts", type=int, default=120, help="texts that the base is trained on")
    parser.add_argument("--scored", type=int, default=60, help="held-out texts that are scored")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--folder", type=Path, help="where the teacher and scores are kept; one folder for each choice of the options but --seeds"
    )
    options = parser.parse_args()
    torch.manual_seed(0)
    pages = list(topics.values())
    known, given, held_out = (pieces([p for i, p in enumerate(pages) if i % 5 in part]) for part in ((1, 2, 3), (4,), (0,)))
    given, held_out = given[: options.texts], held_out[: options.scored]
    with tempfile.TemporaryDirectory() as folder:
        project = options.folder or Path(folder)
        (project / "recipes").mkdir(parents=True, exist_ok=True)
        (project / "base").unlink(missing_ok=True)
        (project / "base").symlink_to(BASE)
        (project / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in given), "utf-8")
        if not (project / "teacher" / "tokenizer.json").is_file():
            make_teacher(project / "teacher", known, options.tokens, options.teacher_steps)
        nats: dict[str, list[np.ndarray[Any, Any]]] = {
            "base": [scored(project / "base", held_out)],
            "teacher, its own tokens": [scored(project / "teacher", held_out)],
            "ensemble of base and teacher": [ensemble(project / "base", project / "teacher", held_out)],
        }
        records: dict[str, Any] = {}
        weight = f"weight: {options.weight:g}"
        ways = {
            "the texts alone": "fuse: mince, weight: 0",
            f"one teacher, {weight}": f"fuse: mince, with_base: false, {weight}",
            f"mince, {weight}": f"fuse: mince, {weight}",
            f"mince by span, {weight}": f"fuse: mince, by: span, {weight}",
            f"avgce, {weight}": f"fuse: avgce, {weight}",
        }
        for name, way in ways.items():
            for seed in range(options.seeds):
                kept = project / "scored" / f"{name.replace(' ', '-')}-{seed}.json"
                if not kept.is_file():
                    made, record = trained(project, way, options.steps, options.rate, seed)
                    found = {"nats": scored(made / "model", held_out).tolist(), "fused": record.get("fused")}
                    kept.parent.mkdir(exist_ok=True)
                    kept.write_text(json.dumps(found), "utf-8")
                    shutil.rmtree(made)
                found = json.loads(kept.read_text("utf-8"))
                nats.setdefault(name, []).append(np.array(found["nats"]))
                records[name] = found["fused"]
                print(
                    name, seed, f"{nats[name][-1].sum() / math.log(2) / sum(len(t.encode()) for t in held_out):.4f}", flush=True
                )
    fields = {key: getattr(options, key) for key in ("tokens", "teacher_steps", "steps", "rate", "seeds")}
    sizes = {"texts": len(given), "scored": len(held_out), "bytes": sum(len(text.encode()) for text in held_out)}
    write_results(options.out, {**fields, **sizes, "rows": rows(nats, held_out, records)})


def pieces(pages: list[str]) -> list[str]:
    """Return pages as texts of whole lines."""
    texts = []
    for page in pages:
        text = ""
        for line in page.splitlines(keepends=True):
            if text and len(text) + len(line) > PIECE:
                texts.append(text)
                text = ""
            text += line[:PIECE]
        texts.append(text)
    return [text for text in texts if len(text.strip()) > PIECE // 4]


def make_teacher(out: Path, texts: list[str], size: int, steps: int) -> None:
    """Write the base with a tokenizer of its own, trained on some texts: its rows are first the means of the base's rows."""
    model, tokenizer = retokenized(BASE, texts, size)
    rows = [[tokenizer.bos_token_id, *tokenizer(text)["input_ids"]] for text in texts]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.0)
    for step in range(steps):
        chosen = [rows[i] for i in torch.randint(0, len(rows), (8,)).tolist()]
        width = max(map(len, chosen))
        batch = torch.tensor([row + [0] * (width - len(row)) for row in chosen])
        labels = torch.tensor([row + [-100] * (width - len(row)) for row in chosen])
        loss = model(batch, attention_mask=(labels >= 0).long(), labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            print(f"teacher, step {step}: {float(loss.detach()):.3f}", flush=True)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def trained(project: Path, fields: str, steps: int, rate: float, seed: int) -> tuple[Path, dict[str, Any]]:
    """Train the base, and return the run's directory and the record of the training."""
    training = f"data: texts.jsonl, steps: {steps}, batch_size: 4, learning_rate: {rate!r}, max_length: 512, save_every: 0"
    recipe = project / "recipes" / "fused.yaml"
    text = f"version: 1\nbase: base\nseed: {seed}\nbricks: {{teacher: teacher}}\nsteps:\n- {{{fields}, teachers: [teacher], {training}}}\n"
    recipe.write_text(text, "utf-8")
    command = [sys.executable, "-m", "workbench", "run", str(recipe), "--json"]
    document = json.loads(subprocess.run(command, cwd=project, check=True, capture_output=True, text=True).stdout)
    made = (project / document["run"]).resolve()
    return made, json.loads((made / "run.json").read_text("utf-8"))["steps"][0]["training"]


@torch.no_grad()
def token_nats(place: Path, texts: list[str]) -> list[np.ndarray[Any, Any]]:
    """Return −log p of each token of each text, after a start token."""
    model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(place)
    found = []
    for text in texts:
        row = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]])
        logs = model(row).logits[0, :-1].log_softmax(-1)
        found.append(-logs.gather(1, row[0, 1:, None])[:, 0].double().numpy())
    return found


def scored(place: Path, texts: list[str]) -> np.ndarray[Any, Any]:
    """Return −log p of each text."""
    return np.array([nats.sum() for nats in token_nats(place, texts)])


def ensemble(one: Path, other: Path, texts: list[str]) -> np.ndarray[Any, Any]:
    """Return −log p of each text where every span between two shared ends of tokens has the mean of both models' probabilities."""
    places = (one, other)
    vocabularies = [Vocabulary(place, place.name) for place in places]
    tokens = [token_nats(place, texts) for place in places]
    found = []
    for n, text in enumerate(texts):
        read = [vocabulary.read(Text("", text, "")) for vocabulary in vocabularies]
        syncs = sync_points(read[0], vocabularies[0].pieces, read[1], vocabularies[1].pieces)
        spans = []
        for nats, ends in zip((part[n] for part in tokens), syncs, strict=True):
            stops = np.unique([*(ends + 1), len(nats)])
            spans.append(np.diff(np.concatenate(([0.0], np.cumsum(nats)[stops - 1]))))
        found.append(-(np.logaddexp(-spans[0], -spans[1]) - math.log(2)).sum())
    return np.array(found)


def rows(nats: dict[str, list[np.ndarray[Any, Any]]], texts: list[str], records: dict[str, Any]) -> list[dict[str, Any]]:
    """Return bits per byte and the gain over the base of every configuration, with intervals over the texts drawn again."""
    sizes = np.array([len(text.encode()) for text in texts])
    draws = np.random.default_rng(0).integers(0, len(texts), (DRAWS, len(texts)))
    base = nats["base"][0]
    found = []
    for name, seeds in nats.items():
        mean = np.mean(seeds, axis=0)
        gains = 1 - mean[draws].sum(1) / base[draws].sum(1)
        low, high = np.quantile(gains, [0.025, 0.975])
        bits = [float(values.sum() / math.log(2) / sizes.sum()) for values in seeds]
        row: dict[str, Any] = {"configuration": name, "bits_per_byte": float(np.mean(bits)), "seeds": bits}
        row |= {"gain": float(1 - mean.sum() / base.sum()), "low": float(low), "high": float(high)}
        if "the texts alone" in nats and name in records:
            alone = np.mean(nats["the texts alone"], axis=0)
            more = (alone - mean)[draws].sum(1) / base[draws].sum(1)
            row |= {"over_texts": float((alone - mean).sum() / base.sum())}
            row |= {"over_low": float(np.quantile(more, 0.025)), "over_high": float(np.quantile(more, 0.975))}
        found.append({**row, **({"fused": records[name]} if records.get(name) else {})})
    return found


if __name__ == "__main__":
    main()
