"""Silence libraries and fix seeds while lm-eval runs, and restore everything afterwards."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np

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
