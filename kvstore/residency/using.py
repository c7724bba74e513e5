"""Many blocks used, or let go of, at once: what one call opened, and what its hold kept. Pure."""

from __future__ import annotations

import numpy as np

from kvstore.policies.usage import Rows
from kvstore.residency.residency import Residency


def touch_all(residency: Residency, rows: Rows) -> None:
    """`touch` of each, in that order. Mutates."""
    if not len(rows):
        return
    present = np.frombuffer(residency.rows.present, np.uint8)[rows]
    secondary = np.frombuffer(residency.rows.secondary, np.uint8)[rows]
    if (present == present[0]).all() and (secondary == secondary[0]).all():  # mostly: then their policies are the same
        for policy in residency.policies_of(int(rows[0])):
            policy.touch_all(rows)
    else:
        for row in rows.tolist():
            residency.touch(row)


def settle_all(residency: Residency, rows: Rows, *, gone: bool) -> None:
    """The last pins of rows have ended; `gone`: some of the blocks have, too. Mutates."""
    if gone:
        for row in rows.tolist():
            residency.settle(row)
    else:
        for policies in residency.ranks:
            for policy in policies:
                policy.ready_all(rows)
