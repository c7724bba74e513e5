"""A Ray cluster of several nodes on this machine in a process of its own, driven line by line.

`python -m tests.ray_cluster '[{"kvstore_worker": 2}, ...]'`: one node for each object, which names its resources
("GPU" are logical ones). Then a JSON command a line on stdin, a JSON answer a line on stdout; the end of stdin ends it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from types import TracebackType
from typing import Any

from kvstore.fleet.ray_nodes import HEALTH, LOOPBACK_SWITCH, OBJECT_STORE_BYTES

ENGINE_S = 5.0  # that an engine has to find its place


class RayCluster:
    """Of the test's side. `with RayCluster([...]) as cluster`."""

    def __init__(self, nodes: list[dict[str, float]]) -> None:
        self._folder = tempfile.mkdtemp(prefix="kv-", dir="/tmp")
        environment = {
            **os.environ,
            "RAY_TMPDIR": self._folder,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
            LOOPBACK_SWITCH: "0",
        }
        self._log = open(os.path.join(self._folder, "cluster.log"), "w")  # noqa: SIM115 - lives as long as the child
        self._child = subprocess.Popen(
            [sys.executable, "-m", "tests.ray_cluster", json.dumps(nodes)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )

    def __enter__(self) -> RayCluster:
        ready = self._read()
        self.address: str = ready["address"]
        self.nodes: list[str] = ready["nodes"]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._child.stdin is not None and self._child.stdout is not None
        self._child.stdin.close()
        try:
            self._child.wait(30)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait(10)
            raise
        finally:
            self._child.stdout.close()
            self._log.close()
            shutil.rmtree(self._folder, ignore_errors=True)

    def _read(self) -> dict[str, Any]:
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        assert line, open(self._log.name).read()  # noqa: SIM115
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Send one command, wait for its answer."""
        assert self._child.stdin is not None
        self._child.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self._child.stdin.flush()
        return self._read()

    def add(self, resources: dict[str, float]) -> str:
        """A node more; its id."""
        node: str = self.ask("add", resources=resources)["node"]
        return node

    def remove(self, node: str) -> None:
        """Its raylet is killed, and what it started ends with it."""
        self.ask("remove", node=node)

    def actors(self) -> dict[str, list[str]]:
        """Names of all actors, by namespace."""
        found: dict[str, list[str]] = self.ask("actors")["actors"]
        return found

    def bystand(self, name: str) -> None:
        """An actor of somebody else, of that name, on the head node until the cluster ends."""
        self.ask("bystand", name=name)

    @property
    def folder(self) -> str:
        """Where Ray keeps its logs."""
        return self._folder

    def engine(self, gpus: int, node: str = "") -> bool:
        """Whether an actor that wants so many GPUs finds its place; it ends again."""
        return bool(self.ask("engine", gpus=gpus, node=node)["placed"])


class _Nodes:
    """Of the child's side."""

    def __init__(self, nodes: list[dict[str, float]]) -> None:
        from ray.cluster_utils import Cluster

        self.cluster = Cluster(initialize_head=True, head_node_args={**_arguments(nodes[0]), "_system_config": HEALTH})
        self.by_id = {self.cluster.head_node.node_id: self.cluster.head_node}
        for resources in nodes[1:]:
            node = self.cluster.add_node(wait=False, **_arguments(resources))
            self.by_id[node.node_id] = node
        self.cluster.wait_for_nodes(timeout=60)

    def add(self, resources: dict[str, float]) -> dict[str, Any]:
        node = self.cluster.add_node(wait=True, **_arguments(resources))
        self.by_id[node.node_id] = node
        return {"node": node.node_id}

    def remove(self, node: str) -> dict[str, Any]:
        self.cluster.remove_node(self.by_id.pop(node), allow_graceful=False)
        return {}

    def actors(self) -> dict[str, Any]:
        from ray.util import list_named_actors

        found: dict[str, list[str]] = {}
        for actor in list_named_actors(all_namespaces=True):
            found.setdefault(actor["namespace"], []).append(actor["name"])
        return {"actors": found}

    def bystand(self, name: str) -> dict[str, Any]:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        class Bystander:
            def here(self) -> bool:
                return True

        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        options = ray.remote(Bystander).options(name=name, num_cpus=0, scheduling_strategy=here)
        self.bystander = options.remote()
        return {"here": ray.get(self.bystander.here.remote())}

    def engine(self, gpus: int, node: str) -> dict[str, Any]:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        class Engine:
            def here(self) -> bool:
                return True

        where = NodeAffinitySchedulingStrategy(node, soft=False) if node else "DEFAULT"
        engine = ray.remote(Engine).options(num_gpus=gpus, num_cpus=0, scheduling_strategy=where).remote()
        done, _ = ray.wait([engine.here.remote()], timeout=ENGINE_S)
        placed = False
        if done:
            placed = ray.get(done[0])
        ray.kill(engine)
        return {"placed": placed}


def _arguments(resources: dict[str, float]) -> dict[str, Any]:
    return {
        "num_cpus": 1,
        "num_gpus": int(resources.get("GPU", 0)),
        "resources": {name: count for name, count in resources.items() if name != "GPU"},
        "include_dashboard": False,
        "include_log_monitor": False,
        "node_ip_address": "127.0.0.1",
        "object_store_memory": OBJECT_STORE_BYTES,
    }


def main() -> None:
    import ray

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever Ray prints goes to the log
    nodes = _Nodes(json.loads(sys.argv[1]))
    ray.init(address=nodes.cluster.address, namespace="engines", log_to_driver=False, logging_level="error")
    print(json.dumps({"address": nodes.cluster.address, "nodes": list(nodes.by_id)}), file=answers, flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        print(json.dumps(getattr(nodes, command.pop("do"))(**command)), file=answers, flush=True)
    ray.shutdown()
    nodes.cluster.shutdown()


if __name__ == "__main__":
    main()
