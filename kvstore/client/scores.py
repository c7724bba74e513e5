"""How much of a prompt each replica holds, as a coordinator answers a router. Plain data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from kvstore.errors import Corrupt
from kvstore.spec import ModelSpec, Shard
from kvstore.types import Fidelity, Tier, pack_keys
from kvstore.wire import coordinator_pb2
from kvstore.wireform import shard_to_wire


@dataclass(frozen=True, slots=True)
class ReplicaScore:
    """One candidate. `engine_tokens`: leading tokens in its own prefix cache; `tokens`: leading tokens that the workers
    of its host hold, and of these by tier (of each block the slowest that it needs)."""

    candidate: str
    known: bool
    engine_tokens: int = 0
    tokens: int = 0
    tiers: dict[Tier, int] = field(default_factory=dict)

    @property
    def here(self) -> int:
        """Leading tokens that need not cross the network."""
        return max(self.engine_tokens, self.tokens)


@dataclass(frozen=True, slots=True)
class Scores:
    """An answer. `tokens`: leading tokens that the whole fleet holds: any replica can load them. Where nobody answers
    `replicas` is empty."""

    replicas: tuple[ReplicaScore, ...] = ()
    tokens: int = 0
    complete: bool = False

    @property
    def best(self) -> ReplicaScore | None:
        """The candidate with most at hand, the first of equals; None where nobody has anything."""
        found = max(self.replicas, key=lambda replica: replica.here, default=None)
        return found if found is not None and found.here else None


def request_of(
    spec: ModelSpec, keys: Sequence[bytes], shards: Iterable[Shard], least: Fidelity, candidates: Iterable[str]
) -> coordinator_pb2.ScoreRequest:
    return coordinator_pb2.ScoreRequest(
        root=spec.root,
        keys=pack_keys(keys),
        shards=map(shard_to_wire, shards),
        least=int(least),  # type: ignore[arg-type]
        candidates=candidates,
    )


def scores_of(reply: coordinator_pb2.ScoreReply, spec: ModelSpec, blocks: int) -> Scores:
    """Corrupt where the reply does not hold together; `blocks` were asked for."""
    made = []
    for score in reply.scores:
        try:
            tiers = {Tier(entry.tier): entry.blocks * spec.block_tokens for entry in score.tiers}
        except ValueError as error:
            raise Corrupt(f"the answer to a score does not hold together: {error}") from None
        if max(score.engine_blocks, score.blocks, reply.blocks) > blocks:
            raise Corrupt("the answer to a score names more blocks than were asked for")
        held = (score.engine_blocks * spec.block_tokens, score.blocks * spec.block_tokens)
        made.append(ReplicaScore(score.candidate, score.known, *held, tiers))
    return Scores(tuple(made), min(reply.blocks, blocks) * spec.block_tokens, reply.complete)
