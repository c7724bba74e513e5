"""A coordinator as a Ray actor: its address is fixed, so that a restarted one is found where the old one was."""

from __future__ import annotations

from typing import Any

from coordinator.runtime import CoordinatorRuntime
from kvstore.config import Config
from kvstore.fleet.actor import ServerActor
from kvstore.seams import System
from kvstore.transport.base import Transport


class CoordinatorActor(ServerActor):
    """Async actor; `report` tells id and address too."""

    def make(self, config: Config, system: System, transport: Transport) -> CoordinatorRuntime:
        return CoordinatorRuntime(config, system, transport)

    def describe(self, runtime: CoordinatorRuntime) -> dict[str, Any]:
        return {"id": runtime.id, "address": runtime.address}
