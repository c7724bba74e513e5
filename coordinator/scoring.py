"""How much of a prompt each replica holds: its engine's own prefix cache, and the workers of its host. For routers.

Engines are registered, leased and announced like workers, in a registry of their own: no lookup for a load ever sees
them.
"""

from __future__ import annotations

from collections.abc import Sequence

from coordinator.registry import Registry
from kvstore.client.plan import ENGINE_HOLDER
from kvstore.directory.answers import Match
from kvstore.directory.membership import Member
from kvstore.errors import BadRequest
from kvstore.spec import Shard
from kvstore.types import Fidelity, Keys
from kvstore.wire import coordinator_pb2

CANDIDATES_MAX = 256
"""Each costs about a lookup."""


class Scoring:
    """`workers`: what Match sees; `engines`: the registry of engines. Synchronous, pure."""

    def __init__(self, workers: Registry, engines: Registry) -> None:
        self._workers, self._engines = workers, engines

    def candidates(self, namespace: str, now: float) -> list[str]:
        """Everyone who may be named: engines, and the workers of hosts without one."""
        engines = [m for m in self._engines.members(namespace, now) if self._engine(namespace, m.id, now) is not None]
        hosts = dict.fromkeys(engine.host for engine in engines)
        workers = [m.id for m in self._workers.members(namespace, now) if m.address and m.host not in hosts]
        return [engine.id.removeprefix(ENGINE_HOLDER) for engine in engines] + workers

    def _engine(self, namespace: str, id: str, now: float) -> Member | None:
        """An engine that announces to this namespace."""
        engine = self._engines.member(id, now)
        if engine is None or self._engines.inboxes[namespace].get(id, engine.epoch) is None:
            return None
        return engine

    def score(
        self,
        namespace: str,
        root: bytes,
        keys: Keys,
        shards: Sequence[Shard],
        least: Fidelity,
        candidates: Sequence[str],
        now: float,
    ) -> coordinator_pb2.ScoreReply:
        """BadRequest for too many candidates, or a shard that is no rectangle of the spec."""
        if len(candidates) > CANDIDATES_MAX:
            raise BadRequest(f"{len(candidates)} candidates: at most {CANDIDATES_MAX}, ask in several")
        directory = self._workers.inboxes[namespace].directory
        engines = self._engines.inboxes[namespace].directory
        everywhere = directory.match(root, keys, shards, least).blocks
        spec = directory.spec(root) or engines.spec(root)
        reply = coordinator_pb2.ScoreReply(blocks=everywhere, block_tokens=spec.block_tokens if spec is not None else 0)
        at_host: dict[str, list[str]] = {}
        workers = {member.id: member for member in self._workers.members(namespace, now) if member.address}
        for member in workers.values():
            at_host.setdefault(member.host, []).append(member.id)
        for candidate in candidates:
            score = reply.scores.add(candidate=candidate)
            engine = self._engine(namespace, ENGINE_HOLDER + candidate, now)
            if engine is not None:
                held = engines.match(root, keys, shards, Fidelity.EXACT, only=(engine.id,))
                score.engine_blocks = held.blocks
            near = at_host.get(engine.host, []) if engine is not None else [candidate]
            score.known = engine is not None or candidate in workers
            found = directory.match(root, keys[:everywhere], shards, least, only=near)
            score.blocks = found.blocks
            for tier, blocks in sorted(by_tier(found).items()):
                score.tiers.add(tier=tier, blocks=blocks)
        return reply


def by_tier(found: Match) -> dict[int, int]:
    """Of the blocks that a match needs, how many have their slowest shard in which tier; each shard in its fastest."""
    tiers: list[dict[Shard, int]] = [{} for _ in range(found.blocks)]
    for run in found.runs:
        for depth in range(run.first_depth, run.first_depth + run.count):
            here = tiers[depth]
            here[run.shard] = min(here.get(run.shard, run.tier), run.tier)
    counts: dict[int, int] = {}
    for here in tiers:
        if here:
            slowest = max(here.values())
            counts[slowest] = counts.get(slowest, 0) + 1
    return counts
