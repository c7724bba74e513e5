"""Other policies for a residency that is at work: what the old ones knew of recency the new ones begin with. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from kvstore.policies.base import Policy
from kvstore.policies.usage import Use
from kvstore.residency.family import top_of
from kvstore.residency.residency import Residency

REQUEST_BLOCKS = 64
"""That are told of as one request: what is older leaves before what is younger, in steps of so many."""


def hand_over(residency: Residency, policies: Sequence[Policy], now_s: float) -> None:
    """`policies`, one a level, decide from now on. They hear of each block once, with all its copies: those that lie
    only in slower levels first, those of one level in the order in which they would have left it. Mutates. O(rows)."""
    assert len(policies) == len(residency.levels)
    rows = residency.rows
    tops: list[list[int]] = [[] for _ in policies]
    for row, present in enumerate(rows.present):
        if present and not rows.secondary[row]:
            tops[top_of(present)].append(row)
    for level in range(len(policies) - 1, -1, -1):
        for at, row in enumerate(sorted(tops[level], key=residency.policies[level].order)):
            if at % REQUEST_BLOCKS == 0:
                policies[0].begin(Use(), now_s)
            for here, rule in enumerate(residency.levels):
                if rows.present[row] >> here & 1:
                    nbytes = rule.footprint(rows.length[here][row])
                    policies[here].admit(row, rows.ident(row), nbytes, rows.above(row), rows.depth[row])
    residency.decide_by(policies)
