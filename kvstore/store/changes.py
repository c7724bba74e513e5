"""What a store tells others: every change of what it holds, numbered at the change, per namespace."""

from __future__ import annotations

from collections.abc import Callable

from kvstore.directory.announce import Outbox
from kvstore.directory.runs import Change

Subscriber = Callable[[str, int, Change], None]
"""(namespace, seq, change), called in the very step of the change: it must not wait, raise or change the store."""


class Changes:
    """One outbox per namespace; the last `limit` changes of each are kept for those who are behind."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._outboxes: dict[str, Outbox] = {}
        self._subscribers: list[Subscriber] = []

    def outbox(self, namespace: str) -> Outbox:
        """Made on first use."""
        found = self._outboxes.get(namespace)
        if found is None:
            found = self._outboxes[namespace] = Outbox(self.limit)
        return found

    def begin(self, namespace: str, blocks: int) -> None:
        """So many blocks were found at the start: the first numbers, which only a snapshot tells. Before any change."""
        assert namespace not in self._outboxes
        self._outboxes[namespace] = Outbox(self.limit, head=blocks)

    def push(self, namespace: str, *changes: Change) -> None:
        """Number them. Mutates, and tells the subscribers."""
        outbox, subscribers = self.outbox(namespace), self._subscribers
        for change in changes:
            seq = outbox.push(change)
            for subscriber in subscribers:
                subscriber(namespace, seq, change)

    def heads(self) -> dict[str, int]:
        """The last number given, by namespace."""
        return {namespace: outbox.head for namespace, outbox in self._outboxes.items()}

    def subscribe(self, subscriber: Subscriber) -> Callable[[], None]:
        """Returns the way to end it. Mutates."""
        self._subscribers.append(subscriber)

        def unsubscribe() -> None:
            if subscriber in self._subscribers:
                self._subscribers.remove(subscriber)

        return unsubscribe
