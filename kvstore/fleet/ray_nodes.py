"""Ray underneath a fleet: a cluster of our own on loopback, or a connection to one that exists."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from typing import Any

from kvstore.auth import is_loopback
from kvstore.errors import SetupError
from kvstore.fleet.reconcile import Node

RESOURCE = "kvstore_worker"
"""Custom resource: how many workers a node takes. Where any node of an existing cluster has it, only those are used."""

LOOPBACK_SWITCH = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""Set to 0 it makes Ray take 127.0.0.1 for itself, on Linux too."""

KNOCK_S = 5.0
SHORT_FOLDER = 24
"""Characters of a temporary folder below which Ray's sockets, whose paths end at 107, still fit."""

OBJECT_STORE_BYTES = 80 << 20  # Ray's least is 75 MiB; no block ever goes there


HEALTH = {"health_check_period_ms": 500, "health_check_timeout_ms": 5000, "health_check_failure_threshold": 4}
"""Of a cluster of our own: nodes on one machine that end are found out in seconds, one that is slow is left alone."""


class RayNodes:
    """Connected to Ray as the driver of one fleet. `start` or `join`, then `close`. Blocking; main thread only."""

    def __init__(self) -> None:
        self._cluster: Any = None
        self.folder = ""  # of our own cluster; empty when joined
        self.address = ""

    def start(self, namespace: str, nodes: int, workers_per_node: int) -> None:
        """A cluster on 127.0.0.1 with its files in a folder of its own.

        Ray starts as many processes on a node ahead as it has CPUs, and so many at a time: one for each actor here.
        """
        base = tempfile.gettempdir()
        self.folder = tempfile.mkdtemp(prefix="kv-", dir=base if len(base) <= SHORT_FOLDER else "/tmp")
        os.environ.update(
            RAY_TMPDIR=self.folder,  # also keeps the address file of other clusters of this user as it is
            RAY_USAGE_STATS_ENABLED="0",
            RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0",
        )
        os.environ[LOOPBACK_SWITCH] = "0"
        os.environ.pop("RAY_ADDRESS", None)
        from ray.cluster_utils import Cluster

        node = {
            "num_cpus": workers_per_node + 1,
            "resources": {RESOURCE: workers_per_node},
            "include_dashboard": False,
            "include_log_monitor": False,
            "node_ip_address": "127.0.0.1",
            "object_store_memory": OBJECT_STORE_BYTES,
        }
        head = {**node, "num_cpus": workers_per_node + 2, "_system_config": HEALTH}
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        for _ in range(nodes - 1):
            self._cluster.add_node(wait=False, **node)
        self._cluster.wait_for_nodes(timeout=60)
        self._init(self._cluster.address, namespace)

    def join(self, address: str, namespace: str) -> None:
        """SetupError when no cluster answers there."""
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        if is_loopback(address):
            os.environ[LOOPBACK_SWITCH] = "0"
        try:
            asyncio.run(_knock(address))  # Ray itself would try for minutes
            self._init(address, namespace)
        except (OSError, ValueError, RuntimeError, TimeoutError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise SetupError(f"no Ray cluster answers at {address}: start one or check --address ({reason})") from error

    def _init(self, address: str, namespace: str) -> None:
        import ray

        ray.init(address=address, namespace=namespace, log_to_driver=False, logging_level="error")
        self.address = address

    def close(self) -> None:
        """Disconnect; end the cluster if it is ours, and remove its files. Idempotent."""
        import ray

        ray.shutdown()
        cluster, self._cluster = self._cluster, None
        if cluster is not None:
            cluster.shutdown()
        if self.folder:
            shutil.rmtree(self.folder, ignore_errors=True)


def living_nodes(workers: int) -> list[Node]:
    """Nodes of the cluster in a stable order. Where none names `RESOURCE` each takes one worker, or any number where
    the fleet says how many (`workers`, else 0). Once connected to Ray."""
    import ray

    alive = [node for node in ray.nodes() if node["Alive"]]
    marked = any(node["Resources"].get(RESOURCE) for node in alive)
    found = [
        Node(
            node["NodeID"],
            node["NodeManagerAddress"],
            int(node["Resources"].get(RESOURCE, 0)) if marked else max(1, workers),
        )
        for node in alive
    ]
    return sorted(found, key=lambda node: (node.ip, node.id))


async def _knock(address: str) -> None:
    """Whether anybody listens there: OSError, TimeoutError or ValueError otherwise."""
    host, _, port = address.rpartition(":")
    async with asyncio.timeout(KNOCK_S):
        _, writer = await asyncio.open_connection(host.strip("[]"), int(port))
    writer.close()
    await writer.wait_closed()
