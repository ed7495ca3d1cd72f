"""Steer a model towards capital letters and towards bad reviews, at several strengths, and measure what it gains and what it costs.

    python benchmarks/steer.py
    python benchmarks/steer.py --layer 15 --strengths 0 1 2 4

For each strength c, `edit: steer` adds c times the difference of the mean states after two lists of prompts to one layer. The share of
capital letters, or of bad among good and bad words, is that of greedy continuations of prompts that are in no list. `retention` is
scored beside it, and with the adapter `add` merged in the same recipe. The results are kept in benchmarks/results/steer.json.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from record import parser_of, write_results

HERE = Path(__file__).parent
SENTENCES = (
    "The train to the coast leaves at noon",
    "My sister bought a green bicycle",
    "The library closes early on Friday",
    "We cooked rice with beans and onions",
    "The river was high after the storm",
    "He painted the old fence white",
    "Our teacher told us about the moon",
    "They moved the piano into the hall",
    "The farmer sold his apples in town",
    "A small boat crossed the lake",
    "The bakery opens before sunrise",
    "She wrote a letter to her uncle",
)
THINGS = ("film", "book", "meal", "hotel", "concert", "game", "phone", "play", "trip", "course", "café", "show")
PROMPTS = (
    "The weather in the mountains",
    "Yesterday my brother",
    "The new school in our street",
    "A good way to learn",
    "The king and his",
    "In the middle of the night",
    "The recipe needs",
    "When the bus arrived",
    "Most people in the village",
    "The dog behind the house",
)
REVIEWED = ("restaurant", "museum", "album", "novel", "laptop", "holiday", "series", "jacket", "lecture", "park")
GOOD = frozenset(
    [
        "good",
        "great",
        "best",
        "wonderful",
        "excellent",
        "beautiful",
        "love",
        "loved",
        "amazing",
        "nice",
        "perfect",
        "happy",
        "enjoyed",
        "fantastic",
        "delicious",
    ]
)
BAD = frozenset(
    [
        "bad",
        "worst",
        "terrible",
        "awful",
        "boring",
        "poor",
        "hate",
        "hated",
        "disappointing",
        "ugly",
        "sad",
        "horrible",
        "waste",
        "wrong",
        "disappointed",
    ]
)
LISTS = {
    "capitals": ([s.upper() for s in SENTENCES], [s.lower() for s in SENTENCES]),
    "sentiment": ([f"The {t} was terrible, I hated it" for t in THINGS], [f"The {t} was wonderful, I loved it" for t in THINGS]),
}
ASKED = {"capitals": PROMPTS, "sentiment": [f"My opinion of the {t}: it was" for t in REVIEWED]}


def main() -> None:
    """Measure every direction and strength, and write the results file."""
    parser = parser_of(__doc__, "steer")
    parser.add_argument("--base", type=Path, default=HERE.parent / "bricks" / "starter" / "base", help="a llama model")
    parser.add_argument("--layer", type=int, default=12, help="layer after which the direction is added")
    parser.add_argument("--strengths", type=float, nargs="+", default=[0, 0.5, 0.75, 1, 1.5, 2])
    parser.add_argument("--tokens", type=int, default=24, help="length of a continuation")
    parser.add_argument("--limit", type=int, help="score so many items of retention")
    parser.add_argument("--no-retention", action="store_false", dest="retention", help="do not score retention")
    options = parser.parse_args()
    started, rows = time.time(), []
    with tempfile.TemporaryDirectory() as folder:
        project = lay_out(Path(folder), options.base)
        for kind in LISTS:
            for strength in options.strengths:
                recipe = written(project, kind, options.layer, strength)
                row = {"direction": kind, "strength": strength, **generated(project, recipe, kind, options.tokens)}
                if options.retention:
                    row["retention"] = retention(project, recipe, options.limit)
                print(row, flush=True)
                rows.append(row)
        recipe = written(project, "capitals", options.layer, 0.75, adapter=True)
        row = {"direction": "capitals", "strength": 0.75, "with": "add", **generated(project, recipe, "capitals", options.tokens)}
        if options.retention:
            row["retention"] = retention(project, recipe, options.limit)
        rows.append(row)
    document = {"seconds": round(time.time() - started), "layer": options.layer, "tokens": options.tokens, "rows": rows}
    write_results(options.out, document)


def lay_out(project: Path, base: Path) -> Path:
    """Return a project with the lists of prompts, the base, its bricks and the suites."""
    (project / "recipes").mkdir()
    for name, target in (("base", base), ("evals", HERE.parent / "evals"), ("bricks", HERE.parent / "bricks")):
        (project / name).symlink_to(target.resolve())
    for kind, lists in LISTS.items():
        for side, texts in zip(("positive", "negative"), lists, strict=True):
            lines = "".join(json.dumps({"prompt": text}) + "\n" for text in texts)
            (project / f"{kind}-{side}.jsonl").write_text(lines, "utf-8")
    return project


def written(project: Path, kind: str, layer: int, strength: float, adapter: bool = False) -> Path:
    """Write the recipe of one direction and strength, and return its file."""
    lora = "bricks: {add: bricks/add}\n" if adapter else ""
    merge = "  - {merge: task_arithmetic, bricks: {add: 1}}\n" if adapter else ""
    step = f"{{edit: steer, positive: {kind}-positive.jsonl, negative: {kind}-negative.jsonl, layers: [{layer}], strength: {strength}}}"
    text = f"version: 1\nbase: base\n{lora}steps:\n{merge}  - {{grow: bias}}\n  - {step}\neval: [retention]\n"
    file = project / "recipes" / f"{kind}-{strength:g}{'-add' if adapter else ''}.yaml"
    file.write_text(text, "utf-8")
    return file


def generated(project: Path, recipe: Path, kind: str, tokens: int) -> dict[str, Any]:
    """Write the model, continue the prompts greedily, and return the share that the direction should raise, with two texts."""
    import torch

    import workbench

    torch.set_num_threads(1)
    out = project / json.loads(called(project, "run", str(recipe), "--json"))["model"]
    model, tokenizer = workbench.load(out), workbench.load_tokenizer(out)
    texts = []
    for prompt in ASKED[kind]:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            new = model.generate(ids, max_new_tokens=tokens, do_sample=False)[0, ids.shape[1] :]
        texts.append(tokenizer.decode(new, skip_special_tokens=True))
    words = [word.strip(".,!?;:\"'").lower() for text in texts for word in text.split()]
    letters = [letter for text in texts for letter in text if letter.isalpha()]
    good, bad = (sum(word in group for word in words) for group in (GOOD, BAD))
    shares = {
        "capitals": sum(letter.isupper() for letter in letters) / max(len(letters), 1),
        "sentiment": bad / (good + bad) if good + bad else None,
    }
    return {"share": shares[kind], "different_words": len(set(words)) / max(len(words), 1), "texts": texts[:2]}


def retention(project: Path, recipe: Path, limit: int | None) -> dict[str, Any]:
    """Return the scores of one recipe on the tasks of `retention`."""
    options = ["--limit", str(limit)] if limit else []
    document = json.loads(called(project, "eval", str(recipe), "--no-controls", "--json", *options))
    (configuration,) = document["configurations"]
    return {task: {k: v for k, v in scores.items() if k in ("acc", "n")} for task, scores in configuration["tasks"].items()}


def called(project: Path, *arguments: str) -> str:
    """Return what a command prints."""
    command = [sys.executable, "-m", "workbench", *arguments]
    return subprocess.run(command, cwd=project, check=True, stdout=subprocess.PIPE, text=True).stdout


if __name__ == "__main__":
    main()
