"""Compare `workbench brick train` with PEFT and transformers' Trainer on the same rows, in CPU seconds of whole processes on one thread.

    python benchmarks/train.py

The peer is the script that PEFT's documentation teaches: labels of -100 on the prompt, rows padded to the longest of the batch, sdpa
attention, bfloat16 autocast. Both train rank 8 on all linear layers of the starter base, in batches of 16. `prompts` are the rows of the
brick `add`, whose completions are learned; of `texts`, rows of 10 to 50 words, every token is. Each arm runs twice, for a few steps and
for more: seconds a step are the difference, and `start` is what remains. Arms run in turn; the least of `--repeats` counts.

Results go to benchmarks/results/train.json.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from record import parser_of, write_results

PROJECT = Path(__file__).resolve().parents[1]
BASE = PROJECT / "bricks" / "starter" / "base"
FEW = 4
BATCH = 16
PEER = """
import json, sys, torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments
base, data, out, steps, batch = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
tokenizer = AutoTokenizer.from_pretrained(base)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
rows = []
for line in open(data):
    row = json.loads(line)
    prompt = tokenizer(row["prompt"])["input_ids"] if "prompt" in row else []
    text = tokenizer(" " + row["completion"] if "prompt" in row else row["text"])["input_ids"] + [tokenizer.eos_token_id]
    rows.append({"input_ids": prompt + text, "labels": [-100] * len(prompt) + text})
arguments = TrainingArguments(output_dir=out, max_steps=steps, per_device_train_batch_size=batch, learning_rate=1e-3, warmup_steps=2,
    lr_scheduler_type="cosine", bf16=True, use_cpu=True, save_strategy="no", report_to=[], disable_tqdm=True)
Trainer(model=model, args=arguments, train_dataset=rows, data_collator=DataCollatorForSeq2Seq(tokenizer)).train()
model.save_pretrained(out)
"""


def write_rows(path: Path, kind: str, count: int = 512) -> None:
    """Write rows of one kind: those of the brick `add`, or texts of 10 to 50 words."""
    if kind == "prompts":
        shutil.copyfile(PROJECT / "bricks" / "add" / "train.jsonl", path)
        return
    chance = random.Random(0)
    words = sorted({word for word in (PROJECT / "README.md").read_text("utf-8").split() if word.isalpha()})
    texts = (" ".join(chance.choices(words, k=chance.randint(10, 50))) for _ in range(count))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")


def seconds(command: list[str]) -> float:
    """Return the CPU seconds of one process on one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{command[:4]} failed:\n{done.stderr[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def ours(folder: Path, data: Path, steps: int) -> float:
    """Train a new brick with the command, without scoring it."""
    brick = folder / "bricks" / "new"
    shutil.rmtree(brick, ignore_errors=True)
    brick.mkdir(parents=True)
    settings = {"base": str(BASE), "data": str(data), "steps": steps, "batch_size": BATCH, "warmup": 2, "max_length": 512}
    (brick / "train.yaml").write_text(json.dumps(settings), "utf-8")
    return seconds([sys.executable, "-m", "workbench", "brick", "train", str(brick), "--no-score", "--device", "cpu"])


def theirs(folder: Path, data: Path, steps: int) -> float:
    """Train with PEFT and the Trainer."""
    return seconds([sys.executable, "-c", PEER, str(BASE), str(data), str(folder / "peer"), str(steps), str(BATCH)])


def compare(folder: Path, kind: str, steps: int, repeats: int) -> dict[str, object]:
    """Measure both arms on one kind of rows."""
    data = folder / f"{kind}.jsonl"
    write_rows(data, kind)
    arms = {"workbench": ours, "peft": theirs}
    found = {name: {count: float("inf") for count in (FEW, FEW + steps)} for name in arms}
    for _ in range(repeats):
        for count in (FEW, FEW + steps):
            for name, work in arms.items():
                found[name][count] = min(found[name][count], work(folder, data, count))
    step = {name: (both[FEW + steps] - both[FEW]) / steps for name, both in found.items()}
    return {
        "rows": kind,
        "steps": steps,
        "seconds_a_step": {name: round(value, 3) for name, value in step.items()},
        "start": {name: round(found[name][FEW] - FEW * step[name], 2) for name in arms},
        "ratio": round(step["peft"] / step["workbench"], 2),
    }


def main() -> None:
    """Measure and write the results file."""
    parser = parser_of(__doc__, "train")
    parser.add_argument("--steps", type=int, default=8, help="steps that are measured")
    parser.add_argument("--repeats", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "recipes").mkdir()
        results = []
        for kind in ("prompts", "texts"):
            results.append(compare(folder, kind, options.steps, options.repeats))
            print(json.dumps(results[-1]), flush=True)
    write_results(options.out, {"batch_size": BATCH, "results": results})


if __name__ == "__main__":
    main()
