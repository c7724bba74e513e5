"""`bench directory`, snapshot: from a worker's residency through bytes into a coordinator's directory."""

from __future__ import annotations

import gc

from kvstore.bench.directory_rig import MESSAGE, NAMESPACE, Rig
from kvstore.bench.report import Report
from kvstore.bench.tiers_blocks import NAMESPACE as STORE_NAMESPACE
from kvstore.bench.tiers_blocks import catalog
from kvstore.bench.tiers_residency import Resident
from kvstore.convert import Introduced, chunk_to_wire
from kvstore.directory.announce import run_chunks
from kvstore.machine.system import thread_cpu_s
from kvstore.residency.snapshots import runs_held
from kvstore.wire import coordinator_pb2


def measure_snapshot(report: Report, blocks: int, rounds: int) -> None:
    """A worker of so many blocks (chains of 64) tells them all; both sides' seconds together. Mutates the report."""
    residency = Resident(blocks).residency
    rig = Rig(4 * blocks)
    worker = rig.workers[0]
    pauses, both, theirs = [], [], []
    gc.freeze()
    for turn in range(-1, rounds):
        said = Introduced(catalog())
        begin = thread_cpu_s()
        runs = runs_held(residency, STORE_NAMESPACE)
        pause = thread_cpu_s() - begin  # nothing else happens in the worker until here
        told = 0.0
        for part in run_chunks(turn + 10, 1, runs, MESSAGE):
            chunk = chunk_to_wire(NAMESPACE, part, said.entries(part.runs))
            message = coordinator_pb2.AnnounceRequest(snapshot=chunk).SerializeToString()
            heard = thread_cpu_s()
            worker.hear(message)
            told += thread_cpu_s() - heard
        took = thread_cpu_s() - begin
        assert rig.directory.blocks == blocks, "the coordinator does not have what the worker has"
        assert rig.registry.inboxes[NAMESPACE].receivers()[0].complete
        if turn >= 0:
            pauses.append(pause)
            both.append(took)
            theirs.append(told)
    gc.unfreeze()
    rig.directory.validate()
    report.result("snapshot_blocks", [blocks], "blocks")
    report.result("snapshot", both, "s")
    report.target("snapshot", at_most=2)
    report.result("snapshot_in_the_coordinator", theirs, "s")
    report.result("snapshot_worker_pause", pauses, "s")
    rig.close()
