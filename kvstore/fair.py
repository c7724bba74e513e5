"""A line in which namespaces take turns by bytes, whoever asks more often. Pure.

Deficit round robin (Shreedhar and Varghese, "Efficient fair queueing using deficit round robin", 1995): each namespace
in turn may pass a quantum of bytes, what it does not use is kept for its next turn. The quantum is the largest item
seen, so a turn passes at least one and everything is O(1) amortised. Where the line is full, the longest gives way
(Suter et al., "Buffer management schemes for supporting TCP in gigabit routers", 1999: longest queue drop).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(slots=True)
class _Queue(Generic[T]):
    items: deque[tuple[T, int]] = field(default_factory=deque)
    nbytes: int = 0
    deficit: int = 0


class FairLine(Generic[T]):
    """Items of namespaces with their bytes. First in, first out within a namespace. Every method but the queries
    mutates."""

    def __init__(self) -> None:
        self.nbytes = 0
        self._quantum = 1
        self._queues: dict[str, _Queue[T]] = {}
        self._ring: deque[str] = deque()  # namespaces with items; the first one's turn is next

    def __len__(self) -> int:
        return sum(len(queue.items) for queue in self._queues.values())

    def __bool__(self) -> bool:
        return bool(self._ring)

    def waiting(self, namespace: str) -> int:
        """Bytes of a namespace in the line."""
        queue = self._queues.get(namespace)
        return 0 if queue is None else queue.nbytes

    def push(self, namespace: str, item: T, nbytes: int) -> None:
        """Last of its namespace."""
        queue = self._queues.get(namespace)
        if queue is None:
            queue = self._queues[namespace] = _Queue()
            self._ring.append(namespace)
        queue.items.append((item, nbytes))
        queue.nbytes += nbytes
        self.nbytes += nbytes
        self._quantum = max(self._quantum, nbytes)

    def serve(self, give: Callable[[str, T, int], bool], *, skip: bool) -> None:
        """Offer items in turn, `give(namespace, item, bytes)`, until none is taken any more.

        One that is not taken holds up its namespace, with `skip`; without it all of them, so that a large item is never
        passed by small ones for ever.
        """
        held_up: dict[str, None] = {}
        while len(held_up) < len(self._ring):
            namespace = self._ring[0]
            queue = self._queues[namespace]
            if namespace in held_up:
                self._ring.rotate(-1)
                continue
            item, nbytes = queue.items[0]
            if queue.deficit < nbytes:
                queue.deficit += self._quantum
                self._ring.rotate(-1)
                continue
            if not give(namespace, item, nbytes):
                if not skip:
                    return
                held_up[namespace] = None
                continue
            self._take(namespace, 0)
            if namespace in self._queues:
                queue.deficit -= nbytes

    def remove(self, namespace: str, item: T) -> bool:
        """Whether it was there."""
        queue = self._queues.get(namespace)
        for at, (known, _) in enumerate(queue.items if queue is not None else ()):
            if known is item:
                self._take(namespace, at)
                return True
        return False

    def give_way(self, namespace: str, nbytes: int, capacity: int) -> list[T] | None:
        """What has to leave so that so many bytes more of a namespace are within `capacity`: the last items of whoever
        has most. None where that would be this namespace: then nothing has changed."""
        if nbytes > capacity:
            return None
        gone: list[tuple[str, T, int]] = []
        while self.nbytes + nbytes > capacity:
            longest = max(self._queues, key=lambda name: self._queues[name].nbytes)
            if self._queues[longest].nbytes <= self.waiting(namespace) + nbytes:
                for known in reversed(gone):
                    self.push(*known)
                return None
            item, size = self._queues[longest].items[-1]
            self._take(longest, len(self._queues[longest].items) - 1)
            gone.append((longest, item, size))
        return [item for _, item, _ in gone]

    def _take(self, namespace: str, at: int) -> None:
        queue = self._queues[namespace]
        _, nbytes = queue.items[at]
        del queue.items[at]
        queue.nbytes -= nbytes
        self.nbytes -= nbytes
        if not queue.items:
            del self._queues[namespace]
            self._ring.remove(namespace)

    def validate(self) -> None:
        """AssertionError where an invariant is broken."""
        assert sorted(self._ring) == sorted(self._queues), "a namespace is lost, or twice in the ring"
        for queue in self._queues.values():
            assert queue.items and queue.nbytes == sum(nbytes for _, nbytes in queue.items), "bytes are counted wrong"
            assert 0 <= queue.deficit <= 2 * self._quantum, "a turn was saved up"
        assert self.nbytes == sum(queue.nbytes for queue in self._queues.values())
