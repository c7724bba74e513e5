"""A process that writes blocks to an SSD tier until it is killed: `python -m tests.ssd_writer FOLDER FIRST`.

Prints the number of each block when its write has returned, and `sync N` when blocks up to N are durable.
"""

from __future__ import annotations

import asyncio
import sys
from dataclasses import replace

from kvstore.config import StoreConfig
from kvstore.machine.system import real_system
from kvstore.tiers.base import Location
from kvstore.tiers.ssd import SsdTier
from tests.contracts.records import Sample, catalog_of, sample
from tests.ssd_helpers import put

SSD_BYTES = 4 << 20
KEPT = 150


def block(number: int) -> Sample:
    return sample(number % 250, session=number // 250)


def config(folder: str) -> StoreConfig:
    return replace(StoreConfig(), ssd_folder=folder, ssd_bytes=SSD_BYTES, ssd_sync_s=0.0)


async def main(folder: str, first: int) -> None:
    tier = SsdTier(real_system(threads=2), config(folder), catalog_of())
    kept: list[tuple[Sample, Location]] = []
    for found in await tier.start():
        tier.free(found.namespace, found.header, found.location)
    print("started", flush=True)
    number = first
    while True:
        some = [block(n) for n in range(number, number + 4)]
        while len(kept) > KEPT:
            old, location = kept.pop(0)
            tier.free(old.namespace, old.header, location)
        locations = await asyncio.gather(*(put(tier, found) for found in some))
        kept += zip(some, locations, strict=True)
        number += len(some)
        print(number - 1, flush=True)
        if number % 16 < 4:
            await tier.tick()
            print("sync", number - 1, flush=True)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2])))
