"""Read your writes: what this engine saves is found by its next request, though saving ends after the request does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kvstore.integrations.vllm.metadata import Life, Save
from kvstore.recent import Recent
from kvstore.seams import Clock
from kvstore.types import CommitToken

STORED_S = 5.0
STORED_MAX = 65_536
"""Blocks stored so lately may not be known to every coordinator: lookups of them show the commits."""


class OwnSaves:
    """Saves that the workers have not ended, and the commits of those they have. Only the scheduler's thread calls in.

    Bounded: the workers drop saves beyond their buffers, and tell the end of each.
    """

    def __init__(self, clock: Clock) -> None:
        self._open: dict[int, tuple[int, tuple[bytes, ...]]] = {}  # save number -> ranks to end it, its blocks
        self._storing: dict[bytes, int] = {}  # block -> the save it is in, the last one
        self._stored: Recent[bytes] = Recent(clock, STORED_S, STORED_MAX)
        self._commits: dict[Life, int] = {}  # -> the last seq, not shown to the client yet

    def begin(self, save: Save, ranks: int) -> None:
        """A save goes out with this step. Mutates."""
        keys = save.keys[save.first - save.known :]
        self._open[save.number] = (ranks, keys)
        self._storing.update(dict.fromkeys(keys, save.number))

    def ended(self, ended: Mapping[int, int], commits: Mapping[Life, int]) -> None:
        """What the workers reported: ranks that ended each save, and what the store answered. Mutates."""
        for life, seq in commits.items():
            self._commits[life] = max(seq, self._commits.get(life, 0))
        for number, ranks in ended.items():
            left, keys = self._open.get(number, (0, ()))
            if left > ranks:
                self._open[number] = (left - ranks, keys)
                continue
            self._open.pop(number, None)
            for key in keys:
                self._stored.add(key)
                if self._storing.get(key) == number:
                    del self._storing[key]

    def storing(self, keys: Sequence[bytes]) -> bool:
        """Whether any of these blocks is on its way to the store."""
        return bool(self._storing) and any(key in self._storing for key in keys)

    def shown(self, keys: Sequence[bytes]) -> list[CommitToken]:
        """The commits that a lookup of these blocks should wait for; none where they are somebody else's blocks."""
        if not self._commits or not any(key in self._stored for key in keys):
            return []
        return [CommitToken(worker, epoch, seq) for (worker, epoch), seq in self._commits.items()]

    def told(self, shown: Sequence[CommitToken]) -> None:
        """The client has these commits and goes on showing them until they are known. Mutates."""
        for token in shown:
            self._commits.pop((token.worker, token.epoch), None)
