"""A worker process: its store, the two servers, the announcers."""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import Sequence
from contextlib import AsyncExitStack

from kvstore.announce import Outbox
from kvstore.auth import Authenticator, load_policy, node_credentials
from kvstore.catalog import Catalog
from kvstore.config import Config
from kvstore.errors import SetupError
from kvstore.identity import Identity, claim
from kvstore.membership import Member
from kvstore.runs import Added
from kvstore.seams import System
from kvstore.store import TieredStore
from kvstore.transport.base import Server, Transport
from kvstore.wire import common_pb2
from workers.announcer import Announcer
from workers.local import LocalService
from workers.node import Node
from workers.service import WorkerService


class StoreSource:
    """`workers.announcer.Source` of a worker's own store."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self.catalog: Catalog = node.catalog

    def member(self) -> Member:
        return self._node.member()

    def namespaces(self) -> Sequence[str]:
        return list(self._node.store.heads())

    def outbox(self, namespace: str) -> Outbox:
        return self._node.store.outbox(namespace)

    def snapshot(self, namespace: str) -> tuple[int, list[Added]]:
        return self._node.store.snapshot(namespace)

    def status(self) -> common_pb2.WorkerStatus:
        return self._node.status()

    async def fenced(self, epoch: int) -> None:
        try:
            await self._node.identity.raise_epoch(epoch + 1)
        except SetupError:
            self._node.counters["errors_epoch_not_kept"] += 1  # tried again with the next registration
