"""The surroundings of scoring: silence of libraries and fixed seeds while lm-eval runs, rate of generated text, peak of memory."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from workbench.ground.lazy import torch
from workbench.scores.documents import Measured
from workbench.weights.device import peak_bytes, return_freed_memory

SEED = 1234  # lm-eval's default, also for few-shot examples


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence lm-eval, transformers, datasets and their progress bars within the block."""
    import tqdm
    import transformers
    from datasets.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    bar, start = tqdm.tqdm, tqdm.tqdm.__init__

    def silent(self: Any, *args: Any, **kwargs: Any) -> None:  # lm-eval passes disable= itself, so a default has no effect
        start(self, *args, **{**kwargs, "disable": True})

    logger, bars = logging.getLogger("lm_eval"), is_progress_bar_enabled()
    level, verbosity = logger.level, transformers.logging.get_verbosity()
    bar.__init__ = silent
    disable_progress_bar()
    logger.setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        bar.__init__ = start
        logger.setLevel(level)
        transformers.logging.set_verbosity(verbosity)
        if bars:
            enable_progress_bar()


@contextlib.contextmanager
def seeded() -> Iterator[None]:
    """Set lm-eval's default seeds within the block, so that resumed tasks draw the same numbers; restore the state after it."""
    import torch

    python, numpy_state = random.getstate(), np.random.get_state()
    random.seed(0)
    np.random.seed(SEED)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(SEED)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy_state)


CUDA = "CUDA memory that torch allocated"
RESIDENT = "resident memory of the process"
SINCE_START = "resident memory of the process since its start"
_RESET = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


class PeakMemory:
    """The peak of memory since this object was created.

    On CUDA it is what torch has allocated on the device. Elsewhere it is the resident memory of the whole process, whose peak Linux can
    set back (`man 5 proc`, clear_refs). Where it cannot be set back, it is the peak since the process started.

    Args:
        device: The model's torch device; None if the model is in another process.
    """

    def __init__(self, device: Any) -> None:
        self.device, self.reset = device, False
        if device is None:
            return
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return
        return_freed_memory()  # such as that of composing, or of the copy in which a scorer was checked
        try:
            _RESET.write_text("5")
            self.reset = True
        except OSError:
            self.reset = False

    def read(self) -> tuple[int, str] | None:
        """Return the peak in bytes and what it counts; None if the model is in another process."""
        if self.device is None:
            return None
        if self.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self.device)), CUDA
        if self.reset and (peak := _resident()) is not None:
            return peak, RESIDENT
        return peak_bytes(), SINCE_START


class AnswerClock:
    """The texts that this process generates for a task, and the time that it needs.

    Attributes:
        texts: The texts in the order of their batches.
        seconds: Time of generating, without what is done between two batches.
    """

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.seconds = 0.0

    def timed(self, work: Iterator[dict[int, Any]]) -> Iterator[dict[int, Any]]:
        """Yield the batches of texts of `work`, and count them."""
        start = time.perf_counter()
        for answers in work:
            self.seconds += time.perf_counter() - start
            self.texts += texts_of(answers)
            yield answers
            start = time.perf_counter()


def texts_of(answers: Mapping[int, Any]) -> list[str]:
    """Return the texts of answers by request, of which a task with repeats has several each."""
    return [text for answer in answers.values() for text in (answer if isinstance(answer, list) else [answer])]


def token_count(tokenizer: Any, texts: Sequence[str]) -> int:
    """Return the number of tokens of all texts together, without special tokens."""
    return sum(len(tokenizer.encode(text, add_special_tokens=False)) for text in texts)


def measured(tokenizer: Any, clock: AnswerClock, memory: PeakMemory, resumed: bool) -> Measured:
    """Return what was measured while a task was scored.

    Args:
        tokenizer: Tokenizer that counts the tokens of the texts.
        clock: Clock that ran over the generated texts.
        memory: Peak of memory since the task began.
        resumed: True if some answers are those of an interrupted evaluation, so that the task's time leaves them out.
    """
    peak = memory.read()
    rate = token_count(tokenizer, clock.texts) / clock.seconds if clock.texts and clock.seconds > 0 else None
    return Measured(
        tokens_per_second=None if rate is None else round(rate, 2),
        peak_bytes=peak[0] if peak else None,
        peak_of=peak[1] if peak else None,
        resumed=resumed,
    )


def _resident() -> int | None:
    """Return the peak of resident memory in bytes since it was set back, or None if the system does not tell it."""
    try:
        lines = _STATUS.read_text("utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), None)
