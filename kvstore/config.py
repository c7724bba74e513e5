"""Configuration: frozen dataclasses, one TOML file, `KVSTORE_*` variables, one loader.

Every bound of the system is a field here, with its unit last in the name. An unknown key is an error.
Precedence: defaults < file < environment < explicit overrides (command line).
"""

from __future__ import annotations

import dataclasses
import os
import re
import tomllib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from kvstore.errors import ConfigError

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class StoreConfig:
    """The tier stack of one worker."""

    host_bytes: int = 2 * GIB  # arena for raw and encoded blocks together
    hot_bytes: int = 0  # of the arena, for raw blocks; 0: a quarter of host_bytes
    devices: tuple[str, ...] = ()  # hot pools on devices, "cuda:0"
    device_bytes: int = 0  # per device
    ssd_folder: str = ""  # empty: no SSD tier
    ssd_bytes: int = 16 * GIB
    ssd_segment_bytes: int = 64 * MIB
    ssd_sync_s: float = 0.5  # group commit: at most this much time is lost in a crash
    ssd_direct: bool = True  # O_DIRECT where the folder supports it
    redis_url: str = ""  # empty: no Redis tier
    redis_bytes: int = 4 * GIB  # per namespace
    redis_ttl_s: float = 86400.0  # crash cleanup
    redis_timeout_s: float = 2.0
    segment_bytes: int = 64 * MIB  # of one memfd
    block_bytes_max: int = 64 * MIB  # raw bytes of one block
    codec: str = "lossless"  # on leaving hot: lossless | lz4 | raw
    high_watermark: float = 0.90  # per tier, of its own capacity: spilling starts
    low_watermark: float = 0.80  # and stops
    policy: str = "lru"
    spill_queue_bytes: int = 256 * MIB  # in flight downwards; beyond it stores are dropped
    load_queue_bytes: int = 512 * MIB  # in flight upwards
    threads: int = 4  # byte movers
    hold_max_s: float = 30.0
    staging_bytes: int = 64 * MIB  # per connection
    staging_total_bytes: int = 512 * MIB


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """What both kinds of server share."""

    bind: str = "127.0.0.1:0"
    advertise: str = ""  # address others reach; empty: the bound one
    coordinators: tuple[str, ...] = ()
    token_file: str = ""  # cluster token; needed for any bind beyond loopback
    namespaces_file: str = ""
    node: str = ""  # a name for people; empty: the host name
    message_bytes_max: int = 8 * MIB
    calls_max: int = 256  # at a time
    local_connections_max: int = 256
    stop_grace_s: float = 5.0


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    socket: str = ""  # path of the local socket; empty: drawn in the runtime folder
    announce_batch: int = 4096  # blocks a message
    announce_queue: int = 1 << 16  # changes kept for a slow coordinator; beyond it a snapshot
    tick_s: float = 0.25


@dataclass(frozen=True, slots=True)
class CoordinatorConfig:
    heartbeat_s: float = 0.5
    lease_s: float = 3.0
    blocks_max: int = 20_000_000
    match_keys_max: int = 16_384
    match_wait_max_s: float = 0.1
    workers_max: int = 4096


@dataclass(frozen=True, slots=True)
class ClientConfig:
    coordinators: tuple[str, ...] = ()
    workers: tuple[str, ...] = ()  # local sockets to use without any coordinator
    namespace: str = "default"
    token_file: str = ""
    connect_timeout_s: float = 2.0
    match_timeout_s: float = 1.0
    get_timeout_s: float = 10.0
    put_timeout_s: float = 10.0
    staging_bytes: int = 64 * MIB
    inflight_bytes_max: int = 256 * MIB
    negative_cache_s: float = 5.0
    negative_cache_max: int = 65_536
    members_refresh_s: float = 1.0
    connections_max: int = 64


@dataclass(frozen=True, slots=True)
class FleetConfig:
    """What `kvstore up` starts."""

    name: str = "kvstore"
    address: str = ""  # of an existing Ray cluster; empty: one of our own on loopback
    nodes: int = 1  # Ray nodes of our own cluster
    workers: int = 0  # 0: one per node
    coordinators: int = 1
    state_folder: str = ""  # empty: the user's state folder
    start_timeout_s: float = 60.0


@dataclass(frozen=True, slots=True)
class Config:
    """The whole file; each process reads what it needs."""

    store: StoreConfig = field(default_factory=StoreConfig)
    server: ServerConfig = field(default_factory=ServerConfig)
    worker: WorkerConfig = field(default_factory=WorkerConfig)
    coordinator: CoordinatorConfig = field(default_factory=CoordinatorConfig)
    client: ClientConfig = field(default_factory=ClientConfig)
    fleet: FleetConfig = field(default_factory=FleetConfig)
