"""Residency against a plain model under random histories."""

from __future__ import annotations

from itertools import takewhile

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvstore.policies.base import Lru
from kvstore.residency.check import validate
from kvstore.residency.residency import Residency
from kvstore.types import Location
from tests.residency_blocks import FULL, HOST, HOT, LEVELS, SLIDING, SSD, header_of, key_of, place

WINDOW = 2


class Machine(RuleBasedStateMachine):
    """Random histories against a dict of blocks; every block, count and byte is compared after each step."""

    def __init__(self) -> None:
        super().__init__()
        self.residency = Residency(LEVELS, Lru, lambda root, shard: WINDOW)
        self.model: dict[tuple[bytes, bytes], dict[int, Location]] = {}
        self.rows: dict[tuple[bytes, bytes], int] = {}
        self.pins: dict[int, int] = {}  # by row, zombies too
        self.secondary: set[tuple[bytes, bytes]] = set()
        self.moves: list[tuple[tuple[bytes, bytes], int, int]] = []  # id, row, level it leaves
        self.number = 0

    chains, depths = st.integers(0, 2), st.integers(0, 5)
    shards, levels = st.sampled_from((FULL, SLIDING)), st.sampled_from((HOT, HOST, SSD))

    def where(self) -> Location:
        self.number += 1
        return place(self.number, 1 + self.number % 9000)

    @rule(chain=chains, depth=depths, shard=shards, level=levels)
    def come(self, chain: int, depth: int, shard: bytes, level: int) -> None:
        id = (shard, key_of(chain, depth))
        where = self.where()
        if id not in self.model:
            header = header_of(chain, depth, shard)
            self.rows[id] = self.residency.admit("n", header, level, where, leaf_first=shard == FULL)
            self.model[id] = {}
        elif level not in self.model[id]:
            self.residency.add(self.rows[id], level, where)
        else:
            return
        self.model[id][level] = where

    @rule(chain=chains, level=levels, kept=st.lists(st.booleans(), min_size=1, max_size=6))
    def prompt(self, chain: int, level: int, kept: list[bool]) -> None:
        """A prompt of both groups; of the window only some blocks."""
        for depth, windowed in enumerate(kept):
            if windowed:
                self.come(chain, depth, SLIDING, level)
            self.come(chain, depth, FULL, level)

    def pick(self, data: st.DataObject) -> tuple[bytes, bytes]:
        return data.draw(st.sampled_from(sorted(self.model)))

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def touch(self, data: st.DataObject) -> None:
        self.residency.touch(self.rows[self.pick(data)])

    @precondition(lambda self: self.model)
    @rule(data=st.data(), yes=st.booleans())
    def mark(self, data: st.DataObject, yes: bool) -> None:
        id = self.pick(data)
        self.residency.mark_secondary(self.rows[id], yes)
        (self.secondary.add if yes else self.secondary.discard)(id)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def pin(self, data: st.DataObject) -> None:
        row = self.rows[self.pick(data)]
        self.residency.pin(row)
        self.pins[row] = self.pins.get(row, 0) + 1

    @precondition(lambda self: self.pins)
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        row = data.draw(st.sampled_from(sorted(self.pins)))
        self.residency.unpin(row)
        self.pins[row] -= 1
        if not self.pins[row]:
            del self.pins[row]

    @rule(level=levels)
    def spill(self, level: int) -> None:
        """Name a victim: it must be there, unpinned, not leaving; then drop it or begin to move it."""
        row = self.residency.victim(level, force=True)
        moving = {(row, at) for _, row, at in self.moves}
        free = [id for id, where in self.model.items() if level in where and self.rows[id] not in self.pins]
        able = [id for id in free if (self.rows[id], level) not in moving]
        assert (row is None) == (not able)
        if row is None:
            return
        id = next(id for id in able if self.rows[id] == row)
        if id not in self.secondary:  # then no secondary block was free to go
            free = [i for i in able if i in self.secondary and self.residency.may_leave(self.rows[i], level)]
            assert not free, "a primary copy goes before a secondary one"
        if id[0] == SLIDING and not self.residency.elsewhere(row, level):
            self.spared(id, level)
        if self.residency.elsewhere(row, level) or level == SSD:
            assert self.residency.drop(row, level) == self.model[id].pop(level)
            self.forget(id)
        else:
            self.residency.work(row)
            self.residency.leave(row, level)
            self.moves.append((id, row, level))

    def spared(self, id: tuple[bytes, bytes], level: int) -> None:
        """The last copy of a window block leaves: no full-attention block hangs on it that could go instead."""
        chain, depth = (int.from_bytes(part, "little") for part in (id[1][:8], id[1][8:]))
        depths = range(depth, 6)
        full = list(takewhile(lambda d: (FULL, key_of(chain, d)) in self.model, depths))
        window = [(SLIDING, key_of(chain, d)) in self.model for d in full[1:]]
        if any(all(window[at : at + WINDOW]) for at in range(len(window) - WINDOW + 1)):
            return  # the prompt has its window deeper down
        for d in full:
            other = (FULL, key_of(chain, d))
            able = self.residency.may_leave(self.rows[other], level)
            assert not able or (id in self.secondary and other not in self.secondary), "the window goes first"

    @precondition(lambda self: self.moves)
    @rule(data=st.data(), works=st.booleans())
    def arrive(self, data: st.DataObject, works: bool) -> None:
        """A move ends: flip when it worked and the block is still wanted there, else it stays."""
        id, row, level = self.moves.pop(data.draw(st.integers(0, len(self.moves) - 1)))
        if self.residency.gone(row):
            self.residency.done(row)
            return
        if works and level + 1 not in self.model[id]:
            where = self.where()
            self.residency.add(row, level + 1, where)
            self.model[id][level + 1] = where
        if works and row not in self.pins:
            self.residency.drop(row, level)
            del self.model[id][level]
            self.forget(id)
        else:
            self.residency.stay(row, level)
        self.residency.done(row)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def purge(self, data: st.DataObject) -> None:
        """All copies go, pinned or not; a moved or pinned row becomes a zombie."""
        id = self.pick(data)
        for level in list(self.model[id]):
            self.residency.drop(self.rows[id], level, evicted=False, force=True)
            del self.model[id][level]
        self.forget(id)

    def forget(self, id: tuple[bytes, bytes]) -> None:
        if not self.model[id]:
            del self.model[id]
            del self.rows[id]
            self.secondary.discard(id)

    @invariant()
    def agrees(self) -> None:
        validate(self.residency)
        assert len(self.residency) == len(self.model)
        busy = {row for _, row, _ in self.moves} | set(self.pins)
        assert len(self.residency.rows) == len(set(self.rows.values()) | busy), "a row leaked"
        for key in {key for _, key in self.model}:
            groups = {shard: where for (shard, name), where in self.model.items() if name == key}
            bitmaps = {shard: sum(1 << level for level in where) for shard, where in groups.items()}
            assert self.residency.presence("n", key) == bitmaps
        for (shard, key), where in self.model.items():
            row = self.residency.find("n", shard, key)
            assert row == self.rows[shard, key]
            assert row is not None and self.residency.pinned(row) == (row in self.pins)
            assert self.residency.secondary(row) == ((shard, key) in self.secondary)
            for level in (HOT, HOST, SSD):
                assert self.residency.present(row, level) == (level in where)
                if level in where:
                    assert self.residency.location(row, level) == where[level]


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=120, stateful_step_count=50, deadline=None)
