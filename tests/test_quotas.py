"""Quotas of namespaces: whoever is over evicts its own first, and nobody learns anything of another by them."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvstore.auth import load_policy
from kvstore.directory.replicas import Copies
from kvstore.errors import ConfigError, Overloaded
from kvstore.quotas import Quotas, Rate
from kvstore.store.tiered import Use
from kvstore.transport.base import CallContext
from kvstore.types import Fidelity, Tier
from kvstore.views import sums, visible_status
from kvstore.wire import common_pb2
from tests.contracts.records import small_spec
from tests.store_fakes import FaultyTier
from tests.store_rig import KIB, MANY, SMALL, Rig

LOUD, QUIET = "loud", "quiet"
BOUND = Quotas(hot_bytes=32 * KIB, host_bytes=128 * KIB)  # 4 raw blocks and 12 records or more


def staying(rig: Rig, namespace: str) -> dict[Tier, int]:
    return dict(rig.store.use(namespace).tiers)


def check(rig: Rig, quotas: dict[str, Quotas]) -> None:
    """Everything within its quota, and the store's own invariants."""
    rig.store.validate()
    for namespace, quota in quotas.items():
        for tier, used in staying(rig, namespace).items():
            bound = quota.tier(tier)
            assert not bound or used <= bound, f"{namespace} has {used} of {bound} bytes in {tier.name}"


# --- bytes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limited", [True, False])
async def test_who_hammers_evicts_its_own_and_a_quiet_one_keeps_everything(limited: bool) -> None:
    """And the control: without a quota the same load takes the quiet one's blocks."""
    quotas = {LOUD: BOUND} if limited else {}
    rig = Rig.make(quotas=quotas)
    await rig.start()
    await rig.put_all(12, namespace=QUIET)
    for session in range(1, 5):
        for depth in range(MANY // 4):
            assert (await rig.put(depth, session, namespace=LOUD)).state == "committed", "its own give way at once"
    await rig.store.idle()
    check(rig, quotas)
    kept = [await rig.get(depth, namespace=QUIET) for depth in range(12)]
    if limited:
        assert kept == [rig.raw(depth) for depth in range(12)]
        assert rig.store.use(LOUD).evicted > 0 and rig.store.use(QUIET).evicted == 0
        assert await rig.get(MANY // 4 - 1, 4, namespace=LOUD) is not None, "what it put last is there"
    else:
        assert None in kept
    await rig.close()


async def test_over_quota_with_nothing_to_give_way_a_put_is_dropped_and_counted() -> None:
    rig = Rig.make(config=replace(SMALL, put_wait_s=0.01), quotas={LOUD: BOUND})
    await rig.start()
    await rig.put_all(4, namespace=LOUD)
    pinned = rig.store.pins.pin(
        LOUD, b"p" * 16, rig.spec.root, [(rig.whole.digest, key) for key in rig.keys(4)], Fidelity.EXACT, 30.0
    )
    assert pinned == [True] * 4
    outcome = await rig.put(4, namespace=LOUD)
    assert outcome.state == "dropped" and "quota" in outcome.why
    assert (rig.store.use(LOUD).dropped, rig.store.counters["puts_over_quota"]) == (1, 1)
    assert (await rig.put(0, namespace=QUIET)).state == "committed", "others have all the room there is"
    assert rig.store.pins.unpin(LOUD, b"p" * 16)
    await rig.close()


async def test_a_namespace_without_quota_never_gives_way_to_anothers() -> None:
    rig = Rig.make(quotas={LOUD: BOUND, QUIET: Quotas()})
    await rig.start()
    await rig.put_all(MANY, namespace=LOUD)
    await rig.store.idle()
    assert rig.store.use(QUIET) == Use(dict.fromkeys(staying(rig, QUIET), 0), 0, 0, 0, 0)
    await rig.close()


moves = st.lists(st.tuples(st.sampled_from([LOUD, QUIET]), st.integers(0, 3), st.integers(0, 7)), max_size=60)
bounds = st.builds(
    Quotas,
    hot_bytes=st.sampled_from([0, 8 * KIB, 16 * KIB, 40 * KIB]),
    host_bytes=st.sampled_from([0, 16 * KIB, 48 * KIB]),
    ssd_bytes=st.sampled_from([0, 16 * KIB, 64 * KIB]),
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(moves, bounds, bounds, st.booleans(), st.booleans(), st.booleans())
def test_any_load_stays_within_any_quotas(
    load: list[tuple[str, int, int]], loud: Quotas, quiet: Quotas, ssd: bool, redis: bool, at_once: bool
) -> None:
    quotas = {LOUD: loud, QUIET: quiet}

    async def play() -> None:
        rig = Rig.make(
            config=replace(SMALL, host_bytes=160 * KIB, hot_bytes=32 * KIB, put_wait_s=2, load_wait_s=2),
            ssd=FaultyTier(Tier.SSD, 96 * KIB) if ssd else None,
            redis=FaultyTier(Tier.REDIS) if redis else None,
            spec=small_spec(),
            quotas=quotas,
        )
        await rig.start()
        puts = [rig.put(depth, session, namespace=namespace) for namespace, session, depth in load]
        outcomes = await asyncio.gather(*puts) if at_once else [await put for put in puts]
        assert all(outcome.state in ("committed", "held", "dropped") for outcome in outcomes)
        async with asyncio.timeout(20):
            await rig.store.idle()
        check(rig, quotas)
        for namespace, session, depth in load:
            found = await rig.get(depth, session, namespace=namespace)
            assert found in (None, rig.raw(depth, session))
        async with asyncio.timeout(20):
            await rig.store.idle()
        check(rig, quotas)
        await rig.close()

    asyncio.run(play())


# --- bytes a second, pins, staging ---------------------------------------------------------------------------------


async def test_more_bytes_a_second_than_granted_are_dropped_until_time_has_passed() -> None:
    rig = Rig.make(quotas={LOUD: Quotas(rate_bytes=16 * KIB)})
    await rig.start()
    states = [(await rig.put(depth, namespace=LOUD)).state for depth in range(4)]
    assert states == ["committed", "committed", "dropped", "dropped"]  # 8 KiB each
    assert [(await rig.put(depth, namespace=QUIET)).state for depth in range(4)] == ["committed"] * 4
    rig.clock.now += 0.5
    assert [(await rig.put(depth, namespace=LOUD)).state for depth in (2, 3)] == ["committed", "dropped"]
    assert rig.store.use(LOUD).dropped == rig.store.counters["puts_over_rate"] == 3
    await rig.close()


@given(st.lists(st.tuples(st.integers(1, 500), st.floats(0, 2)), max_size=50), st.integers(1, 1000))
def test_a_rate_never_passes_more_than_its_time_and_one_block(asked: list[tuple[int, float]], rate_bytes: int) -> None:
    rate, now, passed = Rate(rate_bytes), 0.0, 0
    for nbytes, wait_s in asked:
        now += wait_s
        if rate.take(nbytes, now):
            passed += nbytes
        assert passed <= rate_bytes * (now + 1) + 500 + 1e-6


async def test_pinned_bytes_have_a_bound_of_their_own() -> None:
    rig = Rig.make(quotas={LOUD: Quotas(pinned_bytes=17 * KIB)})
    await rig.start()
    for namespace in (LOUD, QUIET):
        await rig.put_all(4, namespace=namespace)
    wanted = [(rig.whole.digest, key) for key in rig.keys(4)]
    assert rig.store.pins.pin(LOUD, b"p" * 16, rig.spec.root, wanted, Fidelity.EXACT, 9.0) == [True, True, False, False]
    assert rig.store.pins.pin(QUIET, b"p" * 16, rig.spec.root, wanted, Fidelity.EXACT, 9.0) == [True] * 4
    assert rig.store.use(LOUD).pinned == 16 * KIB
    assert all(rig.store.pins.unpin(namespace, b"p" * 16) for namespace in (LOUD, QUIET))
    await rig.close()


async def test_staging_has_a_bound_of_its_own_and_comes_back() -> None:
    rig = Rig.make(quotas={LOUD: Quotas(staging_bytes=24 * KIB)})
    await rig.start()
    first = rig.store.staging.open(16 * KIB, LOUD)
    with pytest.raises(Overloaded, match="staging_bytes"):
        rig.store.staging.open(16 * KIB, LOUD)
    other = rig.store.staging.open(16 * KIB, QUIET)
    assert rig.store.use(LOUD).staging == 16 * KIB
    rig.store.staging.close(first.id)
    again = rig.store.staging.open(16 * KIB, LOUD)
    for opened in (other, again):
        rig.store.staging.close(opened.id)
    await rig.close()


# --- the file, and what a status shows -----------------------------------------------------------------------------


def policy_of(folder: Path, text: str):  # type: ignore[no-untyped-def]
    file = folder / "namespaces.toml"
    file.write_text(text)
    return load_policy(str(file))


def test_quotas_and_copies_of_a_file(tmp_path: Path) -> None:
    policy = policy_of(
        tmp_path,
        '[namespaces.a]\ncopies = 2\nhot_copies = 3\nhot_bytes = "1GiB"\n'
        '[namespaces.a.quotas]\nhost_bytes = "64MiB"\nrate_bytes = 1000\n[namespaces.b]\n',
    )
    assert policy.namespaces["a"].copies == Copies(2, 3, 1 << 30)
    assert policy.namespaces["a"].quotas == Quotas(host_bytes=64 << 20, rate_bytes=1000)
    assert (policy.namespaces["b"].copies, policy.namespaces["b"].quotas) == (Copies(), Quotas())


@pytest.mark.parametrize(
    "wrong", ["copies = 0", "copies = 99", 'copies = "many"', "quotas = 7", "[namespaces.a.quotas]\nhost_byte = 1",
              "[namespaces.a.quotas]\nhost_bytes = -1", '[namespaces.a.quotas]\nssd_bytes = "much"'],
)  # fmt: skip
def test_what_is_wrong_in_a_file_is_named(tmp_path: Path, wrong: str) -> None:
    with pytest.raises(ConfigError, match=r"namespaces\.a"):
        policy_of(tmp_path, f"[namespaces.a]\n{wrong}\n")


def test_sums_are_of_what_the_caller_may_see() -> None:
    """I10: a client's sums are those of its own namespace, whatever the others have."""

    def status(mine: int, others: int) -> common_pb2.WorkerStatus:
        found = common_pb2.WorkerStatus()
        for name, used in ((QUIET, mine), (LOUD, others)):
            entry = found.namespaces.add(namespace=name, blocks=used, puts_over_quota=used)
            entry.tiers.add(tier=common_pb2.TIER_HOST, used=used, quota=100)
        return found

    client = CallContext(identity="c", role="client", namespace=QUIET, peer="")
    for others in (7, 7000):
        [mine] = sums(visible_status(one, client) for one in (status(1, others), status(2, others)))
        assert (mine.namespace, mine.blocks, mine.puts_over_quota) == (QUIET, 3, 3)
        assert [(use.used, use.quota) for use in mine.tiers] == [(3, 200)]
    node = CallContext(identity="n", role="node", namespace=QUIET, peer="")
    assert {one.namespace for one in sums([visible_status(status(1, 2), node)])} == {QUIET, LOUD}
