"""Two local nodes of a Ray cluster, and a worker that dies at work."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil


@contextmanager
def two_nodes() -> Iterator[Any]:
    """Two nodes of one CPU each, to which this process is connected."""
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=1)
        ray.init(address=cluster.address, log_to_driver=False, logging_level=40)
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


def kill_a_worker(ended: threading.Event) -> None:
    """Kill the process of a worker once it is at work; do nothing once the event is set."""
    while not ended.wait(0.02):
        for process in psutil.process_iter(["cmdline"]):
            if (process.info["cmdline"] or [""])[0].startswith("ray::_Hosted.score"):
                process.kill()
                return
