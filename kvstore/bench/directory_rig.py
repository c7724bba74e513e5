"""What `bench directory` measures: a coordinator's own service and sessions, without a network, from bytes to bytes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from coordinator.peers import Peers
from coordinator.registry import SWEEP_SLOTS, Registry
from coordinator.service import CoordinatorService
from coordinator.session import Session
from kvstore.config import CoordinatorConfig
from kvstore.convert import change_to_wire, run_to_wire, spec_to_wire
from kvstore.directory.directory import Directory
from kvstore.directory.membership import Member
from kvstore.directory.replicas import Copies
from kvstore.directory.runs import RemovedRun, Run
from kvstore.machine.system import real_system
from kvstore.seams import Clock, System
from kvstore.spec import Group, ModelSpec, Shard
from kvstore.transport.base import CallContext
from kvstore.types import KEY_BYTES, Fidelity, Keys, Tier
from kvstore.wire import common_pb2, coordinator_pb2
from kvstore.wireform import member_to_wire, shard_to_wire

SPEC = ModelSpec(model="bench/directory", groups=(Group(layers=32, kv_heads=8, k_dim=128, v_dim=128),), block_tokens=64)
WHOLE = Shard.whole(SPEC)
NAMESPACE = "default"
PROMPT = 1024  # blocks
GROUP = 32  # blocks of a placement group: the longest run
MESSAGE = 4096  # blocks a message, as workers send them
COPIES = 2
WORKERS = 4
BLOCK_BYTES = 1 << 22


__all__ = ["SWEEP_SLOTS", "Rig", "Worker", "prompt_keys", "run_at", "runs_of"]


def prompt_keys(first: int, count: int) -> bytes:
    """Keys of `count` prompts of `PROMPT` blocks: as good as hashes, and the same whenever they are asked for."""
    made = [np.random.Generator(np.random.PCG64(7 + first + at)).bytes(PROMPT * KEY_BYTES) for at in range(count)]
    return b"".join(made)


def run_at(keys: bytes, at: int, count: int, depth: int) -> Run:
    """`count` blocks of a prompt from block `at` of `keys` on."""
    before = keys[(at - 1) * KEY_BYTES : at * KEY_BYTES] if depth else SPEC.root
    mine = keys[at * KEY_BYTES : (at + count) * KEY_BYTES]
    group = at - depth % GROUP
    name = keys[group * KEY_BYTES : (group + 1) * KEY_BYTES]
    return Run(SPEC.root, WHOLE.digest, Tier.HOST, Fidelity.EXACT, before, depth, Keys(mine), name, BLOCK_BYTES)


def runs_of(keys: bytes, length: int) -> list[Run]:
    """Whole prompts in runs of `length` blocks."""
    blocks = len(keys) // KEY_BYTES
    return [run_at(keys, at, length, at % PROMPT) for at in range(0, blocks, length)]


class Worker:
    """One worker's stream to a coordinator, without the worker: what it would say, as bytes."""

    def __init__(self, rig: Rig, number: int) -> None:
        self.rig = rig
        self.id = f"w{number}"
        self.seq = 0
        self.snapshots = 0
        self.member = Member(self.id, 1, address=f"127.0.0.1:{9000 + number}", host="bench")
        self.register()
        self.hear(self.delta([]))

    def register(self) -> None:
        """A new connection, in the same epoch."""
        self.session = Session(self.rig.registry, self.rig.clock, self.rig.config.lease_s, coordinator_pb2.Welcome)
        hello = coordinator_pb2.Register(member=member_to_wire(self.member), heads={NAMESPACE: self.seq})
        self.session.handle(coordinator_pb2.AnnounceRequest(register=hello))

    def delta(self, changes: list[Run | RemovedRun]) -> bytes:
        """The next changes as a message; without any, only the dictionary (as a snapshot of nothing)."""
        dictionary = [spec_to_wire(SPEC), common_pb2.DictionaryEntry(shard=shard_to_wire(WHOLE))]
        if not changes:
            return self.snapshot([], 0)[0]
        blocks = sum(len(change.keys) for change in changes)
        message = coordinator_pb2.Delta(
            namespace=NAMESPACE,
            first_seq=self.seq + 1,
            last_seq=self.seq + blocks,
            dictionary=dictionary if self.seq == 0 else (),
            changes=map(change_to_wire, changes),
        )
        self.seq += blocks
        return coordinator_pb2.AnnounceRequest(delta=message).SerializeToString()

    def snapshot(self, runs: list[Run], seq: int) -> list[bytes]:
        """Everything, in parts of `MESSAGE` blocks."""
        self.snapshots += 1
        self.seq = seq
        each = max(1, MESSAGE // max(1, len(runs[0].keys))) if runs else 1
        starts = range(0, max(len(runs), 1), each)
        parts = []
        for index, start in enumerate(starts):
            chunk = coordinator_pb2.SnapshotChunk(
                namespace=NAMESPACE,
                resume_seq=seq,
                first=index == 0,
                last=index == len(starts) - 1,
                dictionary=[spec_to_wire(SPEC), common_pb2.DictionaryEntry(shard=shard_to_wire(WHOLE))],
                runs=map(run_to_wire, runs[start : start + each]),
                snapshot=self.snapshots,
                index=index,
            )
            parts.append(coordinator_pb2.AnnounceRequest(snapshot=chunk).SerializeToString())
        return parts

    def hear(self, message: bytes) -> None:
        """The coordinator's part: parse, apply, answer."""
        for reply in self.session.handle(coordinator_pb2.AnnounceRequest.FromString(message)):
            reply.SerializeToString()


class Rig:
    """A coordinator with `WORKERS` workers; each prompt lies on `COPIES` of them."""

    def __init__(self, blocks_max: int) -> None:
        self.system: System = real_system(1)
        self.clock: Clock = self.system.clock
        self.config = CoordinatorConfig(blocks_max=blocks_max, lease_s=3600.0)
        self.registry = Registry(
            self.config, [NAMESPACE], self.clock.monotonic(), seed=11, copies={NAMESPACE: Copies(COPIES)}
        )
        info = common_pb2.CoordinatorInfo(id="c-0", boot_id="b", address="127.0.0.1:8000")
        self.service = CoordinatorService(
            self.config,
            self.system,
            self.registry,
            Registry(self.config, [NAMESPACE], self.clock.monotonic()),
            peers=Peers(info, (), self.config.lease_s, self.clock.monotonic()),
            namespaces_digest="",
        )
        self.workers = [Worker(self, number) for number in range(WORKERS)]
        self.prompts = 0
        self.context = CallContext("bench", "client", NAMESPACE, "bench")

    @property
    def directory(self) -> Directory:
        return self.registry.inboxes[NAMESPACE].directory

    def holders(self, prompt: int) -> list[Worker]:
        return [self.workers[(prompt + copy) % WORKERS] for copy in range(COPIES)]

    def announced(self, prompts: int, length: int = GROUP) -> Iterator[tuple[Worker, bytes, int]]:
        """(worker, message, blocks) for the next prompts."""
        batch = MESSAGE // PROMPT
        for _ in range(0, prompts, batch * WORKERS):
            keys = {of: prompt_keys(self.prompts + of, 1) for of in range(batch * WORKERS)}
            for number, worker in enumerate(self.workers):
                mine = [k for of, k in keys.items() if worker in self.holders(self.prompts + of)]
                for start in range(0, len(mine), batch):
                    packed = mine[start : start + batch]
                    runs: list[Run | RemovedRun] = [run for one in packed for run in runs_of(one, length)]
                    yield self.workers[number], worker.delta(runs), PROMPT * len(packed)
            self.prompts += batch * WORKERS

    def request(self, prompt: int) -> bytes:
        return common_pb2.MatchRequest(
            root=SPEC.root, keys=prompt_keys(prompt, 1), shards=[shard_to_wire(WHOLE)]
        ).SerializeToString()

    def lookup(self, request: bytes) -> bytes:
        """What the coordinator does for one Match, request bytes to reply bytes; nothing in it waits."""
        answering = self.service.match(common_pb2.MatchRequest.FromString(request), self.context)
        try:
            answering.send(None)
        except StopIteration as done:
            reply: bytes = done.value.SerializeToString()
            return reply
        raise AssertionError("a lookup without commits to wait for has waited")

    def picks(self, seed: int, count: int) -> list[int]:
        """Prompts to ask for, anywhere in the directory."""
        picked: list[int] = np.random.Generator(np.random.PCG64(seed)).integers(0, self.prompts, count).tolist()
        return picked

    def close(self) -> None:
        self.system.pool.close()
