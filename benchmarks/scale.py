"""What imports, comparisons and reports cost as configurations, items, clusters and runs grow, each with a fitted exponent."""

from __future__ import annotations

import json
import random
from pathlib import Path

DATE = "2026-12-01T10-00-00.000000"
WORDS = [
    "river",
    "stone",
    "amber",
    "cloud",
    "seven",
    "north",
    "engine",
    "paper",
    "violet",
    "harbor",
    "signal",
    "copper",
    "meadow",
    "glass",
    "winter",
    "lantern",
]


def samples(folder: Path, configurations: int, items: int, cluster: int = 1, seed: int = 0) -> None:
    """Write lm-eval's files of made-up configurations on one task of multiple choice: folder/cNNN/{samples,results}_….

    Args:
        folder: The folder.
        configurations: Number of configurations; the first one is weaker than the others.
        items: Number of items.
        cluster: Items a cluster.
        seed: Seed of the questions and answers.
    """
    rng = random.Random(seed)
    asked = []
    for i in range(items):
        choices = [" ".join(rng.choices(WORDS, k=3)) for _ in range(4)]
        gold = rng.randrange(4)
        doc = {
            "id": f"q{i}",
            "cluster": f"k{i // cluster}",
            "question": " ".join(rng.choices(WORDS, k=24)),
            "choices": choices,
            "answer": gold,
        }
        prompt = f"Question: {doc['question']}\nAnswer:"
        requests = {f"gen_args_{n}": {"arg_0": prompt, "arg_1": f" {choice}"} for n, choice in enumerate(choices)}
        head = {"doc_id": i, "doc": doc, "target": str(gold), "arguments": requests}
        asked.append((json.dumps(head)[:-1], gold, rng.gauss(0, 1)))
    for c in range(configurations):
        own, right = random.Random(f"{seed}/{c}"), 0
        run = folder / f"c{c:03d}"
        run.mkdir(parents=True)
        with (run / f"samples_quiz_{DATE}.jsonl").open("w") as file:
            for text, gold, ease in asked:
                hit = ease + own.gauss(0.3 if c else 0.0, 0.5) > 0
                right += hit
                logs = [round(own.uniform(-20, -6), 4) for _ in range(4)]
                logs[gold if hit else (gold + 1) % 4] = round(own.uniform(-5, -1), 4)
                resps = [[[str(x), "False"]] for x in logs]
                acc = float(hit)
                tail = {"resps": resps, "filtered_resps": [r[0] for r in resps], "filter": "none", "metrics": ["acc"], "acc": acc}
                file.write(f"{text}, {json.dumps(tail)[1:]}\n")
        results = {
            "results": {"quiz": {"alias": "quiz", "acc,none": right / items}},
            "configs": {"quiz": {"metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]}},
            "higher_is_better": {"quiz": {"acc": True}},
            "lm_eval_version": "0.4.13",
        }
        (run / f"results_{DATE}.json").write_text(json.dumps(results))
