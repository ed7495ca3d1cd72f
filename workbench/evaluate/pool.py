"""Workers on a Ray cluster that keep models in memory and answer one call at a time. Only this file imports ray."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from workbench.errors import WorkbenchError
from workbench.lazy import torch
from workbench.trust import VARIABLE

LOSSES = 3
"""Number of workers that may be lost during one call before the call counts as failed."""


@contextmanager
def cluster() -> Iterator[Any]:
    """Yield ray, connected to the cluster of RAY_ADDRESS, or to a new one on this machine; disconnect afterwards if this call connected it.

    Raises:
        WorkbenchError: If ray is not installed.
    """
    try:
        import ray
    except ImportError:
        raise WorkbenchError("--engine ray: ray is not installed", "pip install 'brick-workbench[cluster]'") from None
    started_here = not ray.is_initialized()
    if started_here:
        ray.init(log_to_driver=False, logging_level=40, include_dashboard=False)
    try:
        yield ray
    finally:
        if started_here:
            ray.shutdown()


class Pool:
    """The idle workers, and the busy workers with their tasks. A worker that is lost is replaced.

    Args:
        ray: The connected module, as `cluster` yields it.
        worker: Class of the workers, with a method `score`.
        arguments: Arguments of its constructor.
        count: Number of workers; default: one per GPU of the cluster, or one per two CPUs.
        trusted: Workers may load the project's method files, whatever the settings on their node say.

    Raises:
        WorkbenchError: If the cluster has too few resources.
    """

    def __init__(
        self, ray: Any, worker: type, arguments: tuple[Any, ...], count: int | None = None, trusted: bool = False
    ) -> None:
        self._ray, self._hosted = ray, (worker, arguments, Path.cwd(), trusted)
        resources = ray.cluster_resources()
        gpus, cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 0))
        count = count or gpus or max(1, cpus // 2)
        self._threads = 1 if gpus else max(1, cpus // count)
        if count > max(gpus, cpus):
            raise WorkbenchError(
                f"--workers {count}: the cluster has {cpus} CPUs and {gpus} GPUs", f"--workers {max(gpus, cpus, 1)}"
            )
        self._needs = {"num_gpus": 1} if gpus else {"num_cpus": self._threads}
        self._idle = [self._new() for _ in range(count)]
        self._busy: dict[Any, tuple[Any, Any]] = {}

    def _new(self) -> Any:
        return self._ray.remote(_Hosted).options(**self._needs).remote(self._threads, *self._hosted)

    @property
    def idle(self) -> bool:
        """True if a worker is idle."""
        return bool(self._idle)

    @property
    def busy(self) -> bool:
        """True if a worker is busy."""
        return bool(self._busy)

    def submit(self, ticket: Any, *arguments: Any) -> None:
        """Call `score` of an idle worker.

        Args:
            ticket: Value that `next` returns with the result.
            arguments: Arguments of the call.
        """
        worker = self._idle.pop()
        self._busy[worker.score.remote(*arguments)] = (worker, ticket)

    def next(self) -> tuple[Any, Any, bool]:
        """Wait for the next result.

        Returns:
            The ticket, the result, and True if there is no result because the worker was lost.

        Raises:
            WorkbenchError: If a worker failed.
        """
        (done, *_), _ = self._ray.wait(list(self._busy), num_returns=1)
        worker, ticket = self._busy.pop(done)
        try:
            result = self._ray.get(done)
        except self._ray.exceptions.RayActorError:
            self._idle.append(self._new())
            return ticket, None, True
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, WorkbenchError):
                raise error.cause from error
            raise WorkbenchError(
                f"a worker of the cluster failed: {error.cause}", "Set WORKBENCH_DEBUG=1 to see the traceback."
            ) from error
        self._idle.append(worker)
        return ticket, result, False


class _Hosted:
    """A worker in a process of the cluster, in the directory of the process that started it, which all nodes must share."""

    def __init__(self, threads: int, worker: type, arguments: tuple[Any, ...], directory: Path, trusted: bool) -> None:
        os.chdir(directory)
        torch.set_num_threads(threads)
        if trusted:
            os.environ[VARIABLE] = "1"
        self._worker = worker(*arguments)

    def score(self, *arguments: Any) -> Any:
        return self._worker.score(*arguments)
