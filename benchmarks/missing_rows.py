"""A model with the tokenizer of another one: bits per byte on held-out text, by how the rows of missing tokens are made.

    python benchmarks/missing_rows.py
    python benchmarks/missing_rows.py --steps 2 --tokens 2000      a quick look

The donor is made here: the starter base with a byte-pair tokenizer of its own, trained on the pages of Python's reference that are in
pydoc_data. Its rows are those of the base where both have a token, else the mean of the token's pieces, and are then trained on these pages,
all other weights frozen. Every fifth page is held out. The base then gets the donor's tokenizer with rows by `missing: omp` (several k), `mean`
and `zero`, and by mergekit-tokensurgeon with its defaults, in its own process. The donor itself is the ceiling, and the base with its own tokenizer
stands beside them. Results go to benchmarks/results/missing-rows.json.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from record import parser_of, write_results
from retokenized import retokenized
from transformers import AutoModelForCausalLM, AutoTokenizer

PROJECT = Path(__file__).resolve().parents[1]
BASE = PROJECT / "bricks" / "starter" / "base"
WIDTH = 128
"""Tokens of a row that is trained or scored on."""


def main() -> None:
    """Make the donor, give its tokenizer to the base, and write the results file."""
    parser = parser_of(__doc__, "missing-rows")
    parser.add_argument("--tokens", type=int, default=8000, help="size of the donor's vocabulary")
    parser.add_argument("--steps", type=int, default=60, help="training steps of the donor's rows")
    parser.add_argument("--ks", type=int, nargs="+", default=[1, 4, 16, 64], help="rows of a combination")
    parser.add_argument("--pages", type=int, default=16, help="held-out pages that are scored")
    options = parser.parse_args()
    torch.manual_seed(0)
    pages = list(topics.values())
    known, held_out = [p for i, p in enumerate(pages) if i % 5], pages[::5][: options.pages]
    with tempfile.TemporaryDirectory() as folder:
        project = Path(folder)
        (project / "base").symlink_to(BASE)
        (project / "recipes").mkdir()
        make_donor(project / "donor", known, options.tokens, options.steps)
        rows = [{"rows": "base, its own tokenizer", **scored(project / "base", held_out)}]
        rows += [{"rows": "donor", **scored(project / "donor", held_out)}]
        rules = [("zero", ""), ("mean", ""), *(("omp", f", k: {k}") for k in options.ks)]
        for rule, more in rules:
            made = given(project, f"missing: {rule}{more}")
            rows.append({"rows": f"{rule}{more.replace(':', ' =')}", **scored(made / "model", held_out), **carried(made)})
            print(json.dumps(rows[-1]), flush=True)
        surgeon = Path(sys.executable).with_name("mergekit-tokensurgeon")
        places = [str(project / name) for name in ("base", "donor", "surgeon")]
        subprocess.run([str(surgeon), *places, "--quiet"], check=True)
        rows.append({"rows": "mergekit-tokensurgeon", **scored(project / "surgeon", held_out)})
    sizes = {"pages": len(held_out), "bytes": sum(len(page.encode()) for page in held_out)}
    write_results(options.out, {"tokens": options.tokens, "steps": options.steps, **sizes, "rows": rows})


def make_donor(out: Path, pages: list[str], size: int, steps: int) -> None:
    """Write the base with a tokenizer of its own, whose rows are trained on some pages."""
    model, tokenizer = retokenized(BASE, pages, size)
    embeddings = model.get_input_embeddings().weight
    model.requires_grad_(False)
    embeddings.requires_grad_(True)
    optimizer = torch.optim.AdamW([embeddings], lr=1e-3, weight_decay=0.0)
    tokens = torch.tensor(tokenizer("\n\n".join(pages))["input_ids"])
    for step in range(steps):
        starts = torch.randint(0, len(tokens) - WIDTH, (8,)).tolist()
        batch = torch.stack([tokens[start : start + WIDTH] for start in starts])
        loss = model(batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            print(f"donor, step {step}: {float(loss.detach()):.3f}", flush=True)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def given(project: Path, rule: str) -> Path:
    """Write the base with the donor's tokenizer, and return the run's directory."""
    recipe = project / "recipes" / "given.yaml"
    recipe.write_text(f"version: 1\nbase: base\nbricks: {{donor: donor}}\ntokenizer: {{source: donor, {rule}}}\n", "utf-8")
    command = [sys.executable, "-m", "workbench", "run", str(recipe), "--json"]
    document = json.loads(subprocess.run(command, cwd=project, check=True, capture_output=True, text=True).stdout)
    return project.resolve() / str(document["run"])


def carried(run: Path) -> dict[str, Any]:
    """Return what the run's record says about its rows."""
    record = json.loads((run / "run.json").read_text("utf-8"))["tokenizer"]
    return {"lacking": record["lacking"].get("base", 0), **{key: record[key] for key in ("shared", "residual") if key in record}}


@torch.no_grad()
def scored(place: Path, pages: list[str]) -> dict[str, float]:
    """Return the bits per byte of some pages, each read on its own in rows of some tokens."""
    model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(place)
    nats, count, size = 0.0, 0, 0
    for page in pages:
        tokens = torch.tensor(tokenizer(page)["input_ids"])
        size += len(page.encode())
        for start in range(0, len(tokens), WIDTH):
            # The first token of a row is predicted from a start token, as in the other rows.
            row = torch.cat((torch.tensor([tokenizer.bos_token_id]), tokens[start : start + WIDTH]))[None]
            nats += float(torch.nn.functional.cross_entropy(model(row).logits[0, :-1], row[0, 1:], reduction="sum"))
            count += row.shape[1] - 1
    return {"bits_per_byte": nats / math.log(2) / size, "tokens_scored": count}


if __name__ == "__main__":
    main()
