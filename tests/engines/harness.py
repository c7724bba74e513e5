"""Engines as processes, the service as processes: what the tests of this folder are made of."""

from __future__ import annotations

import asyncio
import json
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kvstore.bench.engine_process import SETTINGS, transfer_config
from kvstore.client.kv_client import KVClient
from kvstore.client.plan import HitPlan
from kvstore.config import ClientConfig, Config, load_config
from kvstore.fleet.local_cluster import LocalCluster
from kvstore.keys import chain
from kvstore.machine.system import real_system
from kvstore.operations.observe import Observer
from kvstore.spec import ModelSpec, Shard
from kvstore.transport.base import Credentials
from kvstore.transport.rpc import GrpcTransport

ROOT = Path(__file__).resolve().parents[2]
VICTIM = "ENGINE_TEST_VICTIM"
"""Environment: a file with the process to kill once pages for matched tokens are allocated (tests.engines.faulty)."""

START_S = 150.0
ANSWER_S = 120.0
PATIENT = {"load_patience_ms": 20_000, "load_timeout_s": 20, "lookup_timeout_ms": 10_000}
"""Where a test counts what was loaded, a busy machine must not turn loads into misses."""


class Engine:
    """A process that runs one vLLM engine after another: importing vllm takes longest. `close` it, or use `with`."""

    def __init__(self, *, env: dict[str, str] | None = None) -> None:
        self.log = Path(os.environ.get("ENGINE_LOG", os.devnull))
        with self.log.open("ab") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "kvstore.bench.engine_process"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                cwd=ROOT,
                env={**os.environ, **SETTINGS, **(env or {})},
                process_group=0,
            )

    def build(
        self,
        model: Path,
        extra: dict[str, Any] | None = None,
        *,
        transfer: dict[str, Any] | None = None,
        **settings: Any,
    ) -> Engine:
        """The engine that `run` uses from now on. `extra`: the connector's own settings; None and no `transfer`: no
        connector."""
        if extra is not None:
            transfer = transfer_config({**PATIENT, **extra})
        self.ask({"do": "build", "model": str(model), "transfer": transfer, "settings": settings}, START_S)
        return self

    def run(self, prompts: Sequence[list[int]], tokens: int = 12, logprobs: int | None = None) -> dict[str, Any]:
        """{"ids", "reasons", "logprobs" where asked for, "counters": the connector's sums since the start}."""
        return self.ask({"do": "run", "prompts": list(prompts), "tokens": tokens, "logprobs": logprobs})

    def finds(self, prompts: Sequence[list[int]]) -> None:
        """Waits until this engine's own lookups find every whole block: its view follows in a moment."""
        tokens = sum((len(ids) - 1) // 64 * 64 for ids in prompts)
        wait_until(
            lambda: self.ask({"do": "lookups", "prompts": list(prompts)})["tokens"] == tokens,
            what="finding what was stored in the engine's view",
        )

    def settled(self, **least: float) -> dict[str, float]:
        """Runs tiny requests until the connector has counted at least so much: saves end after their request."""
        end = time.monotonic() + 30
        while True:
            found: dict[str, float] = self.run([[3, 4, 5]], 1)["counters"]
            if all(found.get(name, 0) >= value for name, value in least.items()):
                return found
            assert time.monotonic() < end, f"{least} did not come: {found}"

    def ask(self, job: dict[str, Any], timeout_s: float = ANSWER_S) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(job).encode() + b"\n")
        self._process.stdin.flush()
        return self._answer(timeout_s)

    def _answer(self, timeout_s: float) -> dict[str, Any]:
        out = self._process.stdout
        assert out is not None
        if not select.select([out], [], [], timeout_s)[0]:
            raise AssertionError(f"the engine did not answer in {timeout_s} s: {self._tail()}")
        line = out.readline()
        if not line:
            raise AssertionError(f"the engine ended with {self._process.wait(20)}: {self._tail()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _tail(self) -> str:
        return self.log.read_text(errors="replace")[-3000:] if self.log.is_file() else "set ENGINE_LOG for its log"

    def close(self) -> None:
        """Ends the process and those it made. Idempotent."""
        process = self._process
        if process.poll() is None:
            assert process.stdin is not None
            try:
                process.stdin.write(b'{"do": "stop"}\n')
                process.stdin.close()
                process.wait(20)
            except (BrokenPipeError, subprocess.TimeoutExpired):
                pass
        try:
            os.killpg(process.pid, 9)
        except ProcessLookupError:
            pass
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None and not pipe.closed:
                pipe.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


@contextmanager
def service(*, workers: int = 1, redis: bool = False, **sections: Any) -> Iterator[LocalCluster]:
    """A coordinator and workers as processes."""
    config: Config = load_config(env={}, overrides={"store": {"host_bytes": "128MiB"}, **sections})
    cluster = LocalCluster(config, workers=workers, redis=redis)
    try:
        asyncio.run(cluster.start())
        yield cluster
    finally:
        cluster.stop()


def addresses(cluster: LocalCluster, **extra: Any) -> dict[str, Any]:
    """The connector's settings for this service."""
    assert cluster.coordinator is not None
    return {"coordinators": cluster.coordinator.address, **extra}


def stored_under(engine: Engine) -> tuple[ModelSpec, list[Shard]]:
    """What the engine's connector stores under: the spec, and every rank's shards."""
    said = engine.ask({"do": "identity"})
    return ModelSpec.from_json(said["spec"]), [Shard(**shard) for shard in said["shards"]]


def looked_up(
    cluster: LocalCluster, spec: ModelSpec, shards: Sequence[Shard], asked: Sequence[Sequence[int]]
) -> list[HitPlan]:
    """What anybody's lookup of these prompts finds."""
    assert cluster.coordinator is not None
    config = ClientConfig(coordinators=(cluster.coordinator.address,))

    async def ask() -> list[HitPlan]:
        async with await KVClient.connect(config) as client:
            return [await client.match(spec, chain(spec, ids), shards, timeout_s=5.0) for ids in asked]

    return asyncio.run(ask())


def found_by_all(
    cluster: LocalCluster,
    spec: ModelSpec,
    shards: Sequence[Shard],
    asked: Sequence[Sequence[int]],
    share: float = 1.0,
) -> None:
    """Waits until a lookup of anybody finds (this share of) the whole blocks of these prompts. A commit is visible to
    other clients once its announcement has reached the coordinator, and nothing but a lookup says when that is."""
    blocks = share * sum(len(ids) // 64 for ids in asked)
    wait_until(
        lambda: sum(plan.blocks for plan in looked_up(cluster, spec, shards, asked)) >= blocks,
        what="finding what was stored",
    )


def directory_blocks(cluster: LocalCluster) -> int:
    """Entries of the coordinator's directory: blocks times the shards they are stored as."""

    async def ask() -> int:
        system = real_system(1)
        try:
            assert cluster.coordinator is not None
            observer = Observer(GrpcTransport(system.clock, connect_timeout_s=5.0), Credentials(), 5.0)
            return (await observer.coordinator_status(cluster.coordinator.address)).directory_blocks
        finally:
            system.pool.close()

    return asyncio.run(ask())


def worker_counters(cluster: LocalCluster) -> dict[str, int]:
    """Summed over the workers."""

    async def ask() -> dict[str, int]:
        system = real_system(1)
        try:
            observer = Observer(GrpcTransport(system.clock, connect_timeout_s=5.0), Credentials(), 5.0)
            total: dict[str, int] = {}
            for worker in cluster.workers:
                status = await observer.worker_status(worker.address)
                for name, value in status.counters.items():
                    total[name] = total.get(name, 0) + value
            return total
        finally:
            system.pool.close()

    return asyncio.run(ask())


def wait_until(holds: Any, timeout_s: float = 20.0, what: str = "it") -> None:
    """Polls a condition. AssertionError when it does not hold in time."""
    end = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < end, f"{what} did not happen in {timeout_s} s"
        threading.Event().wait(0.05)
