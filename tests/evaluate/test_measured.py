"""Scoring measures the length of answers, the rate of generated text and the peak of memory; none of it changes keys or digests."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from worlds.local_tasks import A, plan_of, tiny

from workbench.evaluate import evaluate, score
from workbench.evaluate.measured import CUDA, RESIDENT, SINCE_START, AnswerClock, PeakMemory, measured, token_count
from workbench.scores.documents import Measured
from workbench.scores.store import ScoreStore

MB = 1_000_000


def test_tokens_of_answers_are_those_of_the_stored_texts(tasks_dir: Path, tokenizer: Any) -> None:
    scores, rows = score(plan_of(tasks_dir, tokenizer), A, tiny())
    texts = [row["response"] for row in rows["copy"]]
    assert any(texts)
    copy, pick = scores.tasks["copy"], scores.tasks["pick"]
    assert copy.answers == len(texts) == 24
    assert copy.answer_tokens == sum(len(tokenizer(text)["input_ids"]) for text in texts)
    assert copy.measured is not None
    assert copy.answer_tokens is not None
    assert copy.measured.tokens_per_second is not None
    assert copy.measured.tokens_per_second > copy.answer_tokens / (copy.seconds or 0.0)  # the task's time has more in it
    assert copy.measured.peak_bytes is not None
    assert copy.measured.peak_bytes > 50 * MB  # torch alone is larger
    assert (pick.answers, pick.answer_tokens, pick.measured and pick.measured.tokens_per_second) == (None, None, None)


def test_measurements_change_no_key_and_no_digest(tasks_dir: Path, tokenizer: Any, tmp_path: Path) -> None:
    plan = plan_of(tasks_dir, tokenizer)
    stored = [evaluate(plan, ScoreStore(tmp_path / name), A, tiny) for name in ("one", "two")]
    assert stored[0].key == stored[1].key == A.key(plan)
    assert (stored[0].rows, stored[0].items) == (stored[1].rows, stored[1].items)
    assert stored[0].plan == stored[1].plan


def test_an_evaluation_that_goes_on_says_so(tasks_dir: Path, tokenizer: Any, tmp_path: Path) -> None:
    plan, store = plan_of(tasks_dir, tokenizer), ScoreStore(tmp_path / "scores")

    def stop(task: str, done: int, _total: int) -> None:
        if task == "copy" and done >= 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(plan, store, A, tiny, progress=stop)
    scores = evaluate(plan, store, A, tiny)
    found = {task: about.measured.resumed for task, about in scores.tasks.items() if about.measured}
    assert found == {"copy": True, "pick": False}
    assert scores.tasks["copy"].answers == 24


def test_the_clock_counts_generating_only(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [7.0]
    monkeypatch.setattr("workbench.evaluate.measured.time.perf_counter", lambda: now[0])

    def work() -> Iterator[dict[int, Any]]:
        for i in range(3):
            now[0] += 2
            yield {i: ["a b", "c"] if i == 2 else "a"}

    clock = AnswerClock()
    for _ in clock.timed(work()):
        now[0] += 100
    assert clock.texts == ["a", "a", "a b", "c"]
    assert clock.seconds == 6


def test_the_rate_is_tokens_by_seconds(tokenizer: Any) -> None:
    clock = AnswerClock()
    clock.texts, clock.seconds = ["w1 w2 w3", "w4"], 0.5
    found = measured(tokenizer, clock, PeakMemory(None), False)
    count = sum(len(tokenizer(text)["input_ids"]) for text in clock.texts)
    assert token_count(tokenizer, clock.texts) == count > 0
    assert found == Measured(tokens_per_second=2.0 * count)


PEAK = """
import json
import numpy as np
import torch
from workbench.evaluate.measured import PeakMemory

large = np.ones(200_000_000, np.uint8)
del large
memory = PeakMemory(torch.device("cpu"))
first = memory.read()
small = np.ones(80_000_000, np.uint8)
del small
print(json.dumps([memory.reset, first, memory.read()]))
"""


def test_the_peak_is_that_of_the_time_since_it_began() -> None:
    """A large array that is gone does not count, one that was there in between does; in a process of its own, which holds little else."""
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    reset, first, second = json.loads(done.stdout)
    if not reset:
        pytest.skip("the system does not set the peak back")
    assert first[1] == second[1] == RESIDENT
    assert 70 * MB < second[0] - first[0] < 120 * MB


SMALL = """
import json
import torch
from workbench.evaluate.measured import PeakMemory
from workbench.weights.device import _keep_freed_memory
_keep_freed_memory()
before = PeakMemory(torch.device("cpu"))
start = before.read()[0]
freed = [torch.ones(1 << 18) for _ in range(400)]
above = torch.ones(1 << 18)  # glibc returns what is free above the last block by itself
del freed
after = PeakMemory(torch.device("cpu"))
print(json.dumps([after.reset, start, after.read()[0]]))
"""


def test_freed_memory_that_the_process_keeps_does_not_count() -> None:
    """400 MB in tensors of 1 MB, which glibc keeps after a merge: they are those of a configuration before, as the copy of a check is."""
    done = subprocess.run([sys.executable, "-c", SMALL], capture_output=True, text=True, check=True)
    reset, start, after = json.loads(done.stdout)
    if not reset:
        pytest.skip("the peak cannot be set back here")
    assert after < start + 100 * MB


def test_where_the_peak_cannot_be_set_back_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workbench.evaluate.measured._RESET", Path("/proc/self/no-such-file"))
    found = PeakMemory(torch.device("cpu")).read()
    assert found is not None
    assert found[1] == SINCE_START
    assert found[0] > 50 * MB
    assert PeakMemory(None).read() is None


def test_cuda_counts_what_torch_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    reset: list[Any] = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset.append)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _device: 7 * MB)
    device = torch.device("cuda", 1)
    assert PeakMemory(device).read() == (7 * MB, CUDA)
    assert reset == [device]
