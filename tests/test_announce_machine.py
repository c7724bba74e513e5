"""Announcing over a bad network: at every moment a directory is the holder's state at some number, whole (I6, I7)."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvstore.directory.announce import Delta, Inbox, Outbox, Receiver, SnapshotChunk, Verdict, snapshot_chunks
from kvstore.directory.membership import Accepted, Fenced, Membership
from kvstore.directory.runs import Added, Change, Removed, blocks_of
from kvstore.types import Fidelity, Tier
from tests.cluster_model import FULL, chain, directory_for, halves, run_of

KEYS = chain(FULL, 9)
State = dict[tuple[bytes, bytes], tuple[Tier, Fidelity]]


def added(depth: int, tier: Tier) -> Added:
    """A block of one of two ranks."""
    return next(blocks_of(run_of(FULL, halves(FULL)[depth % 2], KEYS, depth, depth + 1, tier)))


Message = Delta | SnapshotChunk | int  # int: a heartbeat's head


class AnnounceMachine(RuleBasedStateMachine):
    """One worker with changes, restarts, reconnections; a network that loses, repeats, reorders; one coordinator."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.members = Membership(3.0, 100.0)
        self.inbox = Inbox(directory_for(FULL), held_max=6)
        self.network: list[tuple[int, Message]] = []  # (epoch, message)
        self.requested = False
        self.history: dict[int, dict[int, State]] = {}  # epoch -> number -> state
        self.receivers: dict[int, Receiver] = {}  # of every epoch: old streams that still talk
        self.blocks: dict[tuple[bytes, bytes], Added] = {}
        self.epoch = 0
        self.snapshots = 0
        self.restart(keep=True)

    def state(self) -> State:
        return {at: (block.tier, block.fidelity) for at, block in self.blocks.items()}

    def change(self, change: Change) -> None:
        if isinstance(change, Added):
            self.blocks[change.shard, change.key] = change
        else:
            self.blocks.pop((change.shard, change.key), None)
        self.history[self.epoch][self.outbox.push(change)] = self.state()

    def register(self) -> None:
        outcome = self.members.register("w", self.epoch, self.now)
        assert isinstance(outcome, Accepted)
        if outcome.fresh:
            self.inbox.forget("w")
        assert self.members.register("w", self.epoch - 1, self.now) == Fenced(self.epoch)
        receiver = self.inbox.open("w", self.epoch)
        assert receiver is not None and self.inbox.open("w", self.epoch - 1) is None
        self.receivers[self.epoch] = receiver
        self.inbox.directory.show("w")
        self.sent = receiver.resume()
        self.requested = False
        receiver.expect(self.outbox.head)

    @rule(keep=st.booleans())
    def restart(self, keep: bool) -> None:
        if not keep:
            self.blocks = dict(list(self.blocks.items())[::2])
        self.epoch += 1
        self.outbox = Outbox(5, head=len(self.blocks))
        self.history[self.epoch] = {0: {}, self.outbox.head: self.state()}
        self.register()

    @rule(depths=st.lists(st.integers(0, 8), min_size=1, max_size=4), tier=st.sampled_from([Tier.HOT, Tier.SSD]))
    def add(self, depths: list[int], tier: Tier) -> None:
        for depth in depths:
            self.change(added(depth, tier))

    @rule(index=st.integers(0, 20))
    def remove(self, index: int) -> None:
        if self.blocks:
            block = list(self.blocks.values())[index % len(self.blocks)]
            self.change(Removed(block.shard, block.key))

    @rule(limit=st.integers(1, 4))
    def send(self, limit: int) -> None:
        try:
            message = self.outbox.delta(self.sent, limit)
        except LookupError:
            self.send_snapshot()
            return
        if message is not None:
            self.network.append((self.epoch, message))
            self.sent = message.last_seq

    @rule()
    def heartbeat(self) -> None:
        self.network.append((self.epoch, self.sent))

    @rule()
    def send_snapshot(self) -> None:
        self.snapshots += 1
        self.sent = self.outbox.head
        for part in snapshot_chunks(self.snapshots, self.sent, self.blocks.values(), 3):
            self.network.append((self.epoch, part))

    @rule()
    def answer(self) -> None:
        if self.requested:
            self.requested = False
            self.send_snapshot()

    @rule(
        index=st.integers(0, 50), fate=st.sampled_from(["deliver", "deliver", "repeat", "lose"]), ordered=st.booleans()
    )
    def network_moves(self, index: int, fate: str, ordered: bool) -> None:
        if not self.network:
            return
        at = 0 if ordered else index % len(self.network)
        if fate == "repeat":
            self.deliver(*self.network[at])
            return
        epoch, message = self.network.pop(at)
        if fate == "deliver":
            self.deliver(epoch, message)

    @rule(count=st.integers(1, 10))
    def deliver_in_order(self, count: int) -> None:
        for epoch, message in self.network[:count]:
            self.deliver(epoch, message)
        del self.network[:count]

    def deliver(self, epoch: int, message: Message) -> None:
        """As a careless service would: to the receiver the stream began with, without asking for its epoch."""
        receiver = self.receivers[epoch]
        if isinstance(message, Delta):
            verdict = receiver.offer(message)
        elif isinstance(message, SnapshotChunk):
            verdict = receiver.snapshot(message)
        else:
            verdict = receiver.heard(message)
        if verdict is Verdict.GAP:
            assert epoch == self.epoch
            self.requested = True

    @rule(lost=st.booleans())
    def request_times_out(self, lost: bool) -> None:
        receiver = self.receivers[self.epoch]
        if receiver.in_flight:
            self.requested = receiver.reset() is Verdict.GAP and not lost

    @rule(free=st.booleans())
    def reconnect(self, free: bool) -> None:
        """The stream breaks; the same epoch comes back, within its lease or after it."""
        for _ in self.members.disconnected("w", self.epoch, self.now):
            self.inbox.directory.hide("w")
        self.now += 10.0 if free else 1.0
        for _ in self.members.tick(self.now):
            self.inbox.forget("w")
        self.register()

    @invariant()
    def the_directory_is_the_state_at_applied(self) -> None:
        receiver = self.receivers[self.epoch]
        assert self.inbox.get("w", self.epoch) is receiver
        assert self.inbox.directory.contents("w") == self.history[self.epoch][receiver.applied]
        assert receiver._held_blocks == sum(map(len, receiver._held.values())) <= 6
        self.inbox.directory.validate()

    def teardown(self) -> None:
        """Once messages arrive, a bounded number of them makes it whole (I6)."""
        receiver = self.receivers[self.epoch]
        self.network.clear()
        receiver.reset()
        self.requested = False
        for _ in range(4):
            self.request_times_out(False)
            self.answer()
            while self.sent < self.outbox.head:
                self.send(100)
            self.heartbeat()
            self.deliver_in_order(len(self.network))
        assert receiver.complete and receiver.applied == self.outbox.head and not receiver.in_flight
        assert self.inbox.directory.contents("w") == self.state()
        self.the_directory_is_the_state_at_applied()


TestAnnounceMachine = AnnounceMachine.TestCase
TestAnnounceMachine.settings = settings(
    max_examples=200, stateful_step_count=50, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
