"""Process-wide settings of a training, restored afterwards: seeds, threads, deterministic kernels, verbosity of libraries."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

THREADS = 1


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress progress bars, advice and deprecation warnings of transformers, but not errors."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@contextlib.contextmanager
def reproducible(seed: int) -> Iterator[None]:
    """Seed all random generators and use deterministic kernels on one thread; restore everything afterwards.

    One thread makes the result independent of the number of cores, because sums over several threads round differently.
    """
    import random

    import numpy as np
    import torch
    from transformers import set_seed

    before, threads = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    torch_state, numpy_state, python_state = torch.get_rng_state(), np.random.get_state(), random.getstate()
    set_seed(seed)
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(before)
        torch.set_rng_state(torch_state)
        np.random.set_state(numpy_state)
        random.setstate(python_state)
