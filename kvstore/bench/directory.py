"""`kvstore bench directory`: the coordinator's own service on one core, from request bytes to reply bytes.

Blocks, announcements, lookups, snapshots and a dead worker, each prompt on two of four workers, replication wanted.
Seconds are CPU seconds of the one thread: what it costs a core, whoever else is on the machine. `--fleet TRACE` runs a
simulated fleet instead (`kvstore.bench.directory_fleet`).
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Sequence

from kvstore.bench.directory_fleet import measure_fleet
from kvstore.bench.directory_rig import (
    COPIES,
    GROUP,
    PROMPT,
    SWEEP_SLOTS,
    WORKERS,
    Rig,
    Worker,
    prompt_keys,
    run_at,
    runs_of,
)
from kvstore.bench.directory_snapshot import measure_snapshot
from kvstore.bench.report import Report
from kvstore.bench.tiers_residency import resident_bytes
from kvstore.directory.membership import Freed
from kvstore.directory.runs import RemovedRun, Run
from kvstore.machine.system import thread_cpu_s
from kvstore.types import KEY_BYTES, Keys
from kvstore.wire import common_pb2

SMALL = 10_240  # blocks
LARGE, LARGE_QUICK = 10_000_000, 1_000_000
DEAD, DEAD_QUICK = 1_000_000, 250_000
SNAPSHOT, SNAPSHOT_QUICK = 1_000_000, 250_000
ROUNDS, ROUNDS_QUICK = 15, 7
LOOKUPS = 40  # of a round
UPDATES_A_S = 500_000
SLICE_S = 0.4
REPAIR_TICKS = 50
RUN_LENGTHS = (GROUP, 4, 1)


def main(argv: Sequence[str]) -> Report:
    """`kvstore bench directory`'s own flags."""
    parser = argparse.ArgumentParser(prog="kvstore bench directory", allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="a tenth of the blocks, within 40 s")
    parser.add_argument("--blocks", type=int, default=0, help="blocks of the large directory (10,000,000)")
    parser.add_argument("--fleet", metavar="TRACE", default="", help="a simulated fleet instead, on this trace")
    parser.add_argument("--workers", type=int, default=1000, help="with --fleet: workers")
    parser.add_argument("--fleet-blocks", type=int, default=20_000_000, help="with --fleet: blocks of all workers")
    parser.add_argument("--plot", metavar="FILE", default="", help="with --fleet: write a plot (SVG)")
    arguments = parser.parse_args(argv)
    report = Report("directory")
    if arguments.fleet:
        measure_fleet(report, arguments.fleet, arguments.workers, arguments.fleet_blocks, arguments.plot)
        return report
    quick = arguments.quick
    rounds = ROUNDS_QUICK if quick else ROUNDS
    blocks = arguments.blocks or (LARGE_QUICK if quick else LARGE)
    report.notes.append(
        f"CPU seconds of one thread; the large directory has {blocks:,} blocks of {COPIES} holders each"
    )
    large = fill(report, blocks)
    small = Rig(1 << 20)
    for worker, message, _ in small.announced(SMALL // PROMPT):
        worker.hear(message)
    gc.freeze()
    lookups(report, small, large, rounds)
    lookups_under_updates(report, large, rounds)
    repair_ticks(report, large)
    for rig in (small, large):
        rig.directory.validate()
        rig.close()
    del small, large
    gc.unfreeze()
    gc.collect()
    measure_snapshot(report, SNAPSHOT_QUICK if quick else SNAPSHOT, 3 if quick else ROUNDS_QUICK)
    dead_worker(report, DEAD_QUICK if quick else DEAD, ROUNDS_QUICK)
    return report


def fill(report: Report, blocks: int) -> Rig:
    """A directory of so many blocks, each on two workers; what it costs to get there, and bytes a block."""
    warm = Rig(1 << 16)  # the kernels are compiled or loaded, and every path was taken once
    for worker, message, _ in warm.announced(1):
        worker.hear(message)
    gc.collect()
    before = resident_bytes()
    rig = Rig(COPIES * blocks * 3 // 2)
    rates, batch, spent = [], 0, 0.0
    for worker, message, count in rig.announced(-(-blocks // PROMPT)):
        begin = thread_cpu_s()
        worker.hear(message)
        spent += thread_cpu_s() - begin
        batch += count
        if batch >= 200_000:
            rates.append(batch / spent)
            batch, spent = 0, 0.0
    held = rig.prompts * PROMPT
    warm.close()
    assert rig.directory.blocks == COPIES * held, "the directory does not have what was announced"
    gc.collect()
    report.result("blocks", [held], "blocks")
    report.result("bytes_a_block", [(resident_bytes() - before) / held], "bytes")
    report.target("bytes_a_block", at_most=100)
    report.result("directory_bytes_a_block", [rig.directory.nbytes / held], "bytes")
    report.result("applied_a_s", rates, "blocks/s")
    report.target("applied_a_s", at_least=1_000_000)
    for length in RUN_LENGTHS[1:]:
        rates = []
        for worker, message, count in rig.announced(64, length):
            begin = thread_cpu_s()
            worker.hear(message)
            rates.append(count / (thread_cpu_s() - begin))
        report.result(f"applied_a_s_in_runs_of_{length}", rates, "blocks/s")
    return rig


def lookups(report: Report, small: Rig, large: Rig, rounds: int) -> None:
    """1,024 keys asked of a small directory and of a large one, in turns; every answer is looked at, untimed."""
    took: dict[str, list[float]] = {"small": [], "large": []}
    for turn in range(-1, rounds):
        for name, rig in (("small", small), ("large", large)):
            requests = [rig.request(prompt) for prompt in rig.picks(turn + 100, LOOKUPS)]
            begin = thread_cpu_s()
            replies = [rig.lookup(request) for request in requests]
            seconds = (thread_cpu_s() - begin) / LOOKUPS
            for reply in replies:
                answer = common_pb2.MatchReply.FromString(reply)
                assert answer.blocks == PROMPT and len(answer.runs) == COPIES, "a lookup is answered wrong"
            if turn >= 0:
                took[name].append(seconds * 1e6)
    report.result("lookup_1024_small", took["small"], "us")
    report.result("lookup_1024", took["large"], "us")
    report.target("lookup_1024", at_most=150)
    report.ratio("lookup_vs_10k", "lookup_1024", "lookup_1024_small", at_most=4)


class Updates:
    """An endless stream of changes that leaves the directory as large as it is: a prompt goes, the same one comes."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.messages: list[tuple[Worker, bytes, int]] = []
        for prompt in rig.picks(5, 64):
            keys = prompt_keys(prompt, 1)
            for worker in rig.holders(prompt):
                gone: list[Run | RemovedRun] = [
                    RemovedRun(run.shard, Keys(keys[at * KEY_BYTES : (at + GROUP) * KEY_BYTES]))
                    for at, run in ((at, run_at(keys, at, GROUP, at)) for at in range(0, PROMPT, GROUP))
                ]
                back: list[Run | RemovedRun] = [*runs_of(keys, GROUP)]
                self.messages.append((worker, worker.delta(gone), PROMPT))
                self.messages.append((worker, worker.delta(back), PROMPT))
        self.applied = 0

    def apply(self) -> int:
        """One message; how many changes. 0: the prepared ones are used up."""
        if self.applied == len(self.messages):
            return 0
        worker, message, count = self.messages[self.applied]
        worker.hear(message)
        self.applied += 1
        return count


def lookups_under_updates(report: Report, rig: Rig, rounds: int) -> None:
    """Lookups a second of one core that applies 500,000 changes a second besides, and of one that does not."""
    rates: dict[bool, list[float]] = {False: [], True: []}
    done: list[float] = []
    requests = [rig.request(prompt) for prompt in rig.picks(3, 400)]
    for turn in range(-1, rounds):
        for busy in (False, True):
            updates = Updates(rig) if busy else None
            looked = changed = 0
            begin = now = thread_cpu_s()
            while now - begin < SLICE_S:
                if updates is not None and changed < UPDATES_A_S * (now - begin):
                    more = updates.apply()
                    if not more:
                        break
                    changed += more
                else:
                    rig.lookup(requests[looked % len(requests)])
                    looked += 1
                now = thread_cpu_s()
            if turn >= 0:
                rates[busy].append(looked / (now - begin))
                if busy:
                    done.append(changed / (now - begin))
    report.result("lookups_a_s", rates[False], "1/s")
    report.result("lookups_a_s_under_updates", rates[True], "1/s")
    report.result("updates_a_s_meanwhile", done, "blocks/s")
    report.target("updates_a_s_meanwhile", at_least=0.97 * UPDATES_A_S)
    report.ratio("lookups_under_updates", "lookups_a_s_under_updates", "lookups_a_s", at_least=0.7)


def repair_ticks(report: Report, rig: Rig) -> None:
    """What one tick costs while every group is looked at in turn (all of them have their copies): `repair_groups` looks
    of the large directory, every twelfth of a lease."""
    took: list[float] = []
    for replicas in rig.registry.repair.replicas():
        replicas.again()
    for _ in range(REPAIR_TICKS):
        begin = thread_cpu_s()
        rig.registry.repair.tick(rig.clock.monotonic())
        took.append((thread_cpu_s() - begin) * 1e3)
    report.result("repair_tick", took, "ms")
    report.result("repair_tick_groups", [rig.config.repair_groups], "groups")
    report.result("repair_groups_remembered", [rig.registry.repair.groups], "groups")


def dead_worker(report: Report, blocks: int, rounds: int) -> None:
    """A worker of so many blocks is lost: from the end of its connection to the first answer without it; then its lease
    is over, and lookups go on while its blocks are swept away."""
    rig = Rig(COPIES * blocks * 4)
    for worker, message, _ in rig.announced(blocks * 2 // PROMPT):
        worker.hear(message)
    lost = rig.workers[1]
    request = rig.request(0)
    out = []
    for turn in range(rounds):
        assert lost.id in holders(rig.lookup(request)), "the worker was not in the answer"
        begin = thread_cpu_s()
        lost.session.close()
        reply = rig.lookup(request)
        out.append((thread_cpu_s() - begin) * 1e3)
        assert lost.id not in holders(reply), "a dead worker is in an answer"
        if turn + 1 < rounds:
            lost.register()
    its = rig.directory.blocks // WORKERS
    report.result("dead_worker_blocks", [its], "blocks")
    report.result("dead_worker_out", out, "ms")
    report.target("dead_worker_out", at_most=10)
    pauses: list[float] = []
    requests = [rig.request(prompt) for prompt in rig.picks(9, 200)]
    last = thread_cpu_s()
    rig.registry.take([Freed(lost.id, 1)], rig.clock.monotonic())
    left = 1
    while left:
        rig.lookup(requests[len(pauses) % len(requests)])
        now = thread_cpu_s()
        pauses.append((now - last) * 1e3)
        last = now
        left = rig.directory.sweep(SWEEP_SLOTS)  # what a tick of the registry does
    report.results["dead_worker_longest_pause"] = {"value": max(pauses), "unit": "ms", "n": len(pauses)}
    report.target("dead_worker_longest_pause", at_most=20)
    assert rig.directory.blocks == 3 * its, "the others' blocks are not all there"
    rig.directory.validate()
    rig.close()


def holders(reply: bytes) -> list[str]:
    return [holder.id for holder in common_pb2.MatchReply.FromString(reply).holders]
