"""A worker's store killed in the middle of spilling: each restart serves committed bytes, and nothing else."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from random import Random

import pytest

from kvstore.checksum import prepare
from kvstore.codecs.batch import ready
from kvstore.machine.system import LocalSpawner, real_system
from kvstore.seams import System
from kvstore.types import Fidelity
from tests.contracts.records import NAMESPACE
from tests.store_writer import CHAIN, rig_on
from tests.test_ssd_crash import wait_for

LOOKS = 50  # at a process that spills, before it is killed all the same


def killed_mid_spill(folder: Path, log: Path, first: int, rng: Random) -> tuple[int, int, int]:
    """(last number heard of, bytes on their way down then, blocks durable at the last heartbeat heard of)."""
    child = LocalSpawner().spawn([sys.executable, "-m", "tests.store_writer", str(folder), str(first)], log=str(log))
    try:
        text = wait_for(log, "durable")  # the log is in use
        for _ in range(rng.randrange(1, 13)):
            text = wait_for(log, "moving", after=len(text))
        for _ in range(LOOKS):  # until something is on its way down
            if told(text)[1] > 0:
                break
            text = wait_for(log, "moving", after=len(text))
    finally:
        assert child.alive(), log.read_text()
        child.kill()
    return told(log.read_text())


def told(text: str) -> tuple[int, int, int]:
    """(last number, bytes on their way down, durable blocks) of the last whole line: the one after may be cut off."""
    lines = [line.split() for line in text.rpartition("\n")[0].splitlines() if line.count(" ") == 4]
    return int(lines[-1][0]), int(lines[-1][2]), int(lines[-1][4])


async def verified(system: System, folder: Path) -> int:
    """Blocks that a restart has, every one opened and compared with what was put under its name."""
    rig = rig_on(str(folder), system)
    await rig.store.start()
    names = {rig.key(depth, session): (depth, session) for session in range(40) for depth in range(CHAIN)}
    residency = rig.store.stack.residency
    held = [residency.id(row) for row in residency.of(NAMESPACE)]
    for id in held:
        hold = await rig.store.open(NAMESPACE, rig.spec.root, [(id.shard, id.key)], least=Fidelity.EXACT)
        placed = hold.blocks[0]
        assert placed is not None, "an indexed block can't be read"
        assert rig.read(placed) == rig.raw(*names[id.key]), "a wrong byte"
        rig.store.release(hold.id)
    await rig.settle()
    await rig.store.close()
    return len(held)


def killed_rounds(tmp_path: Path, rounds: int) -> None:
    ready(("lossless",))  # compiled before any deadline runs: the writers read it from the cache
    prepare()
    rng, folder = Random(7), tmp_path / "log"
    mid_spill = first = 0
    for number in range(rounds):
        log = tmp_path / f"out{number}"
        last, moving, durable = killed_mid_spill(folder, log, first, rng)
        mid_spill += moving > 0
        system = real_system(threads=2)
        found = asyncio.run(verified(system, folder))
        system.pool.close()
        assert found >= min(durable, 100), "what was durable is gone"
        log.unlink()
        first = (last + 9) // 8 * 8 % (30 * CHAIN)
    assert mid_spill >= rounds // 2, "the kills did not land in the middle of spilling"


def test_sigkill_in_the_middle_of_spilling(tmp_path: Path) -> None:
    killed_rounds(tmp_path, 4)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_sigkill_in_the_middle_of_spilling_200_times(tmp_path: Path) -> None:
    killed_rounds(tmp_path, 200)
