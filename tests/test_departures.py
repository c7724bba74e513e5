"""What leaves a tier together is decided once, and planes compete with whole blocks where lossy is allowed."""

from __future__ import annotations

from dataclasses import replace
from hashlib import blake2b

import pytest

from kvstore.codec_rules import CodecRules
from kvstore.policies.base import make_policies, prepare
from kvstore.policies.usage import Use
from kvstore.residency import together as subject
from kvstore.residency.residency import Residency
from kvstore.residency.together import RUN_BLOCKS_MAX, together
from kvstore.spec import Group
from kvstore.store import departures, promotion
from kvstore.store.departures import Departure, Departures
from kvstore.store.planes import READS_EXACT
from kvstore.types import Fidelity, Tier
from tests.contracts.records import NAMESPACE, small_spec
from tests.residency_blocks import FULL, HOST, LEVELS, ROOT, SSD, header_of, place
from tests.store_fakes import FaultyTier
from tests.store_rig import KIB, MANY, SMALL, Rig
from tests.test_store_fidelity import error

EXACT, NEAR, COMPACT = Fidelity.EXACT, Fidelity.NEAR, Fidelity.COMPACT
ALL_OF_IT = 1 << 40


# ---- who goes together


def key_of(chain: int, depth: int) -> bytes:
    return blake2b(bytes((chain, depth)), digest_size=14).digest() + bytes((chain, depth))


def put(residency: Residency, chain: int, depth: int, *, parent: int | None = None) -> int:
    """A block of a chain, with a key as uniform as real ones; of another chain's `parent` where it branches off."""
    above = key_of(chain if parent is None else parent, depth - 1) if depth else ROOT
    header = replace(header_of(chain, depth), key=key_of(chain, depth), parent=above)
    return residency.admit("n", header, SSD, place(len(residency)), leaf_first=True)


def chains(name: str, *lengths: int) -> Residency:
    """Chains in the last level, each used by a request of its own, the deepest block first."""
    residency = Residency(LEVELS, iter(make_policies(name, len(LEVELS))).__next__)
    for chain, length in enumerate(lengths):
        residency.policies[0].begin(Use(), float(chain))
        for depth in range(length):
            put(residency, chain, depth)
    for chain, length in enumerate(lengths):
        residency.policies[0].begin(Use(), 10.0 + chain)
        for depth in reversed(range(length)):
            residency.touch(row_of(residency, chain, depth))
    return residency


def row_of(residency: Residency, chain: int, depth: int) -> int:
    row = residency.find("n", FULL, key_of(chain, depth))
    assert row is not None
    return row


def depths_of(residency: Residency, nbytes: int = ALL_OF_IT, level: int = SSD) -> list[tuple[int, int]]:
    """(chain, depth) of those that leave next, together."""
    row = residency.victim(level)
    assert row is not None
    keys = [residency.rows.key(each) for each in together(residency, row, level, nbytes)]
    return [(key[14], key[15]) for key in keys]


@pytest.mark.parametrize("name", ["lru", "default"])
class TestTogether:
    def test_a_prefix_that_was_used_once_goes_as_one(self, name: str) -> None:
        residency = chains(name, 6, 3)
        assert depths_of(residency) == [(0, depth) for depth in (5, 4, 3, 2, 1, 0)]

    def test_it_is_what_would_leave_block_by_block(self, name: str) -> None:
        """The same blocks in the same order as one asks for one after the other."""
        residency, left = chains(name, 6, 3), []
        run = depths_of(residency)
        for _ in run:
            left += depths_of(residency, 1)
            row = residency.victim(SSD)
            assert row is not None
            residency.drop(row, SSD)
        assert run == left

    def test_no_more_than_is_asked_for(self, name: str) -> None:
        residency = chains(name, 6)
        assert len(depths_of(residency, 1)) == 1 and len(depths_of(residency, 5001)) == 2
        assert len(depths_of(chains(name, 3 * RUN_BLOCKS_MAX))) == RUN_BLOCKS_MAX

    def test_it_ends_where_another_prompt_branches_off(self, name: str) -> None:
        residency = chains(name, 6)
        for now in range(20):
            residency.policies[0].begin(Use(), 20.0 + now)
        put(residency, 7, 3, parent=0)
        assert depths_of(residency) == [(0, 5), (0, 4), (0, 3)]

    def test_it_ends_at_what_was_used_later(self, name: str) -> None:
        residency = chains(name, 6, 3)
        for now in range(20):
            residency.policies[0].begin(Use(), 20.0 + now)
        for depth in (2, 1, 0):
            residency.touch(row_of(residency, 0, depth))
        assert depths_of(residency) == [(0, 5), (0, 4), (0, 3)]

    @pytest.mark.parametrize("what", ["pinned", "moving", "elsewhere", "secondary", "planes"])
    def test_it_ends_at_what_is_not_as_the_others(self, name: str, what: str) -> None:
        residency = chains(name, 6)
        row = row_of(residency, 0, 3)
        if what == "pinned":
            residency.pin(row)
        elif what == "moving":
            residency.work(row)
        elif what == "elsewhere":
            residency.add(row, HOST, place(91))
        elif what == "planes":
            residency.rows.planes[SSD][row] = 1
        else:
            for depth in (4, 5):
                residency.mark_secondary(row_of(residency, 0, depth), True)
        assert depths_of(residency) == [(0, 5), (0, 4)]


ROOMY = replace(SMALL, low_watermark=0.3)  # what is drained at a time is ten blocks of hot
Ways = list[tuple[list[int], list[int]]]


async def moved(monkeypatch: pytest.MonkeyPatch, longest: int) -> tuple[Rig, Ways, int]:
    """A store whose full host sends every other block that asks straight to the SSD: the rig; (depths, destinations)
    of each decision to move; and how often it was asked."""
    monkeypatch.setattr(subject, "RUN_BLOCKS_MAX", longest)
    ways, asked = list[tuple[list[int], list[int]]](), [0]
    move = Departures.move

    def recorded(self: Departures, rows: list[int], level: int) -> Departure:
        found = move(self, rows, level)
        if level == self.stack.HOT:
            ways.append(([self.stack.residency.rows.depth[row] for row in rows], found.destinations))
        return found

    def in_turn(*names: object) -> int:
        asked[0] += 1
        return -1 if asked[0] % 2 else 1

    monkeypatch.setattr(Departures, "move", recorded)
    monkeypatch.setattr(Departures, "_full", lambda *names: True)
    monkeypatch.setattr(departures, "margin", in_turn)
    rig = Rig.make(config=ROOMY, ssd=FaultyTier(Tier.SSD, 4 << 20))
    await rig.store.start()
    await rig.put_all(MANY)
    await rig.settle()
    return rig, ways, asked[0]


async def test_where_a_run_goes_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rig, ways, asked = await moved(monkeypatch, RUN_BLOCKS_MAX)
    assert max(len(depths) for depths, _ in ways) > 4 and asked <= len(ways)
    assert sum(len(depths) for depths, _ in ways) >= 3 * len(ways) > 0
    passed = [depths for depths, to in ways if len(depths) > 1 and to == [rig.store.stack.SSD]]
    assert passed, "no run passed by the host"
    for depths in passed:
        tiers = [rig.where(depth) for depth in depths]
        assert all(Tier.HOST not in where for where in tiers), "it was torn apart"
    await rig.close()


async def test_block_by_block_they_are_torn_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same with runs of one: as many decisions as moves, and neighbours go different ways. So the test above can
    fail."""
    rig, ways, asked = await moved(monkeypatch, 1)
    assert {len(depths) for depths, _ in ways} == {1}
    assert len(ways) >= rig.store.stack.counters["spilled"] / 2 and asked > MANY / 4
    ends = {depths[0]: tuple(to) for depths, to in ways}
    assert any(ends[depth] != ends.get(depth + 1, ends[depth]) for depth in ends)
    await rig.close()


@pytest.mark.parametrize("torn", [False, True])
async def test_what_is_served_together_comes_up_together(monkeypatch: pytest.MonkeyPatch, torn: bool) -> None:
    """Eight blocks that were read at once, hot being full: one question whether to promote them. `torn`: the control,
    where each is worth something else."""
    rig = Rig.make(ssd=FaultyTier(Tier.SSD, 4 << 20))
    await rig.store.start()
    await rig.put_all(MANY)
    await rig.settle()
    depths = [depth for depth in range(MANY) if rig.where(depth) == [Tier.HOST]][:8]
    assert depths == list(range(depths[0], depths[0] + 8))
    asked = list[int]()

    def compared(residency: Residency, row: int, level: int) -> int:
        asked.append(row)
        return -1

    monkeypatch.setattr(promotion, "margin", compared)
    hot = rig.store.stack.residency.policies[rig.store.stack.HOT]
    monkeypatch.setattr(hot, "worth", lambda row: row if torn else 1)
    monkeypatch.setattr(rig.store.movement.room, "short", lambda level, nbytes: nbytes)
    before = rig.store.stack.counters["promotions_skipped"]
    hold = await rig.open(depths)
    assert len(asked) == (8 if torn else 1)
    assert rig.store.stack.counters["promotions_skipped"] - before == 8
    monkeypatch.undo()
    rig.store.release(hold.id)
    await rig.close()


# ---- planes


WIDE = replace(small_spec(block_tokens=64), groups=(Group(layers=1, kv_heads=1, k_dim=128, v_dim=128),))
"""32 KiB raw, of which a nested record keeps about three quarters, and its first plane a third."""
LOSSY = replace(SMALL, host_bytes=3072 * KIB, hot_bytes=512 * KIB, policy="default", ghost_bytes=1 << 20)
NESTED = CodecRules(COMPACT, "nested")
SESSION_BLOCKS = 20
READS = 8 * READS_EXACT


async def pressed(
    reads: tuple[Fidelity, ...],
    *,
    rules: CodecRules = NESTED,
    policy: str = "default",
    ssd: FaultyTier | None = None,
    sessions: int = 12,
) -> Rig:
    """A store whose readers ask for these fidelities in turn, then more sessions than fit."""
    prepare("default")
    config = replace(LOSSY, policy=policy)
    rig = Rig.make(config=config, ssd=ssd, spec=WIDE, codecs={NAMESPACE: rules})
    await rig.store.start()
    await rig.put_all(SESSION_BLOCKS)
    await rig.settle()
    for number in range(READS if reads else 0):
        rig.clock.now += 0.1
        await rig.get(number % 4, least=reads[number % len(reads)])
    for session in range(1, sessions):
        rig.clock.now += 1.0
        for depth in range(SESSION_BLOCKS):
            await rig.put(depth, session)  # some may find no room: they come faster than planes go
        await rig.settle()
    return rig


def held(rig: Rig) -> int:
    return rig.store.blocks(NAMESPACE)


def worths(rig: Rig, tier: Tier) -> dict[tuple[int, int], int]:
    """(session, depth) -> fidelity of the copy in a tier."""
    residency, found = rig.store.stack.residency, {}
    level = next(at for at, rule in enumerate(residency.levels) if rule.tier == tier)
    for session in range(12):
        for depth in range(SESSION_BLOCKS):
            row = residency.find(NAMESPACE, rig.whole.digest, rig.key(depth, session))
            if row is not None and residency.present(row, level):
                found[session, depth] = int(residency.rows.worth(row, level))
    return found


async def test_planes_that_nobody_needs_go_before_blocks() -> None:
    rig, plain = await pressed((COMPACT,)), await pressed((EXACT,))
    assert rig.store.stack.counters["planes_dropped"] > 20 and held(rig) > 1.3 * held(plain)
    thin = [name for name, worth in worths(rig, Tier.HOST).items() if worth == COMPACT]
    for session, depth in thin[:3]:
        assert await rig.get(depth, session, least=EXACT) is None, "a lossy copy never answers an exact read"
        assert await rig.get(depth, session, least=NEAR) is None
        back = await rig.get(depth, session, least=COMPACT)
        assert back is not None and 0.01 < error(rig.raw(depth, session), back) < 0.15
    assert thin
    await rig.close()
    await plain.close()


@pytest.mark.parametrize(
    "case", ["exact readers", "half of them", "nobody asked", "an exact namespace", "recency alone"]
)
async def test_planes_stay_where_they_are_worth_it(case: str) -> None:
    """Negative controls: each takes one reason away. Blocks leave whole, and what is held can be read exactly."""
    reads = {"exact readers": (EXACT,), "half of them": (EXACT, COMPACT), "nobody asked": ()}.get(case, (COMPACT,))
    rules = CodecRules(EXACT, "nested") if case == "an exact namespace" else NESTED
    rig = await pressed(reads, rules=rules, policy="lru" if case == "recency alone" else "default")
    assert rig.store.stack.counters["planes_dropped"] == 0 and rig.store.stack.counters["evicted"] > 0
    assert set(worths(rig, Tier.HOST).values()) == {EXACT}
    await rig.close()


async def test_planes_stay_behind_on_the_way_to_a_full_last_tier() -> None:
    ssd, other = FaultyTier(Tier.SSD, 1 << 20), FaultyTier(Tier.SSD, 1 << 20)
    rig, plain = await pressed((COMPACT,), ssd=ssd), await pressed((EXACT,), ssd=other)
    assert min(worths(rig, Tier.SSD).values()) == COMPACT
    assert set(worths(plain, Tier.SSD).values()) == {EXACT}
    assert held(rig) > held(plain)
    assert rig.store.stack.counters["planes_dropped"] == 0, "host has a tier below: nothing is given up there"
    await rig.close()
    await plain.close()


async def test_what_is_read_keeps_its_planes_until_it_is_let_go() -> None:
    rig = await pressed((COMPACT,), sessions=3)
    name, worth = next((name, worth) for name, worth in worths(rig, Tier.HOST).items() if worth == EXACT)
    hold = await rig.open([name[1]], name[0], least=EXACT)
    placed = hold.blocks[0]
    assert placed is not None and worth == EXACT
    before = rig.read(placed)
    for session in range(3, 10):
        for depth in range(SESSION_BLOCKS):
            await rig.put(depth, session)
    await rig.settle()
    assert rig.store.stack.counters["planes_dropped"] > 0
    assert worths(rig, Tier.HOST)[name] == EXACT and rig.read(placed) == before
    rig.store.release(hold.id)
    await rig.close()


async def test_a_purge_while_planes_go_leaves_nothing_behind() -> None:
    rig = await pressed((COMPACT,), sessions=4)
    for session in range(4, 9):
        for depth in range(SESSION_BLOCKS):
            await rig.put(depth, session)
        assert rig.store.movement.busy
        rig.store.purge(NAMESPACE)
        await rig.put_all(SESSION_BLOCKS, session)
    await rig.settle()
    await rig.close()


async def test_a_damaged_record_is_given_up_instead_of_thinned() -> None:
    rig = await pressed((COMPACT,), sessions=3)
    stack = rig.store.stack
    for (session, depth), _ in worths(rig, Tier.HOST).items():
        row = stack.residency.find(NAMESPACE, rig.whole.digest, rig.key(depth, session))
        assert row is not None
        view = stack.host.view(stack.residency.location(row, stack.HOST))
        view[400] ^= 1  # in the first plane of all of them
    for session in range(3, 9):
        for depth in range(SESSION_BLOCKS):
            await rig.put(depth, session)
    await rig.settle()
    assert stack.counters["corrupt"] > 0
    for name in worths(rig, Tier.HOST):
        back = await rig.get(name[1], name[0], least=COMPACT) if name[0] >= 3 else b""
        assert back is None or name[0] < 3 or error(rig.raw(name[1], name[0]), back) < 0.15
    await rig.close()
