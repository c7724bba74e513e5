"""Replication as a coordinator sees it: what it has learnt of groups, and the hints that wait for each worker."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence

from kvstore.client.plan import is_redis
from kvstore.config import CoordinatorConfig
from kvstore.convert import spec_to_wire
from kvstore.directory.directory import Directory
from kvstore.directory.membership import Member, Membership, State
from kvstore.directory.placement import membership_digest
from kvstore.directory.popular import GROUPS_A_LOOKUP, Popular
from kvstore.directory.replicas import Copies, Fleet, Mark, Pull, Replicas
from kvstore.directory.runs import Run
from kvstore.wire import common_pb2, coordinator_pb2
from kvstore.wireform import member_to_wire, shard_to_wire

Reply = coordinator_pb2.AnnounceReply
Hint = tuple[str, Pull | Mark]
"""(namespace, what to do)"""

COLD_SHARE = 1 / 8
"""Of `hints_max`, what a worker that has just joined empty is told."""


class Repair:
    """Synchronous; `now` is passed in. Costs nothing for namespaces that want one copy only."""

    def __init__(
        self,
        config: CoordinatorConfig,
        wanted: Mapping[str, Copies],
        directories: Mapping[str, Directory],
        membership: Membership,
        member: Callable[[str], Member | None],
    ) -> None:
        self._config, self._directories, self._membership, self._member = config, directories, membership, member
        wanting = {name: copies for name, copies in wanted.items() if copies.wanted and name in directories}
        groups_max = max(1, config.repair_groups_max // max(1, len(wanting)))
        self._popular = {name: Popular(config.hot_groups_max, config.hot_hits, config.hot_half_s) for name in wanting}
        self._replicas = {
            name: Replicas(copies, groups_max=groups_max, again_s=config.hint_again_s, popular=self._popular[name])
            for name, copies in wanting.items()
        }
        self._fleet = Fleet({}, {})
        self.digest = membership_digest(())
        self._view: list[common_pb2.Member] = []
        self._waiting: dict[str, deque[Hint]] = {}
        self._round_at = float("-inf")
        self.counters: Counter[str] = Counter()

    # ---- what happens

    def learn(self, namespace: str, runs: Iterable[Run]) -> None:
        """A worker announced these. Mutates."""
        replicas = self._replicas.get(namespace)
        if replicas is not None:
            for run in runs:
                replicas.learn(run)

    def asked(self, namespace: str, keys: Sequence[bytes], group_blocks: int) -> None:
        """A lookup found this prefix. Mutates. O(1)."""
        popular = self._popular.get(namespace)
        if popular is not None and group_blocks > 0:
            ends = min(len(keys), GROUPS_A_LOOKUP * group_blocks)
            for group in popular.ask([keys[at] for at in range(0, ends, group_blocks)]):
                self._replicas[namespace].asked(group)

    def replaced(self, worker: str) -> None:
        """A worker registered: what it was told before may be lost. Mutates."""
        self._waiting.pop(worker, None)
        for replicas in self._replicas.values():
            replicas.forget_marks(worker)

    def again(self) -> None:
        """Look at all groups, in one round from here on. Mutates."""
        for replicas in self._replicas.values():
            replicas.again()

    def tick(self, now: float) -> None:
        """Look at some groups. Mutates. Bounded by `repair_groups` looks."""
        self._see(now)
        for name, popular in self._popular.items():
            for group in popular.tick(now):
                self._replicas[name].asked(group)
        if now - self._round_at >= self._config.repair_round_s:
            self._round_at = now
            self.again()
        busy = [name for name, replicas in self._replicas.items() if replicas.waiting]
        for name in busy:
            directory, replicas = self._directories[name], self._replicas[name]
            budget = max(1, self._config.repair_groups // len(busy))
            for hint in replicas.look(directory.shares, self._fleet, now, budget):
                self._keep(name, hint)

    def _see(self, now: float) -> None:
        """Take in who is a member now; where that changed every group is looked at again, and all marks are void."""
        state = self._membership.state
        workers = [id for id in self._membership.members() if not is_redis(id)]
        members = dict.fromkeys(id for id in workers if state(id) != State.DRAINING)
        sources = dict.fromkeys(id for id in workers if state(id) != State.SUSPECT)
        changed = members != self._fleet.members
        self._fleet = Fleet(members, sources)
        if changed:
            self.digest = membership_digest(members)
            found = (self._member(id) for id in members)
            self._view = [member_to_wire(member) for member in found if member is not None]
            self._waiting.clear()
            for replicas in self._replicas.values():
                replicas.changed(now)

    def _keep(self, namespace: str, hint: Pull | Mark) -> None:
        line = self._waiting.setdefault(hint.to, deque())
        if len(line) >= self._config.hints_queue:
            self.counters["hints_dropped"] += 1  # given again after `hint_again_s`
            return
        line.append((namespace, hint))
        self.counters["pulls_hinted" if isinstance(hint, Pull) else "marks_hinted"] += 1

    # ---- what is said

    def view(self) -> Reply:
        """Whom homes are drawn from. Pure."""
        return Reply(view=coordinator_pb2.View(digest=self.digest, members=self._view))

    def hints(self, worker: str, now: float) -> list[Reply]:
        """What waits for a worker, at most `hints_max` of it, and less in its slow start. Mutates."""
        line = self._waiting.get(worker)
        if not line:
            return []
        warmth = max(COLD_SHARE, self._membership.warmth(worker, now))
        most = max(1, int(self._config.hints_max * warmth))
        message = coordinator_pb2.Hints(view=self.digest)
        holders: dict[str, int] = {}
        specs: dict[bytes, None] = {}
        shards: dict[bytes, None] = {}
        for _ in range(min(len(line), most)):
            namespace, hint = line.popleft()
            if isinstance(hint, Mark):
                message.marks.add(namespace=namespace, shard=hint.shard, keys=hint.keys, secondary=hint.secondary)
            else:
                self._pull(message, namespace, hint, holders, specs, shards)
        if not line:
            del self._waiting[worker]
        return [Reply(hints=message)] if message.pulls or message.marks else []

    def _pull(
        self,
        message: coordinator_pb2.Hints,
        namespace: str,
        pull: Pull,
        holders: dict[str, int],
        specs: dict[bytes, None],
        shards: dict[bytes, None],
    ) -> None:
        directory = self._directories[namespace]
        spec, shard = directory.spec(pull.root), directory.shard(pull.shard)
        known = {id: member for id in pull.sources if (member := self._member(id)) is not None}
        if spec is None or shard is None or not known:
            return
        for id, member in known.items():
            if id not in holders:
                holders[id] = len(holders)
                message.holders.append(member_to_wire(member))
        if pull.root not in specs:
            specs[pull.root] = None
            message.dictionary.append(spec_to_wire(spec))
        if pull.shard not in shards:
            shards[pull.shard] = None
            message.dictionary.append(common_pb2.DictionaryEntry(shard=shard_to_wire(shard)))
        message.pulls.add(
            namespace=namespace,
            root=pull.root,
            shard=pull.shard,
            group=pull.group,
            keys=pull.keys,
            sources=[holders[id] for id in known],
        )

    def replicas(self) -> list[Replicas]:
        """Of each namespace that wants more than one copy."""
        return list(self._replicas.values())

    @property
    def groups(self) -> int:
        """Groups remembered."""
        return sum(map(len, self._replicas.values()))
