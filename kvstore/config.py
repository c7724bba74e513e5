"""Configuration: frozen dataclasses, one TOML file, `KVSTORE_*` variables, one loader.

Every bound of the system is a field here, with its unit last in the name. An unknown key is an error.
Precedence: defaults < file < environment < explicit overrides (command line).
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
import re
import tomllib
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvstore.errors import ConfigError
from kvstore.values import convert

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


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
    ssd_verify: bool = False  # at the start read and verify every record; else each when it is read
    ssd_write_bytes_day: int = 0  # endurance: bytes written in 24 hours at most; 0: any number
    redis_url: str = ""  # empty: no Redis tier
    redis_bytes: int = 4 * GIB  # per namespace
    redis_ttl_s: float = 86400.0  # crash cleanup
    redis_timeout_s: float = 2.0
    segment_bytes: int = 64 * MIB  # of one memfd
    block_bytes_max: int = 64 * MIB  # raw bytes of one block
    codec: str = "lossless"  # on leaving hot: lossless | dense | lz4 | zstd | raw
    high_watermark: float = 0.90  # per tier, of its own capacity: spilling starts
    low_watermark: float = 0.80  # and stops
    policy: str = "default"  # who leaves first: default (learns of reuse) | lru | s3fifo | arc
    ghost_bytes: int = 64 * MIB  # memory for what `default` remembers of evicted blocks
    caller_time: bool = False  # ages go by the times that callers send, as a replayed trace does
    spill_queue_bytes: int = 256 * MIB  # in flight downwards; beyond it stores are dropped
    load_queue_bytes: int = 512 * MIB  # in flight upwards
    threads: int = 4  # byte movers
    hold_max_s: float = 30.0
    pin_max_s: float = 60.0
    pinned_bytes: int = GIB  # per namespace, raw
    put_wait_s: float = 0.05  # for room in hot, before a put is dropped
    load_wait_s: float = 0.5  # for room in host, before a load is a miss
    purge_fence_s: float = 90.0  # after a purge: no copies from workers that have not done it, nor from Redis
    evict_after_s: float = 1.0  # all lower tiers failing for so long: blocks are evicted to make room
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
    tls_cert_file: str = ""  # PEM; with the key: TLS on the gRPC port
    tls_key_file: str = ""
    tls_client_ca_file: str = ""  # callers must show a certificate of this authority
    metrics_bind: str = ""  # HOST:PORT of /metrics, /healthz and /readyz; empty: none
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
    keys_max: int = 16_384  # blocks one call may name
    get_bytes_max: int = 1 * GIB  # raw bytes of the blocks in all Get streams at a time
    put_bytes_max: int = 512 * MIB  # of blocks coming in by Put streams, one each
    data_port: int = 0  # of raw data connections; 0: any
    data_connections_max: int = 32  # a thread each; 0: none, other hosts get and put by gRPC only
    data_idle_s: float = 60.0  # then an unused one ends
    data_tickets_max: int = 1024  # given out and not used yet
    redis_lease_s: float = 5.0  # of the worker that announces a namespace's Redis
    redis_poll_s: float = 0.25  # how often it looks for changes
    pull_queue: int = 4096  # hinted groups that wait to be copied from other workers
    pulls_max: int = 2  # groups copied at a time
    pull_bytes_max: int = 64 * MIB  # raw bytes of the blocks on their way from other workers
    pull_rate_bytes: int = 256 * MIB  # copied a second
    pull_timeout_s: float = 30.0  # of one group
    drain_s: float = 60.0  # `kvstore drain` takes at most so long
    drain_grace_s: float = 5.0  # SIGTERM: blocks are moved to other workers for so long


@dataclass(frozen=True, slots=True)
class CoordinatorConfig:
    heartbeat_s: float = 0.5
    lease_s: float = 3.0
    blocks_max: int = 20_000_000
    engine_blocks_max: int = 4_000_000  # of engines' own prefix caches, for Score
    match_keys_max: int = 16_384
    match_wait_max_s: float = 0.1
    workers_max: int = 4096
    slow_start_s: float = 30.0  # an empty newcomer is spared for so long
    snapshots_max: int = 16  # taken in at a time; whoever else has one to send waits for its turn
    repair_groups: int = 128  # placement groups looked at in one tick, a twelfth of a lease
    repair_groups_max: int = 1_000_000  # remembered, of namespaces that want more than one copy
    repair_round_s: float = 60.0  # all of them are looked at so often, and when the members change
    hints_max: int = 64  # with one heartbeat's answer
    hints_queue: int = 4096  # that wait for one worker
    hint_again_s: float = 10.0  # a copy that was hinted and is not there is hinted again
    hot_hits: int = 32  # lookups of a prefix in hot_half_s that make it hot
    hot_half_s: float = 60.0  # counts of lookups are halved
    hot_groups_max: int = 4096  # counted, per namespace
    watch_entries_max: int = 1 << 20  # a namespace with more is not watched
    watch_queue_bytes: int = 64 * MIB  # waiting for one slow watcher; beyond it the watch ends
    watchers_max: int = 256


@dataclass(frozen=True, slots=True)
class ClientConfig:
    coordinators: tuple[str, ...] = ()
    workers: tuple[str, ...] = ()  # local sockets to use without any coordinator
    namespace: str = "default"
    token_file: str = ""
    tls_ca_file: str = ""  # PEM; TLS to every server, whose certificate this authority must have signed
    tls_cert_file: str = ""  # shown to servers that ask
    tls_key_file: str = ""
    tls_server_name: str = ""  # in the servers' certificates, where those do not name their addresses
    connect_timeout_s: float = 2.0
    match_timeout_s: float = 1.0
    get_timeout_s: float = 10.0
    put_timeout_s: float = 10.0
    staging_bytes: int = 64 * MIB
    inflight_bytes_max: int = 256 * MIB
    negative_cache_s: float = 5.0
    negative_cache_max: int = 65_536
    members_refresh_s: float = 1.0
    probe_s: float = 5.0  # least time between two measurements of coordinators' round trips
    connections_max: int = 64
    data_connections_max: int = 8  # raw data connections to workers, a thread each; 0: gRPC only. A worker's pulls too
    watch: bool = False  # keep a view of the directory here: for the one process of a host that looks up
    watch_entries_max: int = 1 << 20
    watch_stale_s: float = 2.0  # without a sign of life the view is not asked
    watch_retry_s: float = 1.0  # between two attempts; ten times that where the namespace is too large
    own_commits_max: int = 65_536  # blocks put here that the view does not have yet
    pull_through: bool = False  # what another host holds comes through this host's worker, which keeps it
    tune_malloc: bool = False  # this process keeps freed memory: loads from other hosts are faster
    verify_memory: bool = False  # raw blocks in this host's memory are summed before they are copied, too


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
    worker_gpus: float = 0.0  # of each worker's own; 0: it shares those that store.devices names
    reconcile_s: float = 1.0  # between two looks at nodes and actors
    restarts_max: int = 8  # by Ray at once; then the reconciler starts an actor anew
    backoff_max_s: float = 30.0  # longest wait before an actor that keeps ending is started again


@dataclass(frozen=True, slots=True)
class Config:
    """The whole file; each process reads what it needs."""

    store: StoreConfig = field(default_factory=StoreConfig)
    server: ServerConfig = field(default_factory=ServerConfig)
    worker: WorkerConfig = field(default_factory=WorkerConfig)
    coordinator: CoordinatorConfig = field(default_factory=CoordinatorConfig)
    client: ClientConfig = field(default_factory=ClientConfig)
    fleet: FleetConfig = field(default_factory=FleetConfig)


# --- the loader ---------------------------------------------------------------------------------------------------

ENV_PREFIX = "KVSTORE_"
ENV_FILE = "KVSTORE_CONFIG"  # path of the file where none is given

Sections = Mapping[str, Mapping[str, object]]
"""section -> field -> value: the shape of the TOML file and of overrides."""

CODECS = ("lossless", "dense", "lz4", "zstd", "raw")
POLICIES = ("default", "lru", "s3fifo", "arc")
_ZERO_OK = {
    "store.ssd_write_bytes_day",
    "store.hot_bytes",
    "store.device_bytes",
    "store.ssd_sync_s",
    "fleet.workers",
    "fleet.worker_gpus",
    "client.negative_cache_s",
}
_ZERO_OK |= {"worker.drain_grace_s", "worker.data_port", "worker.data_connections_max", "client.data_connections_max"}
_ZERO_OK |= {"client.negative_cache_max", "coordinator.match_wait_max_s"}


def load_config(
    path: str | Path | None = None,
    env: Mapping[str, str] | None = None,
    overrides: Sections | None = None,
) -> Config:
    """The configuration of this process: defaults < file < environment < overrides, checked as a whole.

    `path` None: the file named by KVSTORE_CONFIG, or none. `env` None: the process environment.
    Raises ConfigError that names the key and what to write instead.
    """
    env = os.environ if env is None else env
    path = path or env.get(ENV_FILE) or None
    layers: list[tuple[str, Sections]] = []
    if path is not None:
        layers.append((str(path), _read_toml(Path(path))))
    layers.append(("environment", _from_env(env)))
    layers.append(("command line", overrides or {}))
    config = Config()
    for origin, sections in layers:
        config = _apply(config, sections, origin)
    validate(config)
    return config


def parse_toml(text: str, origin: str = "configuration") -> Config:
    """A whole configuration from TOML text, without the environment. Inverse of `to_toml`. Raises ConfigError."""
    config = _apply(Config(), _toml(text, origin), origin)
    validate(config)
    return config


def to_toml(config: Config) -> str:
    """Every key with its value, as a file that `load_config` reads back to an equal Config."""
    lines = []
    for section in dataclasses.fields(config):
        lines.append(f"[{section.name}]")
        values = getattr(config, section.name)
        # JSON's strings, numbers, booleans and arrays of strings are TOML's.
        lines += [f"{f.name} = {json.dumps(getattr(values, f.name))}" for f in dataclasses.fields(values)]
        lines.append("")
    return "\n".join(lines)


def override(config: Config, sections: Sections) -> Config:
    """A copy with some fields changed, checked as a whole. Raises ConfigError."""
    changed = _apply(config, sections, "override")
    validate(changed)
    return changed


def settings() -> dict[str, tuple[type, object]]:
    """Every key "section.field" with its type and default, in the order of the file."""
    found: dict[str, tuple[type, object]] = {}
    for section, kind in _sections().items():
        hints = typing.get_type_hints(kind)
        default = kind()
        for f in dataclasses.fields(kind):
            found[f"{section}.{f.name}"] = (hints[f.name], getattr(default, f.name))
    return found


def validate(config: Config) -> None:
    """Ranges, and what must hold between fields. Raises ConfigError naming the key. Does not mutate."""
    for key in settings():
        section, name = key.split(".")
        value = getattr(getattr(config, section), name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if not math.isfinite(value) or value < 0 or (value == 0 and key not in _ZERO_OK):
            raise ConfigError(f"{key} = {value}: must be {'at least 0' if key in _ZERO_OK else 'greater than 0'}")
    for holds, complaint in _relations(config):
        if not holds:
            raise ConfigError(complaint)


def _relations(c: Config) -> Iterator[tuple[bool, str]]:
    s, k = c.store, c.client
    ordered = s.low_watermark < s.high_watermark <= 1.0
    yield ordered, "store.low_watermark must be below store.high_watermark, and that at most 1.0"
    yield s.hot_bytes < s.host_bytes, "store.hot_bytes is a part of store.host_bytes: make it smaller"
    yield s.ssd_segment_bytes <= s.ssd_bytes, "store.ssd_segment_bytes must not exceed store.ssd_bytes"
    yield s.staging_bytes <= s.staging_total_bytes, "store.staging_bytes must not exceed store.staging_total_bytes"
    yield k.staging_bytes <= k.inflight_bytes_max, "client.staging_bytes must not exceed client.inflight_bytes_max"
    yield s.codec in CODECS, f"store.codec = {s.codec!r}: use one of {', '.join(CODECS)}"
    yield s.policy in POLICIES, f"store.policy = {s.policy!r}: use one of {', '.join(POLICIES)}"
    lease = c.coordinator.lease_s >= 2 * c.coordinator.heartbeat_s
    yield lease, "coordinator.lease_s must be at least twice coordinator.heartbeat_s"
    yield c.coordinator.match_wait_max_s <= 0.1, "coordinator.match_wait_max_s must be at most 0.1"
    name = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,31}", c.fleet.name, re.ASCII) is not None
    yield name, f"fleet.name = {c.fleet.name!r}: use 1 to 32 letters, digits, '-', '_' or '.'"
    where = re.fullmatch(r"(\[[0-9a-fA-F:]+\]|[^:\s]+):(\d{1,5})", c.server.bind)
    yield where is not None and int(where[2]) < 65536, f"server.bind = {c.server.bind!r}: write HOST:PORT (port 0: any)"


def _sections() -> dict[str, type]:
    return typing.get_type_hints(Config)


def _read_toml(path: Path) -> Sections:
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise ConfigError(f"cannot read the configuration {path}: {reason}") from error
    return _toml(text, str(path))


def _toml(text: str, origin: str) -> Sections:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{origin}: not valid TOML: {error}") from error


def _from_env(env: Mapping[str, str]) -> Sections:
    known = {f"{ENV_PREFIX}{key.replace('.', '_').upper()}": key for key in settings()}
    found: dict[str, dict[str, object]] = {}
    for variable in sorted(env):
        if not variable.startswith(ENV_PREFIX) or variable == ENV_FILE:
            continue
        if variable not in known:
            raise ConfigError(f"unknown variable {variable}{_nearest(variable, [*known, ENV_FILE])}")
        section, name = known[variable].split(".")
        found.setdefault(section, {})[name] = env[variable]
    return found


def _apply(config: Config, sections: Sections, origin: str) -> Config:
    known = _sections()
    changed: dict[str, Any] = {}
    for section, values in sections.items():
        if section not in known:
            raise ConfigError(f"{origin}: unknown section [{section}]{_nearest(section, list(known))}")
        if not isinstance(values, Mapping):
            raise ConfigError(f"{origin}: {section} is a section: write [{section}] and its keys below it")
        hints = typing.get_type_hints(known[section])
        fields: dict[str, Any] = {}
        for name, value in values.items():
            if name not in hints:
                raise ConfigError(f"{origin}: unknown key {section}.{name}{_nearest(name, list(hints), section)}")
            try:
                fields[name] = convert(f"{section}.{name}", hints[name], value)
            except ValueError as error:
                raise ConfigError(f"{origin}: {section}.{name}: {error}") from error
        changed[section] = dataclasses.replace(getattr(config, section), **fields)
    return dataclasses.replace(config, **changed)


def _nearest(name: str, known: list[str], section: str = "") -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f": did you mean {section + '.' if section else ''}{near[0]}?" if near else f"; known: {', '.join(known)}"
