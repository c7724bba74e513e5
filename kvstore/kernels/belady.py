"""The best any policy could do: Belady's optimum over a trace of chained blocks.

Belady, "A study of replacement algorithms for a virtual-storage computer", 1966: of all blocks, the incoming one among
them (bypass), the one leaves whose next use is furthest. A request uses whole prefixes, so many next uses are equal; of
those the deepest leaves first, which keeps prefixes whole and makes the number of hits exact.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kvstore.kernels import jit

DEPTH_MAX = 1 << 20


@jit
def hits(ends: Any, blocks: Any, depth: Any, capacity: Any, first_counted: Any) -> Any:
    """Blocks of leading present runs in the requests from `first_counted` on.

    `ends` int64 [requests], where each one's blocks end in `blocks` int32 (root first); `depth` int64 by block.
    Evicting after each request is the same as one by one: what is kept is the least of all there is.
    """
    requests, distinct = len(ends), len(depth)
    following = np.empty(len(blocks), np.int64)  # by access: the request that uses the block next
    upcoming = np.full(distinct, requests, np.int64)
    for r in range(requests - 1, -1, -1):
        for i in range(ends[r - 1] if r else 0, ends[r]):
            following[i] = upcoming[blocks[i]]
            upcoming[blocks[i]] = r
    present = np.zeros(distinct, np.bool_)
    kept: Any = np.empty(distinct, np.int64)
    count = found = 0
    for r in range(requests):
        begin, end = np.int64(ends[r - 1] if r else 0), np.int64(ends[r])
        at: Any = begin
        while at < end and present[blocks[at]]:
            at += 1
        if r >= first_counted:
            found += at - begin
        for i in range(begin, end):
            block = np.int64(blocks[i])
            upcoming[block] = following[i]
            if not present[block]:
                present[block] = True
                kept[count] = block
                count += 1
        if count > capacity:
            count = _evict(upcoming, depth, present, kept, count, capacity)
    return found


@jit
def _evict(upcoming: Any, depth: Any, present: Any, kept: Any, count: Any, capacity: Any) -> Any:
    """Keep the `capacity` blocks used soonest, the shallowest first among equals; how many that are. Mutates."""
    order = np.empty(count, np.int64)
    for j in range(count):
        order[j] = upcoming[kept[j]] * DEPTH_MAX + min(depth[kept[j]], DEPTH_MAX - 1)
    bound = np.partition(order, capacity)[capacity]
    equal = capacity
    for j in range(count):
        equal -= order[j] < bound
    left = 0
    for j in range(count):
        block = kept[j]
        stays = order[j] < bound
        if order[j] == bound and equal > 0:
            equal -= 1
            stays = True
        if stays:
            kept[left] = block
            left += 1
        else:
            present[block] = False
    return left
