"""A storm of re-announcements: a coordinator takes in a few snapshots at a time, in order, until all are in."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

import pytest

from coordinator.runtime import CoordinatorRuntime
from coordinator.session import Session
from coordinator.turns import Turns
from kvstore.config import Config, CoordinatorConfig, ServerConfig, WorkerConfig
from kvstore.transport.base import Credentials
from tests.service_helpers import ListSource, prompt
from tests.sim.loop import run
from tests.sim.network import Faults, MemoryNetwork
from tests.sim.system import sim_system
from workers.announcer import Announcer

WORKERS = 1_000
BLOCKS = 48
BATCH = 8  # blocks of a message: six parts a snapshot


def told(log: list[str], name: str) -> Any:
    return lambda: log.append(name)


def test_turns_are_few_and_come_in_the_order_of_asking() -> None:
    turns, log = Turns(2, 3.0), list[str]()
    assert turns.ask("a", told(log, "a"), 0.0) and turns.ask("b", told(log, "b"), 0.0)
    for name in ("c", "d", "c", "e"):
        assert not turns.ask(name, told(log, name), 0.0)
    assert turns.held == 2 and turns.waiting == 3 and log == []
    turns.done("b", 1.0)
    assert log == ["c"] and turns.holds("c")
    assert not turns.ask("b", told(log, "b"), 1.0), "whoever asks again stands behind those that wait"
    turns.done("d", 1.0)  # it has gone while it waited
    turns.done("a", 1.0)
    turns.done("a", 1.0)
    assert log == ["c", "e"] and turns.held == 2 and turns.waiting == 1


def test_a_turn_that_does_not_go_on_is_taken_back() -> None:
    turns, log = Turns(1, 3.0), list[str]()
    turns.ask("dead", told(log, "dead"), 0.0)
    turns.ask("next", told(log, "next"), 0.0)
    turns.goes_on("dead", 2.0)
    turns.tick(4.9)
    assert log == []
    turns.tick(5.1)
    assert log == ["next"] and not turns.holds("dead")


def test_one_that_was_not_asked_is_taken_in_beyond_the_bound() -> None:
    turns = Turns(1, 3.0)
    turns.ask("a", lambda: None, 0.0)
    turns.force("old", 0.0)
    assert turns.held == 2 and not turns.ask("b", lambda: None, 0.0)
    turns.done("a", 0.0)
    assert not turns.holds("b")
    turns.done("old", 0.0)
    assert turns.holds("b")


@dataclass
class Seen:
    """What the coordinator had on its hands at each message."""

    coming_in: int = 0  # snapshots begun and not ended
    staged: int = 0  # blocks of them
    turns: int = 0
    finished: list[str] = field(default_factory=list)


class Storm:
    """A coordinator that has just started, and workers that have a snapshot to tell it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, workers: int, snapshots_max: int) -> None:
        self.network = MemoryNetwork(7, Faults(delay_min_s=0.001, delay_max_s=0.02))
        self.sources = [self._source(number) for number in range(workers)]
        self.snapshots_max = snapshots_max
        self.seen = Seen()
        self.announcers: list[Announcer] = []
        self._parts: dict[str, int] = {}
        self._watch(monkeypatch)

    @staticmethod
    def _source(number: int) -> ListSource:
        """Its outbox has forgotten the first changes, so nothing but a snapshot can tell them."""
        source = ListSource(f"w{number:04}", outbox=BLOCKS // 2)
        source.add("default", prompt(number, BLOCKS))
        return source

    def _watch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        handle = Session._snapshot
        seen, parts = self.seen, self._parts

        def watched(session: Session, message: Any) -> Any:
            assert session._accepted is not None
            worker = session._accepted.worker
            parts[worker] = parts.get(worker, 0) + sum(len(r.keys) // 16 for r in message.runs)
            seen.coming_in = max(seen.coming_in, len(parts))
            seen.staged = max(seen.staged, sum(parts.values()))
            seen.turns = max(seen.turns, session._registry.turns.held)
            replies = handle(session, message)
            if message.last:
                del parts[worker]
                seen.finished.append(worker)
            return replies

        monkeypatch.setattr(Session, "_snapshot", watched)

    async def start(self) -> CoordinatorRuntime:
        process = self.network.boot("c0", "hc0")
        config = Config(
            server=ServerConfig(bind="127.0.0.1:7100"),
            coordinator=CoordinatorConfig(snapshots_max=self.snapshots_max, workers_max=2 * WORKERS, heartbeat_s=1.0),
        )
        runtime = CoordinatorRuntime(config, sim_system(process, 1), self.network.transport(process))
        await process.spawn(runtime.start())
        for source in self.sources:
            self.announce(source)
        return runtime

    def announce(self, source: ListSource) -> None:
        process = self.network.boot(source.worker, source.worker)
        announcer = Announcer(
            WorkerConfig(announce_batch=BATCH), sim_system(process, 1), self.network.transport(process),
            Credentials("default"), ["c0:7100"], source,
        )  # fmt: skip
        self.announcers.append(announcer)

        async def begin() -> None:
            announcer.start()

        process.spawn(begin())

    async def whole(self, runtime: CoordinatorRuntime, limit_s: float = 120.0) -> float:
        """Virtual seconds until every block of the workers that live is in the directory."""
        loop = asyncio.get_running_loop()
        begin = loop.time()
        alive = [s for s, a in zip(self.sources, self.announcers, strict=True) if not a.stopping.is_set()]
        directory = runtime.registry.inboxes["default"].directory
        while directory.blocks < BLOCKS * len(alive):
            assert loop.time() - begin < limit_s, f"{directory.blocks} of {BLOCKS * len(alive)} blocks are in"
            await asyncio.sleep(0.05)
        return loop.time() - begin

    def play(self, body: Any) -> Any:
        async def main() -> Any:
            runtime = await self.start()
            outcome = await body(runtime)
            living = [announcer for announcer in self.announcers if not announcer.stopping.is_set()]
            await asyncio.gather(*(announcer.stop(0.0, leaving=False) for announcer in living))
            await runtime.stop()
            return outcome

        return run(main(), processes=self.network.processes)


def test_of_a_thousand_workers_few_are_on_their_way_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    storm = Storm(monkeypatch, WORKERS, snapshots_max=16)
    took = storm.play(storm.whole)
    assert storm.seen.coming_in <= 16 and storm.seen.staged <= 16 * BLOCKS and storm.seen.turns <= 16
    assert len(storm.seen.finished) == len({*storm.seen.finished}) == WORKERS, "each tells everything once"
    assert took < 60


def test_without_the_bound_many_more_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: the same storm does put that much on the coordinator."""
    storm = Storm(monkeypatch, 300, snapshots_max=WORKERS)
    storm.play(storm.whole)
    assert storm.seen.coming_in > 50 and storm.seen.staged > 16 * BLOCKS


def test_workers_that_die_free_their_place(monkeypatch: pytest.MonkeyPatch) -> None:
    storm = Storm(monkeypatch, 40, snapshots_max=4)

    async def body(runtime: CoordinatorRuntime) -> float:
        turns = runtime.registry.turns
        while turns.held < 4 or turns.waiting < 20:
            await asyncio.sleep(0.001)
        holding = [session._accepted.worker for session in turns._held if isinstance(session, Session)]
        assert len(holding) == 4
        for number, source in enumerate(storm.sources):
            if source.worker in holding[:2]:
                process = next(p for p in storm.network.processes if p.name == source.worker)
                storm.network.crash(process, silent=source.worker == holding[0])  # its connection stays for a while
                storm.announcers[number].stopping.set()
        return await storm.whole(runtime)

    assert storm.play(body) < 30
    assert storm.seen.coming_in <= 4 + 1, "one that died in the middle never ends"


def test_a_worker_that_knows_nothing_of_turns_is_taken_in_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """An older one begins its snapshot unasked."""
    from workers.announcer import Stream

    monkeypatch.setattr(Stream, "_in_turn", lambda self, namespace: False)
    storm = Storm(monkeypatch, 30, snapshots_max=2)

    async def body(runtime: CoordinatorRuntime) -> int:
        await storm.whole(runtime)
        return runtime.registry.counters["snapshots_unasked"]

    assert storm.play(body) == 30


def test_a_coordinator_that_knows_nothing_of_turns_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    register = Session._register

    def older(session: Session, message: Any) -> Any:
        replies = register(session, message)
        for reply in replies:
            reply.welcome.ClearField("snapshot_turns")
        return replies

    monkeypatch.setattr(Session, "_register", older)
    storm = Storm(monkeypatch, 30, snapshots_max=2)
    assert storm.play(storm.whole) < 2


def test_who_comes_back_with_changes_that_are_still_kept_sends_no_snapshot(monkeypatch: pytest.MonkeyPatch) -> None:
    """A broken connection is no reason to tell everything anew."""
    storm = Storm(monkeypatch, 5, snapshots_max=2)

    async def body(runtime: CoordinatorRuntime) -> tuple[int, int]:
        await storm.whole(runtime)
        directory, before = runtime.registry.inboxes["default"].directory, len(storm.seen.finished)
        for number, source in enumerate(storm.sources):
            storm.network.cut(source.worker, "c0")
            source.add("default", prompt(100 + number, 4))
        await asyncio.sleep(20.0)
        assert directory.blocks == 0, "their leases are over"
        storm.network.heal()
        while directory.blocks < 5 * (BLOCKS + 4):
            await asyncio.sleep(0.05)
        freed = len(storm.seen.finished)
        for number, source in enumerate(storm.sources):
            source.add("default", prompt(200 + number, 4))
        for breaks in list(storm.network._streams):
            breaks()
        while directory.blocks < 5 * (BLOCKS + 8):
            await asyncio.sleep(0.05)
        return freed - before, len(storm.seen.finished) - freed

    assert storm.play(body) == (5, 0), "those who were forgotten tell everything, once; the others only what is new"


def test_a_life_that_has_told_more_than_it_knows_is_another_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its epoch was set back with its disk: fenced, it takes a higher one, and what the other life told is gone."""
    storm = Storm(monkeypatch, 1, snapshots_max=2)

    async def body(runtime: CoordinatorRuntime) -> list[int]:
        await storm.whole(runtime)
        (first,), (source,) = storm.announcers, storm.sources
        await first.stop(0.0, leaving=False)
        young = ListSource(source.worker, source.epoch)
        young.add("default", prompt(77, 3))
        storm.announce(young)
        while runtime.registry.inboxes["default"].directory.blocks != 3:
            await asyncio.sleep(0.05)
        return young.fenced_by

    assert storm.play(body) == [1]
