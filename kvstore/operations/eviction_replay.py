"""A trace replayed through a policy alone: no bytes, no clock, one level of equal blocks.

The model: a request first looks up its leading run of present blocks, then all its blocks are accessed or inserted from
leaf to root; capacity in blocks; no pins; a block may leave while none of its children is present. Hits are counted
over the requests of the second half of the time span; the first half warms the cache.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from kvstore.operations.trace import Request
from kvstore.policies.base import Policy
from kvstore.policies.usage import Finish, Hint, Use

FINISHES = {"tool_use": Finish.TOOL_USE, "end_turn": Finish.END_TURN, "other": Finish.OTHER}
REPORT_REQUESTS = 256
_MIX = 0x9E3779B97F4A7C15
_U64 = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class BlockTrace:
    """A whole trace in columns; blocks are numbered as they come."""

    times: list[float]  # s, rising
    outputs: list[int]  # tokens
    finishes: list[Finish]
    ends: npt.NDArray[np.int64]  # where each request's blocks end in `blocks`
    blocks: npt.NDArray[np.int32]  # root first
    parent: list[int]  # by block, -1 for a root
    depth: list[int]  # by block
    first_counted: int  # request
    last_of_session: list[bool] = field(default_factory=list)  # no later request goes on where it ended

    @property
    def distinct(self) -> int:
        return len(self.parent)

    def of(self, request: int) -> list[int]:
        """The blocks of a request, root first."""
        begin = int(self.ends[request - 1]) if request else 0
        found: list[int] = self.blocks[begin : int(self.ends[request])].tolist()
        return found


def block_trace(requests: Iterable[Request]) -> BlockTrace:
    """In columns. Timestamps that go back are held at the latest one."""
    number: dict[int, int] = {}
    times, outputs, finishes, ends = list[float](), list[int](), list[Finish](), array("q")
    blocks, parent, depth = array("i"), list[int](), list[int]()
    last = list[bool]()
    ended: dict[int, int] = {}  # block -> request that ended with it and was not continued
    for request in requests:
        above = -1
        for level, name in enumerate(request.hash_ids):
            block = number.setdefault(name, len(number))
            if block == len(parent):
                parent.append(above)
                depth.append(level)
            blocks.append(block)
            above = block
        ends.append(len(blocks))
        times.append(max(request.timestamp_ms / 1000, times[-1] if times else 0.0))
        outputs.append(request.output_tokens)
        finishes.append(FINISHES.get(request.finish, Finish.UNKNOWN))
        last.append(True)
        for block in reversed(blocks[len(blocks) - len(request.hash_ids) :]):
            before = ended.pop(block, None)
            if before is not None:
                last[before] = False
                break
        if above >= 0:
            ended[above] = len(times) - 1
    middle = (times[0] + times[-1]) / 2 if times else 0.0
    counted = next((index for index, time in enumerate(times) if time >= middle), 0)
    return BlockTrace(
        times, outputs, finishes, np.array(ends, np.int64), np.array(blocks, np.int32), parent, depth, counted, last
    )


@dataclass(slots=True)
class Outcome:
    """Of one replay."""

    hits: int = 0  # blocks of leading runs, in the counted requests
    asked: int = 0  # blocks of the counted requests
    accesses: int = 0  # of all requests: a decision each
    written: int = 0  # blocks that came in and did not leave at once

    @property
    def percent(self) -> float:
        return 100.0 * self.hits / self.asked if self.asked else 0.0


@dataclass(frozen=True, slots=True)
class Knows:
    """What the policy is told."""

    outputs: bool = True  # how many tokens were generated, and how that ended
    session_ends: bool = False  # that nobody will go on from here: a perfect hint


class Replay:
    """One run of a trace through one policy. A block's row is its number."""

    def __init__(self, trace: BlockTrace, policy: Policy, capacity: int, knows: Knows = Knows()) -> None:
        self.trace, self.policy, self.capacity, self.knows = trace, policy, max(1, capacity), knows
        self.outcome = Outcome()
        self._present = bytearray(trace.distinct)
        self._children = array("i", bytes(4 * trace.distinct))  # present ones
        self._count = 0
        self._ident = [(block + 1) * _MIX & _U64 for block in range(trace.distinct)]

    def run(self, progress: Callable[[int], None] = lambda requests: None) -> Outcome:
        """`progress` is told of every few requests. Mutates the policy."""
        self.play(0, len(self.trace.times), progress)
        return self.outcome

    def play(self, first: int, end: int, progress: Callable[[int], None] = lambda requests: None) -> None:
        """These requests, after those before them. Mutates."""
        trace, policy, present = self.trace, self.policy, self._present
        for request in range(first, end):
            blocks = trace.of(request)
            leading = self._leading(blocks)
            if request >= trace.first_counted:
                self.outcome.hits += leading
                self.outcome.asked += len(blocks)
            self.outcome.accesses += len(blocks)
            here = [block for block in reversed(blocks) if present[block]]
            policy.begin(self._use(request, len(blocks)), trace.times[request], here)
            self._access(blocks)
            if self.knows.session_ends and trace.last_of_session[request]:
                deepest = next((block for block in reversed(blocks) if present[block]), None)
                if deepest is not None:
                    policy.hint(deepest, Hint(ended=True))
            if request % REPORT_REQUESTS == REPORT_REQUESTS - 1:
                progress(REPORT_REQUESTS)

    def _use(self, request: int, blocks: int) -> Use:
        if not self.knows.outputs:
            return Use(blocks=blocks)
        return Use(output_tokens=self.trace.outputs[request], finish=self.trace.finishes[request], blocks=blocks)

    def _leading(self, blocks: Sequence[int]) -> int:
        present = self._present
        for count, block in enumerate(blocks):
            if not present[block]:
                return count
        return len(blocks)

    def _access(self, blocks: Sequence[int]) -> None:
        policy, present, children, parent = self.policy, self._present, self._children, self.trace.parent
        for block in reversed(blocks):
            if present[block]:
                policy.touch(block)
                continue
            above = parent[block]
            present[block] = 1
            self._count += 1
            if above >= 0:
                children[above] += 1
            policy.admit(block, self._ident[block], 1, self._ident[above] if above >= 0 else 0, self.trace.depth[block])
            self.outcome.written += 1
            if self._count > self.capacity:
                self._evict(block)

    def _evict(self, came: int) -> None:
        children = self._children
        row = self.policy.victim(lambda block: not children[block])
        assert row is not None
        self.policy.remove(row, evicted=True)
        self._present[row] = 0
        self._count -= 1
        self.outcome.written -= row == came
        above = self.trace.parent[row]
        if above >= 0:
            children[above] -= 1
            if not children[above] and self._present[above]:
                self.policy.ready(above)
