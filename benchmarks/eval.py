"""Compare scoring on the starter base with lm-eval, at the same dtype and batch size, in CPU seconds of one thread.

    python benchmarks/eval.py
    python benchmarks/eval.py --items 40 --dtype float32

tasks are generated here: `long`, a passage of about 140 tokens with five choices of 7 to 11; `letters`, five examples and a question with
four lettered choices; `story`, running text.

1. In process: lm-eval's HFLM with exact settings (logits_cache=False), with its default (logits_cache=True), and the scorers
   `packed` and `prefix`, on the same tokenized requests. `token ratio` is tokens that HFLM forwards over tokens that the scorer forwards,
   padding included; `time ratio` the same of CPU seconds; `bare` a forward pass over the scorer's own tokens after the same
   cached prefix, with the model's own causal mask and the output head on as many positions.
2. Texts: sums with and without five worked ones before them, written by HFLM and by `greedy` with the same batch size; `equal` are texts of
   HFLM at that batch size, and `hflm_equal` those that HFLM itself gives again for one prompt at a time.
3. Whole processes: `workbench eval` of five and of nine configurations, which it composes, against as many calls of `lm_eval` on written
   checkpoints, children included. Two of those calls are measured, and their mean counts for each.

Results go to benchmarks/results/eval.json.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from record import write_results

from workbench.evaluate import build_plan
from workbench.evaluate.greedy import Writer, batches, prompt_of
from workbench.evaluate.hflm import SafeHFLM
from workbench.evaluate.measured import quiet
from workbench.evaluate.packed import Forward, PackedLayout, bounds_of, lay_out, shared_start
from workbench.evaluate.scorer import Scorer
from workbench.scores.store import Configuration
from workbench.scores.suite import Suite

PROJECT = Path(__file__).resolve().parents[1]
BASE = PROJECT / "bricks" / "starter" / "base"
RECIPES = ["starter-task-arithmetic", "starter-ties", "starter-dare", "starter-average"]
WORDS = [
    "harbour",
    "lamp",
    "winter",
    "stone",
    "river",
    "market",
    "letter",
    "garden",
    "bridge",
    "window",
    "captain",
    "morning",
    "paper",
    "silver",
    "mountain",
    "road",
    "teacher",
    "village",
    "bread",
    "engine",
    "island",
    "kitchen",
    "forest",
    "music",
    "station",
    "doctor",
    "coat",
    "summer",
    "field",
    "corner",
]
HEAD = "custom_dataset: !function localdata.jsonl\ntest_split: test\nmetadata: {version: 1.0}\n"
CHOICE = "output_type: multiple_choice\ndoc_to_text: '{{prompt}}'\ndoc_to_choice: choices\ndoc_to_target: gold\nmetric_list: [{metric: acc}]\n"
TASKS = {
    "long": HEAD + "task: long\ndataset_kwargs: {data_files: {test: long.jsonl}}\nnum_fewshot: 0\n" + CHOICE,
    "letters": HEAD + "task: letters\ndataset_kwargs: {data_files: {test: letters.jsonl, shots: shots.jsonl}}\n"
    "fewshot_split: shots\nnum_fewshot: 5\nfewshot_config: {sampler: first_n}\n" + CHOICE,
    "story": HEAD + "task: story\ndataset_kwargs: {data_files: {test: long.jsonl}}\noutput_type: loglikelihood_rolling\n"
    "doc_to_text: ''\ndoc_to_target: '{{prompt}}'\n",
}


def sentence(seed: int, words: int) -> str:
    """Return words that depend only on the seed."""
    return " ".join(WORDS[(seed * 7919 + i * i * 31 + i * 17) % len(WORDS)] for i in range(words))


def write_tasks(folder: Path, items: int) -> None:
    """Write task files and their data."""
    folder.mkdir(parents=True)
    shutil.copyfile(PROJECT / "evals" / "tasks" / "localdata.py", folder / "localdata.py")
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(text)
    rows = {
        "long": [
            {
                "prompt": f"Passage {i}. {sentence(i, 110 + i % 9)}.\nWhat happened next?",
                "gold": i % 5,
                "choices": [sentence(100 * i + k, 5 + (i + k) % 4) for k in range(5)],
            }
            for i in range(items)
        ],
        "letters": [_lettered(i) for i in range(items)],
        "shots": [_lettered(10_000 + i) for i in range(5)],
    }
    for name, docs in rows.items():
        lines = (json.dumps({"id": f"{name}-{i}", "cluster": f"c{i % 20}", **row}) + "\n" for i, row in enumerate(docs))
        (folder / f"{name}.jsonl").write_text("".join(lines))


def _lettered(i: int) -> dict[str, Any]:
    options = "\n".join(f"{letter}. {sentence(5 * i + k, 4)}" for k, letter in enumerate("ABCD"))
    return {"prompt": f"Question: {sentence(3 * i, 12)}?\n{options}\nAnswer:", "choices": list("ABCD"), "gold": i % 4}


def cpu(work: Callable[[], Any]) -> tuple[float, Any]:
    """Return the CPU seconds that a call takes in this process, and its result."""
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


def in_process(tasks: Path, dtype: str, batch_size: int, repeats: int) -> dict[str, Any]:
    """Measure HFLM and the scorers on the same requests in turn, and return the best of some repeats each."""
    from transformers import AutoModelForCausalLM

    with quiet():
        model = AutoModelForCausalLM.from_pretrained(BASE, dtype=getattr(torch, dtype)).eval()
    suite = Suite(suite="bench", tasks=tuple(TASKS))
    plan = build_plan(suite, BASE, tasks_dir=tasks, dtype=dtype, batch_size=batch_size)
    scorer = Scorer(plan, Configuration("0" * 32, "base"), model)
    check = scorer.check()
    assert check is not None
    results: dict[str, Any] = {"check": check.model_dump()}
    forward = Forward(model)
    bounds = bounds_of(scorer.lm)
    for name, requests in scorer.requests.items():
        pairs = requests.pairs
        shared = shared_start(pairs, bounds.max_length)
        layouts = {"packed": lay_out(pairs, bounds), **({"prefix": lay_out(pairs, bounds, shared)} if shared else {})}
        arms: dict[str, Callable[[], Any]] = {
            "hflm": partial(scorer.lm.referee, pairs),
            "hflm_default": partial(_default, scorer, pairs),
        }
        for kind, layout in layouts.items():
            arms[kind] = partial(_run, forward, layout)
            arms[f"{kind}_bare"] = partial(_bare, forward, layout)
        tokens = {arm: _tokens(model, work) for arm, work in arms.items()}
        seconds: dict[str, list[float]] = {arm: [] for arm in arms}
        for _ in range(repeats):
            for arm, work in arms.items():
                seconds[arm].append(cpu(work)[0])
        best = {arm: min(values) for arm, values in seconds.items()}
        results[name] = {
            "requests": len(pairs),
            "tokens": tokens,
            "seconds": {arm: round(value, 3) for arm, value in best.items()},
            "spread": {arm: round(max(values) / min(values), 3) for arm, values in seconds.items()},
            **{
                kind: {
                    "token_ratio": round(tokens["hflm"] / tokens[kind], 2),
                    "time_ratio": round(best["hflm"] / best[kind], 2),
                    "time_ratio_default": round(best["hflm_default"] / best[kind], 2),
                    "over_bare": round(best[kind] / best[f"{kind}_bare"], 3),
                }
                for kind in layouts
            },
        }
        print(name, json.dumps(results[name]), flush=True)
    return results


def _run(forward: Forward, layout: PackedLayout) -> None:
    forward._prefix = ([], [])  # the pass over the prefix counts every time
    for prefix, rows in layout.batches():
        forward.batch(prefix, rows)


def texts(dtype: str, batch_size: int, items: int) -> dict[str, Any]:
    """Measure HFLM and `greedy` on the same prompts in turn, without and with examples before the question."""
    from lm_eval.api.instance import Instance
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with quiet():
        model = AutoModelForCausalLM.from_pretrained(BASE, dtype=getattr(torch, dtype)).eval()
    lm = SafeHFLM(model, tokenizer=AutoTokenizer.from_pretrained(BASE), batch_size=batch_size)
    settings = {"until": ["\n"], "max_gen_toks": 24}
    examples = "".join(f"Question: What is {17 * i + 11} plus {29 * i + 5}?\nAnswer: {46 * i + 16}\n\n" for i in range(5))
    results: dict[str, Any] = {}
    for name, before in (("no examples", ""), ("five examples", examples)):
        contexts = [f"{before}Question: What is {97 * i % 900} plus {53 * i % 700}?\nAnswer:" for i in range(1, items + 1)]
        requests = [Instance(request_type="generate_until", doc={}, arguments=(c, settings), idx=0) for c in contexts]

        def written(contexts: list[str] = contexts) -> list[str]:
            prompts = {i: prompt_of(lm, context, settings) for i, context in enumerate(contexts)}
            found: dict[int, str] = {}
            writer = Writer(lm, Forward(model))
            for shared, batch in batches(lm, prompts):
                found |= dict(zip(batch, writer.write(shared, [prompts[i] for i in batch]), strict=True))
            return [found[i] for i in range(len(contexts))]

        with quiet():
            ours_seconds, ours = cpu(written)
            hflm_seconds, hflm = cpu(partial(lm.generate_until, requests, disable_tqdm=True))
            single = [lm.written(p.tokens, p.stops, p.most) for p in (prompt_of(lm, c, settings) for c in contexts)]
        results[name] = {
            "texts": len(contexts),
            "seconds": {"hflm": round(hflm_seconds, 2), "greedy": round(ours_seconds, 2)},
            "time_ratio": round(hflm_seconds / ours_seconds, 2),
            "equal": sum(a == b for a, b in zip(ours, hflm, strict=True)),
            "hflm_equal": sum(a == b for a, b in zip(single, hflm, strict=True)),
        }
        print(name, json.dumps(results[name]), flush=True)
    return results


def _default(scorer: Scorer, pairs: Any) -> None:
    scorer.lm.logits_cache = True
    try:
        scorer.lm.referee(pairs)
    finally:
        scorer.lm.logits_cache = False


@torch.inference_mode()
def _bare(forward: Forward, layout: PackedLayout) -> None:
    """Forward the same tokens in the same batches after the same prefix, with the model's own masks."""
    model = forward.model
    forward._prefix = ([], [])
    for prefix, rows in layout.batches():
        width = max(len(row.tokens) for row in rows)
        ids = torch.tensor([row.tokens + [0] * (width - len(row.tokens)) for row in rows])
        cache = {forward.cache_name: forward.cache(prefix, len(rows))} if prefix else {}
        hidden = model.base_model(input_ids=ids, use_cache=bool(prefix), **cache)[0]
        forward.head(hidden.reshape(-1, hidden.shape[-1])[: sum(row.predicted for row in rows)])


def _tokens(model: Any, work: Callable[[], Any]) -> int:
    """Return the number of tokens that a call forwards, including padding."""
    count = 0

    def see(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        nonlocal count
        count += kwargs["input_ids"].numel() if "input_ids" in kwargs else _args[0].numel()

    hook = model.base_model.register_forward_pre_hook(see, with_kwargs=True)
    try:
        work()
    finally:
        hook.remove()
    return count


def new_project(project: Path, items: int) -> None:
    """Lay out a project with the starter's bricks and recipes, the tasks, and no scores."""
    for name in ("recipes", "bricks"):
        shutil.copytree(PROJECT / name, project / name, ignore=shutil.ignore_patterns("base", "checkpoint"))
    (project / "bricks" / "starter").mkdir(exist_ok=True)
    (project / "bricks" / "starter" / "base").symlink_to(BASE)
    write_tasks(project / "evals" / "tasks", items)
    (project / "evals" / "suites").mkdir()
    (project / "evals" / "suites" / "bench.yaml").write_text("suite: bench\ntasks: [long, letters]\ncluster: cluster\n")


def call(project: Path, *words: str) -> tuple[float, str]:
    """Return the CPU seconds of a command on one thread, with its children, and what it prints."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(PROJECT)}
    environment["WORKBENCH_TRUST_PROJECT_CODE"] = "1"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", *words], cwd=project, env=environment, check=True, capture_output=True, text=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.stdout


def whole_processes(folder: Path, items: int, batch_size: int) -> list[dict[str, Any]]:
    """Score five and nine configurations with one `workbench eval` each in a new project, and two with one `lm_eval` each."""
    rows: list[dict[str, Any]] = []
    batch = ("--batch-size", str(batch_size))
    for count in (1, len(RECIPES)):
        project = folder / f"project-{count}"
        new_project(project, items)
        command = ("workbench", "eval", *(f"recipes/{name}.yaml" for name in RECIPES[:count]), "--suite", "bench", *batch)
        seconds, _ = call(project, *command)
        again, text = call(project, *command, "--json")
        rows.append(
            {"configurations": len(json.loads(text)["configurations"]), "seconds": round(seconds, 1), "again": round(again, 1)}
        )
        print(json.dumps(rows[-1]), flush=True)
    peers = []
    for recipe in RECIPES[:2]:
        model = json.loads(call(project, "workbench", "run", f"recipes/{recipe}.yaml", "--json")[1])["model"]
        arguments = f"pretrained={model},dtype=bfloat16,logits_cache=False,softmax_dtype=float32"
        peer = ("lm_eval", "--model", "hf", "--model_args", arguments, "--include_path", "evals/tasks", "--tasks", "long,letters")
        peers.append(call(project, *peer, "--batch_size", str(batch_size), "--device", "cpu")[0])
        print(recipe, peers[-1], flush=True)
    mean = sum(peers) / len(peers)
    for row in rows:
        row["lm_eval_calls"] = [round(value, 1) for value in peers]
        row["lm_eval_seconds"] = round(mean * row["configurations"], 1)
        row["ratio"] = round(mean * row["configurations"] / row["seconds"], 2)
    return rows


def main() -> None:
    """Run both parts and write the results file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=20, help="items per task")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--no-processes", action="store_true", help="run only the first part")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_tasks(folder / "tasks", options.items)
        document = {
            "items": options.items,
            "batch_size": options.batch_size,
            "dtype": options.dtype,
            "in_process": in_process(folder / "tasks", options.dtype, options.batch_size, options.repeats),
            "texts": {dtype: texts(dtype, 32, 64) for dtype in ("bfloat16", "float32")},
        }
        if not options.no_processes:
            document["processes"] = whole_processes(folder, options.items, options.batch_size)
    write_results(Path(__file__).parent / "results" / "eval.json", document)


if __name__ == "__main__":
    main()
