"""ARC: two lists, of what was used once and of what was used again, and ghosts of both that say which one is too short.

Megiddo and Modha, "ARC: a self-tuning, low overhead replacement cache", FAST 2003, section IV, where the capacity is
the number of blocks on the level: it is full whenever anybody asks for a victim. Queues, set-asides and hints are those
of `kvstore.policies.s3fifo`.
"""

from __future__ import annotations

from kvstore.policies.s3fifo import ABSENT, FIRST_TICK, GHOSTS_MIN, MAIN, ROW_BITS, SMALL, S3Fifo

ONCE, AGAIN = SMALL, MAIN


class Arc(S3Fifo):
    """A `kvstore.policies.base.Policy`."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: tuple[dict[int, None], dict[int, None]] = ({}, {})  # ghosts of each list, oldest first
        self._listed = [0, 0]  # blocks
        self._target = 0.0  # blocks that ONCE should have

    def admit(self, row: int, ident: int, nbytes: int, above: int = 0, depth: int = 0) -> None:
        super().admit(row, ident, nbytes)
        once, again = self._seen
        ident = self._ident[row]
        if ident in once:
            self._target = min(self._rows, self._target + max(1.0, len(again) / len(once)))
            del once[ident]
        elif ident in again:
            self._target = max(0.0, self._target - max(1.0, len(once) / len(again)))
            del again[ident]
        else:
            return
        self._leave_queue(row)
        self._enter(row, AGAIN)

    def touch(self, row: int) -> None:
        assert self._tick[row] != ABSENT, f"row {row} is touched but absent"
        self._leave_queue(row)
        self._enter(row, AGAIN)

    def remove(self, row: int, *, evicted: bool) -> None:
        queue, ident = self._queue[row], self._ident[row]
        super().remove(row, evicted=False)
        if not evicted:
            return
        self._seen[queue][ident] = None
        once, again = self._seen
        room = max(GHOSTS_MIN, self._rows)
        while once and len(once) > max(0, room - self._listed[ONCE]):
            del once[next(iter(once))]
        while again and len(again) > max(0, 2 * room - self._rows - len(once)):
            del again[next(iter(again))]

    def _return(self, row: int) -> None:
        self._push(self._back[self._queue[row]], self._tick[row] << ROW_BITS | row)

    def _by_queue(self) -> int | None:
        queue = ONCE if self._listed[ONCE] > self._target else AGAIN
        row = self._first(self._line[queue], self._back[queue])
        return self._first(self._line[1 - queue], self._back[1 - queue]) if row is None else row

    def order(self, row: int) -> int:
        tick = self._tick[row]
        if tick <= FIRST_TICK:
            return tick
        first = ONCE if self._listed[ONCE] > self._target else AGAIN
        return tick + ((self._queue[row] != first) << 60)

    def _enter(self, row: int, queue: int) -> None:
        super()._enter(row, queue)
        self._listed[queue] += 1

    def _leave_queue(self, row: int) -> None:
        super()._leave_queue(row)
        self._listed[self._queue[row]] -= 1
