"""What the scheduler's side tells the workers' with every step, and what they report back. Plain data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata, KVConnectorWorkerMetadata

from kvstore.client.plan import HitPlan

Life = tuple[str, int]
"""A store's worker and its epoch."""


@dataclass(frozen=True, slots=True)
class Load:
    """Blocks `first`.. of a plan into pages of a request. `pages[group]`: page ids from token `skip_tokens` of block
    `first` on, to the plan's end; tokens before that are the engine's own already."""

    number: int  # unique in the life of the scheduler
    request: str
    plan: HitPlan
    first: int
    skip_tokens: int
    pages: tuple[tuple[int, ...], ...]
    synchronous: bool


@dataclass(frozen=True, slots=True)
class Save:
    """Blocks `first`.. of a request's chain out of its pages. `keys` are those of depth `known`.. of the chain: the
    blocks' own, their parent's and their placement group's are among them."""

    number: int
    request: str
    first: int
    blocks: int
    known: int
    keys: tuple[bytes, ...]
    pages: tuple[tuple[int, ...], ...]


@dataclass(slots=True)
class Step(KVConnectorMetadata):  # type: ignore[misc]
    """One step of the engine."""

    number: int = 0
    root: bytes = b""
    tokens: int = 0  # computed in this step
    loads: list[Load] = field(default_factory=list)
    saves: list[Save] = field(default_factory=list)
    preempted: tuple[str, ...] = ()  # their pages may be overwritten now
    ended: tuple[str, ...] = ()  # finished requests whose pages wait for their saves


@dataclass(slots=True)
class Report(KVConnectorWorkerMetadata):  # type: ignore[misc]
    """What happened on the workers since their last report."""

    step: int = 0  # the last one that has run
    saved: dict[int, int] = field(default_factory=dict)  # save number -> ranks that need its pages no more
    ended: dict[int, int] = field(default_factory=dict)  # save number -> ranks that have stored or dropped it
    commits: dict[Life, int] = field(default_factory=dict)  # the last seq of what was stored
    failed: dict[str, int] = field(default_factory=dict)  # request -> first depth that could not be loaded
    prefill_tokens_s: float | None = None  # the slowest rank's
    load_bytes_s: float | None = None

    def aggregate(self, other: Any) -> Report:
        """The report of several ranks as one. Pure."""
        commits = dict(self.commits)
        for life, seq in other.commits.items():
            commits[life] = max(seq, commits.get(life, 0))
        failed = dict(self.failed)
        for request, depth in other.failed.items():
            failed[request] = min(depth, failed.get(request, depth))
        return Report(
            min(self.step, other.step),
            _sum(self.saved, other.saved),
            _sum(self.ended, other.ended),
            commits,
            failed,
            _least(self.prefill_tokens_s, other.prefill_tokens_s),
            _least(self.load_bytes_s, other.load_bytes_s),
        )


def _sum(one: dict[int, int], other: dict[int, int]) -> dict[int, int]:
    return {number: one.get(number, 0) + other.get(number, 0) for number in one | other}


def _least(one: float | None, other: float | None) -> float | None:
    known = [rate for rate in (one, other) if rate is not None]
    return min(known, default=None)
