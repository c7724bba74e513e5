"""Any changes in any order, and holes wherever they may be: the directory answers as the plain model does (I9)."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvstore.directory.runs import Run
from kvstore.spec import ModelSpec, Shard
from kvstore.types import Fidelity, Tier
from tests.cluster_model import (
    FULL_SLIDING,
    FULL_STATE,
    SPECS,
    Kept,
    Model,
    chain,
    check_answer,
    directory_for,
    halves,
    rectangles,
    run_of,
)

HOLDERS = ("w1", "w2", "w3")


class DirectoryMachine(RuleBasedStateMachine):
    """Any changes in any order: the directory answers as the model does."""

    @initialize(spec=st.sampled_from(SPECS))
    def start(self, spec: ModelSpec) -> None:
        self.spec = spec
        self.model = Model(spec)
        self.directory = directory_for(spec, copies_max=1000)
        self.keys = chain(spec, 7)
        self.other = self.keys[:3] + chain(spec, 4, b"other")
        self.shards = rectangles(spec)

    def runs(self, data: st.DataObject) -> Run:
        keys = data.draw(st.sampled_from([self.keys, self.other]))
        first = data.draw(st.integers(0, 6))
        stop = data.draw(st.integers(first + 1, 7))
        shard = data.draw(st.sampled_from(self.shards))
        tier = data.draw(st.sampled_from([Tier.HOT, Tier.SSD]))
        fidelity = data.draw(st.sampled_from([Fidelity.EXACT, Fidelity.EXACT, Fidelity.NEAR]))
        return run_of(self.spec, shard, keys, first, stop, tier, fidelity)

    @rule(holder=st.sampled_from(HOLDERS), shards=st.sets(st.integers(0, 12)), stop=st.integers(1, 7))
    def add_much(self, holder: str, shards: set[int], stop: int) -> None:
        for index in sorted(shards):
            run = run_of(self.spec, self.shards[index % len(self.shards)], self.keys, 0, stop)
            self.directory.add(holder, run)
            self.model.add(holder, run)

    @rule(holder=st.sampled_from(HOLDERS), data=st.data())
    def add(self, holder: str, data: st.DataObject) -> None:
        run = self.runs(data)
        self.directory.add(holder, run)
        self.model.add(holder, run)

    @rule(holder=st.sampled_from(HOLDERS), data=st.data())
    def remove(self, holder: str, data: st.DataObject) -> None:
        run = self.runs(data)
        self.directory.remove(holder, run.shard, run.keys)
        self.model.remove(holder, run.shard, run.keys)

    @rule(holder=st.sampled_from(HOLDERS), count=st.integers(0, 3), data=st.data())
    def replace(self, holder: str, count: int, data: st.DataObject) -> None:
        runs = [self.runs(data) for _ in range(count)]
        self.directory.replace(holder, runs)
        self.model.holders.setdefault(holder, Kept()).blocks.clear()
        for run in runs:
            self.model.add(holder, run)

    @rule(holder=st.sampled_from(HOLDERS))
    def drop(self, holder: str) -> None:
        self.directory.drop(holder)
        self.model.holders.pop(holder, None)

    @rule(holder=st.sampled_from(HOLDERS), hidden=st.booleans())
    def hide_or_show(self, holder: str, hidden: bool) -> None:
        if hidden:
            self.directory.hide(holder)
            self.model.holders.setdefault(holder, Kept()).hidden = True
        else:
            self.directory.show(holder)
            if holder in self.model.holders:
                self.model.holders[holder].hidden = False

    @rule(budget=st.integers(0, 20))
    def sweep(self, budget: int) -> None:
        self.directory.sweep(budget)

    @rule(data=st.data(), other=st.booleans(), least=st.sampled_from([Fidelity.NEAR, Fidelity.EXACT]))
    def match(self, data: st.DataObject, other: bool, least: Fidelity) -> None:
        needed = data.draw(st.lists(st.sampled_from(self.shards), min_size=1, max_size=3))
        keys = self.other if other else self.keys
        check_answer(self.directory.match(self.spec.root, keys, needed, least), self.model, keys, needed, least)

    @invariant()
    def every_rank_of_every_group(self) -> None:
        if hasattr(self, "spec"):
            needed = [Shard.whole(self.spec, group) for group in range(len(self.spec.groups))]
            match = self.directory.match(self.spec.root, self.keys, needed, Fidelity.EXACT)
            check_answer(match, self.model, self.keys, needed, Fidelity.EXACT)

    @invariant()
    def contents_and_counts(self) -> None:
        if hasattr(self, "spec"):
            for holder in HOLDERS:
                kept = self.model.holders.get(holder, Kept()).blocks
                assert self.directory.contents(holder) == {at: block[:2] for at, block in kept.items()}
            for shard in self.shards[:2]:
                shares = {
                    holder: sum(1 << i for i, key in enumerate(self.keys) if (shard.digest, key) in kept.blocks)
                    for holder, kept in self.model.holders.items()
                }
                expected = {holder: mask for holder, mask in shares.items() if mask}
                assert self.directory.shares(shard.digest, self.keys) == expected
            assert self.directory.blocks == sum(len(kept.blocks) for kept in self.model.holders.values())
            self.directory.validate()


TestDirectoryMachine = DirectoryMachine.TestCase
TestDirectoryMachine.settings = settings(
    max_examples=60, stateful_step_count=25, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


Depths = st.lists(st.booleans(), min_size=9, max_size=9)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from([FULL_SLIDING, FULL_STATE]), st.data())
def test_two_groups_two_ranks_any_holes(spec: ModelSpec, data: st.DataObject) -> None:
    """I9: whatever is missing of whichever rank and group, wherever it lies."""
    directory, model, keys = directory_for(spec, copies_max=1000), Model(spec), chain(spec, 9)
    needed = [*halves(spec, 0), *halves(spec, 1)]
    for shard in needed:
        for holder in HOLDERS[:2]:
            held = data.draw(Depths)
            edges = [depth for depth in range(10) if depth in (0, 9) or held[depth] != held[depth - 1]]
            for first, stop in pairwise(edges):
                if held[first] or (shard.group == 0 and data.draw(st.booleans())):
                    run = run_of(spec, shard, keys, first, stop)
                    directory.add(holder, run)
                    model.add(holder, run)
    for asked in (needed, needed[:2], needed[2:], needed[1::2], [Shard.whole(spec, 1)]):
        check_answer(directory.match(spec.root, keys, asked, Fidelity.EXACT), model, keys, asked, Fidelity.EXACT)
