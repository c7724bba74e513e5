"""What an announcer tells of: a worker's store, a namespace's Redis, an engine's cache."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from kvstore.catalog import Catalog
from kvstore.directory.announce import Outbox
from kvstore.directory.membership import Member
from kvstore.directory.runs import Run
from kvstore.wire import common_pb2


class Source(Protocol):
    """A holder: a worker's store, or a namespace's Redis. Numbers of `outbox` and `snapshot` are the same ones."""

    catalog: Catalog

    def member(self) -> Member:
        """As it is now, its epoch too."""

    def namespaces(self) -> Sequence[str]: ...

    def outbox(self, namespace: str) -> Outbox: ...

    def snapshot(self, namespace: str) -> tuple[int, Iterable[Run]]:
        """The number it stands for, and everything held then: taken one after the other, later."""

    def status(self) -> common_pb2.WorkerStatus | None: ...

    async def fenced(self, epoch: int) -> None:
        """A coordinator knows this higher epoch: `member().epoch` is above it when this returns."""
