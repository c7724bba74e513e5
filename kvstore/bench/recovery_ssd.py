"""`bench recovery`, ssd: a worker is killed and started again; when its first block from the SSD is there."""

from __future__ import annotations

from kvstore.bench.recovery_rig import RecoveryRig, Work, now, until
from kvstore.bench.report import Report
from kvstore.config import MIB, Config, override
from kvstore.types import Tier

BLOCK_BYTES, BLOCKS, PROMPTS = 1 << 20, 16, 16


async def measure_ssd(report: Report, rounds: int) -> int:
    """From the kill to verified bytes. Mutates the report; blocks that were wrong."""
    store = {
        "host_bytes": 96 * MIB,
        "hot_bytes": 32 * MIB,
        "ssd_bytes": 1024 * MIB,
        "ssd_sync_s": 0.05,
        "put_wait_s": 2.0,
    }
    work = Work.of(BLOCK_BYTES, BLOCKS, PROMPTS)
    wrong, seconds = 0, []
    async with RecoveryRig(override(Config(), {"store": store}), workers=1, copies=1) as rig:
        by = await rig.client()
        await work.put(by)
        for _ in range(rounds):
            begin = now()
            await rig.cluster.restart_worker(0)
            checked = 0

            async def hit() -> bool:
                nonlocal checked
                for prompt in work.prompts:
                    plan = await by.match(work.spec, prompt)
                    if plan.tiers().get(Tier.SSD):
                        got = await by.get(plan)
                        checked += work.wrong(prompt, got.blocks, got.buffers[0])
                        return got.blocks > 0
                return False

            await until(hit, "the first block comes from the SSD")
            seconds.append(now() - begin)
            wrong += checked
            await work.put(by)
    report.result("restarted_worker_first_ssd_hit", seconds, "s")
    report.target("restarted_worker_first_ssd_hit", at_most=5)
    return wrong
