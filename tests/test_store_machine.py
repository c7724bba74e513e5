"""Random histories of one store with failing tiers below it, against a model of what was committed (I1 to I4).

Never wrong bytes; what is announced is served when nothing fails; nothing goes but on purpose; held blocks stay; and
whenever nothing moves, residency, tiers, arena and announcements agree.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import replace

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvstore.directory.runs import Removed
from kvstore.store.tiered import Hold
from kvstore.types import Fidelity, Tier
from tests.contracts.records import NAMESPACE, small_spec
from tests.store_fakes import FaultyTier
from tests.store_leaks import emptied
from tests.store_rig import KIB, SMALL, Rig

CONFIG = replace(SMALL, host_bytes=160 * KIB, hot_bytes=32 * KIB, put_wait_s=2, load_wait_s=2)
# 4 raw blocks in hot, 16 records in host, 12 on SSD; 64 different blocks
Block = tuple[int, int]  # session, depth


class Machine(RuleBasedStateMachine):
    @initialize(with_ssd=st.booleans(), with_redis=st.booleans())
    def begin(self, with_ssd: bool, with_redis: bool) -> None:
        self.runner = asyncio.Runner()
        self.ssd, self.redis = FaultyTier(Tier.SSD, 96 * KIB), FaultyTier(Tier.REDIS, 1 << 30)
        ssd, redis = self.ssd if with_ssd else None, self.redis if with_redis else None
        self.rig = Rig.make(config=CONFIG, ssd=ssd, redis=redis, spec=small_spec())
        self.run(self.rig.store.start())
        self.salts: dict[Block, set[bytes]] = {}  # every copy ever committed or held: any of them may be served
        self.holds: list[tuple[Hold, list[bytes | None], float]] = []
        self.held: dict[int, list[Block]] = {}  # by hold: the exact blocks it found, as long as nothing purged them
        self.before = 0, Counter[str]()  # changes told, counters
        self.damaged = False

    def run(self, work):  # type: ignore[no-untyped-def]
        return self.runner.run(work)

    @property
    def healthy(self) -> bool:
        return not (self.ssd.down or self.ssd.full or self.ssd.damage or self.redis.down or self.redis.damage)

    blocks = st.tuples(st.integers(0, 7), st.integers(0, 7))

    @rule(block=blocks, lossy=st.booleans())
    def put(self, block: Block, lossy: bool) -> None:
        session, depth = block
        salt, fidelity = (b"lossy", Fidelity.NEAR) if lossy else (b"", Fidelity.EXACT)
        outcome = self.run(self.rig.put(depth, session, salt=salt, fidelity=fidelity))
        assert outcome.state in ("committed", "held", "dropped"), outcome
        if outcome.state == "committed":
            self.salts.setdefault(block, set()).add(salt)
            assert self.rig.where(depth, session)

    @rule(sessions=st.lists(st.integers(0, 7), min_size=1, max_size=4, unique=True), at_once=st.booleans())
    def put_chains(self, sessions: list[int], at_once: bool) -> None:
        blocks = [(session, depth) for session in sessions for depth in range(8)]

        async def all_of_it() -> list[str]:
            puts = [self.rig.put(depth, session) for session, depth in blocks]
            done = await asyncio.gather(*puts) if at_once else [await put for put in puts]
            return [outcome.state for outcome in done]

        for block, state in zip(blocks, self.run(all_of_it()), strict=True):
            if state == "committed":
                self.salts.setdefault(block, set()).add(b"")

    @rule(blocks=st.lists(blocks, min_size=1, max_size=6, unique=True), redis=st.booleans())
    def get(self, blocks: list[Block], redis: bool) -> None:
        self.get_blocks(blocks, redis)

    def get_blocks(self, blocks: list[Block], redis: bool) -> None:
        async def all_of_it() -> list[bytes | None]:
            return await asyncio.gather(*(self.rig.get(depth, session, redis=redis) for session, depth in blocks))

        announced = [bool(self.rig.where(depth, session)) for session, depth in blocks]
        no_room = self.rig.store.counters.get("loads_no_room", 0)
        for block, known, found in zip(blocks, announced, self.run(all_of_it()), strict=True):
            self.right(block, found)
            if known and self.healthy and self.rig.store.counters.get("loads_no_room", 0) == no_room:
                assert found is not None or not self.rig.where(block[1], block[0]), "an announced block was a miss"

    @rule(tier=st.sampled_from((Tier.HOST, Tier.SSD)))
    def get_from(self, tier: Tier) -> None:
        """What lies there alone, all at once."""
        self.get_blocks([block for block in self.salts if self.rig.where(block[1], block[0]) == [tier]][:8], False)

    def right(self, block: Block, found: bytes | None) -> None:
        if found is not None:
            copies = {self.rig.raw(block[1], block[0], salt=salt) for salt in self.salts[block]}
            assert found in copies, "wrong bytes"

    @rule(session=st.integers(0, 7), depths=st.lists(st.integers(0, 7), min_size=1, max_size=4, unique=True))
    def hold(self, session: int, depths: list[int]) -> None:
        hold = self.run(self.rig.open(depths, session))
        seen = [None if placed is None else self.rig.read(placed) for placed in hold.blocks]
        for depth, found in zip(depths, seen, strict=True):
            self.right((session, depth), found)
        self.holds.append((hold, seen, self.rig.clock.now + CONFIG.hold_max_s))
        pairs = zip(depths, seen, strict=True)  # a lossy copy may be replaced by an exact one, which nobody holds
        self.held[hold.id] = [(session, depth) for depth, found in pairs if found == self.rig.raw(depth, session)]

    @precondition(lambda self: self.holds)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        hold, _, _ = self.holds.pop(data.draw(st.integers(0, len(self.holds) - 1)))
        self.run(self.later(lambda: self.rig.store.release(hold.id)))

    async def later(self, act):  # type: ignore[no-untyped-def]
        return act()

    @rule(seconds=st.sampled_from((0.3, 2.0, 31.0)))
    def tick(self, seconds: float) -> None:
        self.rig.clock.now += seconds
        self.run(self.rig.store.tick())
        self.holds = [held for held in self.holds if held[2] > self.rig.clock.now]

    @rule(down=st.booleans(), full=st.booleans())
    def trouble_the_ssd(self, down: bool, full: bool) -> None:
        self.ssd.down, self.ssd.full = down, full

    @rule(damage=st.sampled_from(("flip", "corrupt", "other", "shorten")), redis=st.booleans())
    def read_what_is_damaged(self, damage: str, redis: bool) -> None:
        """All that lies on SSD alone, from a disk that rots."""
        blocks = [block for block in self.salts if self.rig.where(block[1], block[0]) == [Tier.SSD]][:6]
        self.damaged, self.ssd.damage = True, damage
        for session, depth in blocks:
            self.right((session, depth), self.run(self.rig.get(depth, session, redis=redis)))
        self.ssd.damage = ""

    @rule(down=st.booleans(), damage=st.sampled_from(("", "", "flip")))
    def trouble_redis(self, down: bool, damage: str) -> None:
        self.redis.down, self.redis.damage = down, damage
        self.damaged = self.damaged or damage != ""

    @rule()
    def mend(self) -> None:
        self.ssd.down = self.ssd.full = self.redis.down = False
        self.ssd.damage = self.redis.damage = ""
        self.run(self.rig.store.tick())

    @rule(data=st.data(), purge_after=st.integers(0, 30), slow=st.booleans())
    def all_at_once(self, data: st.DataObject, purge_after: int, slow: bool) -> None:
        """Puts, gets, a heartbeat and a purge in each other's way; tiers answer when all have begun, or at once."""
        put = data.draw(st.lists(self.blocks, min_size=1, max_size=12, unique=True))
        asked = data.draw(st.lists(self.blocks, min_size=1, max_size=12))

        async def purge() -> None:
            for _ in range(purge_after):
                await asyncio.sleep(0)
            self.rig.store.purge(NAMESPACE)
            for gate in (self.ssd.gate, self.redis.gate):
                if gate is not None:
                    gate.set()

        async def storm() -> list[bytes | None]:
            self.ssd.gate, self.redis.gate = (asyncio.Event(), asyncio.Event()) if slow else (None, None)
            puts = [asyncio.ensure_future(self.rig.put(depth, session)) for session, depth in put]
            gets = [asyncio.ensure_future(self.rig.get(depth, session, redis=True)) for session, depth in asked]
            await asyncio.gather(purge(), *puts)
            await self.rig.store.tick()
            found = await asyncio.gather(*gets)
            self.ssd.gate = self.redis.gate = None
            return found

        for block in put:
            self.salts.setdefault(block, set()).add(b"")
        self.held.clear()
        for block, found in zip(asked, self.run(storm()), strict=True):
            self.right(block, found)

    @rule(really=st.sampled_from((False, False, False, True)))
    def purge(self, really: bool) -> None:
        if not really:
            return
        self.run(self.later(lambda: self.rig.store.purge(NAMESPACE)))
        assert self.rig.store.blocks(NAMESPACE) == 0
        self.held.clear()

    @invariant()
    def agrees(self) -> None:
        self.run(self.rig.settle())
        for hold, seen, _ in self.holds:
            for placed, found in zip(hold.blocks, seen, strict=True):
                assert placed is None or self.rig.read(placed) == found, "a held block changed"
            for session, depth in self.held.get(hold.id, ()):
                assert self.rig.where(depth, session), "a held block was evicted"
        self.nothing_went_but_on_purpose()

    def nothing_went_but_on_purpose(self) -> None:
        told = self.rig.told.get(NAMESPACE, [])
        counters = self.rig.store.counters
        gone = sum(isinstance(change, Removed) for _, change in told)
        reasons = [counters.get(name, 0) for name in ("evicted", "purged", "replaced", "left_to_redis")]
        lost = gone - sum(reasons)
        assert 0 <= lost <= counters.get("corrupt", 0), f"{lost} blocks went for no reason: {counters}"
        assert self.damaged or lost == 0
        told_before, counters_before = self.before
        self.before = len(told), Counter(counters)
        others = ("evicted", "purged", "replaced", "corrupt")
        if all(counters.get(name, 0) == counters_before[name] for name in others):
            shared = {header.key for _, header, _ in self.redis.kept.values()}
            left = {change.key for _, change in told[told_before:] if isinstance(change, Removed)}
            assert left <= shared, "a block left for Redis and is not there"

    async def let_go(self) -> None:
        for hold, _, _ in self.holds:
            self.rig.store.release(hold.id)
        await emptied(self.rig.store)

    def teardown(self) -> None:
        self.run(self.let_go())
        assert not self.ssd.used, "the store gave up what its SSD tier still counts"
        self.run(self.rig.store.close())
        self.runner.close()


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=25, stateful_step_count=35, deadline=None)


def test_the_faults_of_a_history_land() -> None:
    """The machine's own rules, in a fixed order: writes and reads below meet every trouble that they make."""
    machine = Machine()
    machine.begin(True, True)
    blocks = [(session, depth) for session in range(8) for depth in range(8)]
    for block in blocks[:40]:
        machine.put(block, False)
    machine.run(machine.rig.store.idle())
    landed = machine.ssd.landed
    machine.read_what_is_damaged("flip", False)
    assert machine.ssd.landed > landed, "nothing damaged was read"
    machine.trouble_the_ssd(True, False)
    machine.trouble_redis(True, "")
    landed, shared = machine.ssd.landed, machine.redis.landed
    for block in blocks[40:]:
        machine.put(block, False)
    machine.run(machine.rig.store.idle())
    assert machine.ssd.landed > landed and machine.redis.landed > shared, "no move met the faults"
    machine.mend()
    machine.teardown()
