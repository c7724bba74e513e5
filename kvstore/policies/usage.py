"""What a caller knows of a request that uses blocks, and of what comes after it. Advice; every field may be missing.

`Use` comes with a request, or with its end; `Hint` is about the blocks of one prompt. A policy that knows better what
to do without them may ignore both.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

PRIORITY_MAX = 8
SESSION_BYTES_MAX = 64

Rows = npt.NDArray[np.int64]
"""(n,) numbers of blocks in one worker."""


class Finish(IntEnum):
    """How an output ended."""

    UNKNOWN = 0
    TOOL_USE = 1  # a tool is called: the session most likely goes on when it has answered
    END_TURN = 2  # a person is to answer
    OTHER = 3  # cut off, or refused


@dataclass(frozen=True, slots=True)
class Use:
    """One request. `session`: the same bytes for all requests of a session; empty: found by what a prompt covers."""

    session: bytes = b""
    output_tokens: int | None = None
    finish: Finish = Finish.UNKNOWN
    time_s: float | None = None  # of the caller's clock, for a trace that is replayed
    blocks: int = 0  # of the whole prompt, 0 where it is not known


@dataclass(frozen=True, slots=True)
class Hint:
    """About the blocks that a request used last. None: not known."""

    ended: bool = False  # the session is over
    output_tokens: int | None = None
    finish: Finish = Finish.UNKNOWN
    reuse_s: float | None = None  # reuse is expected within so many seconds
    ttl_s: float | None = None  # nobody comes back after so many seconds
    priority: int = 0  # powers of two, -PRIORITY_MAX .. PRIORITY_MAX
