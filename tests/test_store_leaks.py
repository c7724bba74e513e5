"""Negative controls of the leak check that ends every store test: bytes that did not come back are noticed."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from kvstore.header import Header
from kvstore.tiers.base import Location
from kvstore.types import Fidelity, Tier
from tests.contracts.records import NAMESPACE
from tests.store_fakes import FaultyTier
from tests.store_leaks import counted, emptied
from tests.store_rig import KIB, Rig, filled
from tests.test_store_disk import Life

Leak = Callable[[Rig], Awaitable[Callable[[], object]]]


class ForgetfulTier(FaultyTier):
    """Frees a block, and goes on counting it."""

    forgets = True

    def free(self, namespace: str, header: Header, location: Location) -> None:
        used = self.used
        super().free(namespace, header, location)
        if self.forgets:
            self.used = used


async def an_open_block(rig: Rig) -> Callable[[], object]:
    hold = await rig.open([0])
    return lambda: rig.store.release(hold.id)


async def a_pin(rig: Rig) -> Callable[[], object]:
    wanted = [(rig.whole.digest, rig.key(0))]
    assert rig.store.pins.pin(NAMESPACE, b"p" * 16, rig.spec.root, wanted, Fidelity.EXACT, 30.0) == [True]
    return lambda: rig.store.pins.unpin(NAMESPACE, b"p" * 16)


async def space_that_was_never_filled(rig: Rig) -> Callable[[], object]:
    place = rig.store.stack.hot.reserve(NAMESPACE, 8 * KIB)
    assert place is not None
    return lambda: rig.store.stack.hot.give_back(place)


async def staging_of_a_peer_that_is_gone(rig: Rig) -> Callable[[], object]:
    staging = rig.store.staging.open(16 * KIB, NAMESPACE)
    return lambda: rig.store.staging.close(staging.id)


async def a_load_that_never_ends(rig: Rig) -> Callable[[], object]:
    await rig.store.loading.budget.take(5, NAMESPACE)
    return lambda: rig.store.loading.budget.give(5)


LEAKS: dict[str, tuple[Leak, str]] = {
    "open": (an_open_block, "held by readers"),
    "pinned": (a_pin, "pins of rows"),
    "reserved": (space_that_was_never_filled, "by the tier"),
    "staging": (staging_of_a_peer_that_is_gone, "staging"),
    "loading": (a_load_that_never_ends, "being loaded"),
}


@pytest.mark.parametrize(("leak", "account"), LEAKS.values(), ids=LEAKS)
async def test_what_does_not_come_back_is_noticed(leak: Leak, account: str) -> None:
    rig = Rig.make(ssd=FaultyTier(Tier.SSD))
    await rig.start()
    await rig.put_all(4)
    mend = await leak(rig)
    with pytest.raises(AssertionError, match=f"leaked: .*{account}"):
        await emptied(rig.store)
    mend()
    await rig.close()


async def test_a_tier_that_goes_on_counting_is_noticed() -> None:
    ssd = ForgetfulTier(Tier.SSD)
    rig = Rig.make(ssd=ssd)
    await rig.start()
    await filled(rig)
    with pytest.raises(AssertionError, match=r"leaked: .*\(ssd\), by the tier"):
        await emptied(rig.store)
    ssd.used = 0
    await rig.close()


async def test_a_segment_left_open_is_noticed() -> None:
    rig = Rig.make()
    await rig.start()
    await rig.put_all(2)
    stray = rig.system.memory.segment("stray", 4 * KIB, sealed_writes=False)
    with pytest.raises(AssertionError, match="left open"):
        await rig.close()
    stray.close()


async def test_a_full_store_counts_in_every_account_that_is_required_to_be_empty() -> None:
    """Else the check could not fail: each tier's accounts are not 0 while it has blocks."""
    rig = Rig.make(ssd=FaultyTier(Tier.SSD))
    await rig.start()
    await filled(rig)
    names = " ".join(counted(rig.store))
    assert all(name in names for name in ("arena", "(hot), by the tier", "(host), by the tier", "(ssd), by residency"))
    assert f"namespace {NAMESPACE}" in names and "blocks" in names
    await rig.close()
    assert not counted(rig.store)


async def test_the_log_gives_its_disk_back(tmp_path: Path, no_leaks: None) -> None:
    """What was purged leaves the folder, too: but for the segment being filled, after a heartbeat nothing is taken."""
    async with Life(tmp_path) as rig:
        await rig.put_all(120)
        await rig.settle()
        before = sum(file.stat().st_size for file in (tmp_path / "ssd").glob("*.data"))
        assert before > 4 << 20
        await emptied(rig.store)
        await rig.store.tick()
        left = sum(file.stat().st_size for file in (tmp_path / "ssd").glob("*.data"))
        assert left <= rig.store.config.ssd_segment_bytes, f"{left} of {before} bytes are left"
