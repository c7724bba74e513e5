"""A process that puts blocks into a store that spills until it is killed: `python -m tests.store_writer FOLDER FIRST`.

After each batch it prints `N moving BYTES durable COUNT`: the last block put, what is on its way down, and how many
blocks the SSD tier had at the last heartbeat; `none` in the place of `durable` while it had none.
"""

from __future__ import annotations

import asyncio
import sys
from dataclasses import replace

from kvstore.catalog import Catalog
from kvstore.config import StoreConfig
from kvstore.machine.system import real_system
from kvstore.seams import System
from kvstore.store.tiered import TieredStore
from kvstore.tiers.ssd import SsdTier
from tests.contracts.records import NAMESPACE
from tests.store_rig import Rig

CHAIN = 200  # blocks of a session
KIB = 1 << 10


def rig_on(folder: str, system: System) -> Rig:
    """A store of 64 raw and 64 encoded blocks over a log of a few hundred, durable at every heartbeat."""
    config = replace(
        StoreConfig(), host_bytes=1280 * KIB, hot_bytes=512 * KIB, ssd_folder=folder, ssd_bytes=8 << 20, ssd_sync_s=0.0,
        put_wait_s=10, spill_queue_bytes=128 * KIB,
    )  # fmt: skip
    catalog = Catalog()
    rig = Rig.make(config=config, system=system)
    rig.store = TieredStore(system, config, catalog, ssd=SsdTier(system, config, catalog), redis=None)
    rig.catalog = catalog
    return rig


async def main(folder: str, first: int) -> None:
    rig = rig_on(folder, real_system(threads=2))
    await rig.store.start()
    number, durable = first, 0
    while True:
        some = range(number, number + 8)
        await asyncio.gather(*(rig.put(n % CHAIN, n // CHAIN, namespace=NAMESPACE) for n in some))
        number += 8
        if number % 64 == 0:
            assert rig.store.stack.SSD is not None
            durable = rig.store.stack.tiers[rig.store.stack.SSD].stats().blocks  # what comes while it syncs is not
            await rig.store.tick()
        said = "durable" if durable else "none"
        print(number - 1, "moving", rig.store.movement.moving_bytes, said, durable, flush=True)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2])))
