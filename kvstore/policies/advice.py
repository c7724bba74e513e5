"""What callers say of their requests, brought to the policies of one worker's residency. Pure: the time is passed in.

A request is told of by its first call: `begin` with what is known of it, or, where nobody says anything, by the blocks
it opens (`opened`). What it stores afterwards follows the block it hangs on (`storing`).
"""

from __future__ import annotations

from collections.abc import Sequence

from kvstore.header import Header
from kvstore.policies.usage import Hint, Rows, Use
from kvstore.residency.residency import Residency
from kvstore.residency.rows import Rows as Columns
from kvstore.residency.using import touch_all

JOIN_S = 1.0  # a request that is told of and then opens its blocks is one
FOLLOW_S = 300.0  # what a request stores comes while it runs


class Advice:
    """One per worker. `caller_time`: ages go by the times that requests bring, as a replayed trace does."""

    def __init__(self, residency: Residency, *, caller_time: bool = False) -> None:
        self._residency = residency
        self._caller_time = caller_time
        self._latest_s = 0.0  # of the callers' times
        self._stored = ("", b"", -JOIN_S)  # namespace, shard and time of what was stored last

    def now(self, now_s: float) -> float:
        """What ages go by. Pure."""
        return self._latest_s if self._caller_time else now_s

    def begin(self, use: Use, rows: Sequence[int], now_s: float) -> None:
        """A request uses these blocks, deepest first, and says what it knows. Mutates."""
        if self._caller_time and use.time_s is not None:
            self._latest_s = max(self._latest_s, use.time_s)
        known = Use(use.session, use.output_tokens, use.finish, None, use.blocks)
        self._residency.policies[0].begin(known, self.now(now_s))
        for row in rows:
            self._residency.touch(row)

    def opened(self, rows: Rows, now_s: float) -> None:
        """These blocks are opened, deepest first: by the request that told of them just now, or a new one. Mutates."""
        self._residency.policies[0].follow(int(rows[0]) if len(rows) else None, 0, self.now(now_s), JOIN_S)
        touch_all(self._residency, rows)

    def storing(self, namespace: str, header: Header, now_s: float) -> None:
        """A block is about to be stored, and what hangs on it after it. Mutates."""
        space = self._residency.space_of(namespace, header.shard)
        above = Columns.ident_of(space, header.parent) if header.depth and space is not None else 0
        coming = Columns.ident_of(space, header.key) if space is not None else 0
        lost = above and self._residency.find(namespace, header.shard, header.parent) is None
        stored, self._stored = self._stored, (namespace, header.shard, now_s)
        if lost and stored[:2] == self._stored[:2] and now_s - stored[2] <= JOIN_S:
            return  # complete before its parent is, or that was dropped: most likely the request that stored just now
        self._residency.policies[0].follow(None, above, self.now(now_s), FOLLOW_S, coming)

    def hint(self, row: int, hint: Hint) -> None:
        """About the request that used a block last; once is enough for all blocks of a request. Mutates."""
        for policy in self._residency.policies_of(row):
            policy.hint(row, hint)
