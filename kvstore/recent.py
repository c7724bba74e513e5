"""What happened a short while ago: failures, remembered so that they are not repeated at once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

from kvstore.seams import Clock

K = TypeVar("K", bound=Hashable)


class Recent(Generic[K]):
    """A set whose entries go after `seconds`. At most `bound`: beyond it the oldest go first."""

    def __init__(self, clock: Clock, seconds: float, bound: int) -> None:
        self._clock, self._seconds, self._bound = clock, seconds, bound
        self._until: OrderedDict[K, float] = OrderedDict()

    def add(self, entry: K) -> None:
        """Mutates; anew for one that is in already."""
        self._until[entry] = self._clock.monotonic() + self._seconds
        self._until.move_to_end(entry)
        while len(self._until) > self._bound:
            self._until.popitem(last=False)

    def discard(self, entry: K) -> None:
        self._until.pop(entry, None)

    def __contains__(self, entry: K) -> bool:
        until = self._until.get(entry)
        if until is None:
            return False
        if self._clock.monotonic() < until:
            return True
        del self._until[entry]
        return False

    def __len__(self) -> int:
        """Entries kept, some of which may have expired."""
        return len(self._until)
