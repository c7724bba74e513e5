"""When announcers hear of a change: at once, or, while blocks are being put, when those are there.

A message to each coordinator in the middle of a prompt's put takes the processor from the put.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

LOOK_S = 0.001
"""Between two looks at whether blocks are still being put."""

LOOKS_MAX = 5
"""So many, then it is told whatever is going on."""


class Gathering:
    """Of one store. `close` it."""

    def __init__(self, busy: Callable[[], bool], wake: Callable[[], None]) -> None:
        """`busy`: whether blocks are being put. `wake`: tells the announcers that there is something to say."""
        self._busy, self._wake = busy, wake
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._looks = 0
        self._closed = False

    def changed(self) -> None:
        """Mutates."""
        if self._timer is None and not self._closed:
            if self._busy():
                self._looks = 0
                self._timer = self._loop.call_later(LOOK_S, self._look)
            else:
                self._wake()

    def _look(self) -> None:
        self._looks += 1
        if self._busy() and self._looks < LOOKS_MAX:
            self._timer = self._loop.call_later(LOOK_S, self._look)
        else:
            self._timer = None
            self._wake()

    def close(self) -> None:
        """Tell nobody any more. Idempotent."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
