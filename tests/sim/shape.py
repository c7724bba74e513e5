"""How large a simulated cluster is and how it is configured: drawn per seed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from random import Random

from kvstore.config import KIB, ClientConfig, Config, CoordinatorConfig, ServerConfig, StoreConfig, WorkerConfig
from tests.sim.network import Faults

NAMESPACES = ("default", "other")
NAMESPACES_FILE = str(Path(__file__).parent / "namespaces.toml")
PORT = 7100
FOLDER = "/ssd"
SOCKET = "/run/kvstore.sock"
REDIS_URL = "redis://redis"


@dataclass(frozen=True, slots=True)
class Shape:
    """Byte bounds are small, so that every tier is under pressure; queues are short, so that they overflow."""

    workers: int = 3
    coordinators: int = 2
    clients: int = 4
    host_bytes: int = 512 * KIB
    hot_bytes: int = 128 * KIB
    ssd_bytes: int = 512 * KIB  # 0: no SSD tier, and a new name at every start
    segment_bytes: int = 64 * KIB
    staging_total_bytes: int = 512 * KIB
    lease_s: float = 3.0
    redis: bool = False
    redis_bytes: int = 256 * KIB
    redis_ttl_s: float = 3_600.0
    announce_queue: int = 1 << 16
    announce_batch: int = 4096
    hold_max_s: float = 2.0
    raw: bool = False  # clients open raw data connections
    policy: str = "lru"  # who leaves first is none of the invariants, so earlier seeds stay what they were
    drift: float = 0.0  # share by which clocks run faster or slower

    @classmethod
    def draw(cls, rng: Random) -> Shape:
        """One of many."""
        redis = rng.random() < 0.5
        return cls(
            workers=rng.choice([2, 3, 3]),
            coordinators=rng.choice([1, 2, 3]),
            host_bytes=rng.choice([256, 384]) * KIB,
            hot_bytes=rng.choice([64, 128]) * KIB,
            ssd_bytes=(rng.choice([0, 256]) if redis else rng.choice([256, 384])) * KIB,
            redis=redis,
            redis_bytes=rng.choice([64, 512]) * KIB,
            redis_ttl_s=rng.choice([8.0, 3_600.0, 3_600.0]),
            announce_queue=rng.choice([8, 64, 1 << 16]),
            announce_batch=rng.choice([4, 4096]),
            hold_max_s=rng.choice([0.2, 2.0]),
            drift=rng.choice([0.0, 0.02]),
        )

    def worker(self, coordinators: tuple[str, ...]) -> Config:
        """Of every worker."""
        return Config(
            store=StoreConfig(
                policy=self.policy,
                host_bytes=self.host_bytes,
                hot_bytes=self.hot_bytes,
                ssd_folder=FOLDER if self.ssd_bytes else "",
                ssd_bytes=self.ssd_bytes or self.segment_bytes,
                ssd_segment_bytes=self.segment_bytes,
                segment_bytes=self.segment_bytes,
                spill_queue_bytes=64 * KIB,
                load_queue_bytes=64 * KIB,
                staging_bytes=64 * KIB,
                staging_total_bytes=self.staging_total_bytes,
                hold_max_s=self.hold_max_s,
                pin_max_s=3.0,
                redis_url=REDIS_URL if self.redis else "",
                redis_bytes=self.redis_bytes,
                redis_ttl_s=self.redis_ttl_s,
                redis_timeout_s=0.5,
            ),
            server=ServerConfig(coordinators=coordinators, stop_grace_s=1.0, namespaces_file=NAMESPACES_FILE),
            worker=WorkerConfig(
                socket=SOCKET,
                announce_queue=self.announce_queue,
                announce_batch=self.announce_batch,
                redis_lease_s=2.0,
            ),
            client=ClientConfig(data_connections_max=2 if self.raw else 0),  # of its pulls
        )

    def coordinator(self, coordinators: tuple[str, ...]) -> Config:
        """Of every coordinator."""
        return Config(
            server=ServerConfig(bind=f"127.0.0.1:{PORT}", coordinators=coordinators, namespaces_file=NAMESPACES_FILE),
            coordinator=CoordinatorConfig(lease_s=self.lease_s, hint_again_s=1.0),
        )


def client(
    coordinators: tuple[str, ...],
    namespace: str,
    workers: tuple[str, ...] = (),
    *,
    watch: bool = False,
    pull_through: bool = False,
    raw: bool = False,
) -> ClientConfig:
    """Of a client. Its staging is small: a put takes several commits."""
    return ClientConfig(
        watch=watch,
        pull_through=pull_through,
        data_connections_max=2 if raw else 0,
        coordinators=coordinators,
        workers=workers,
        namespace=namespace,
        match_timeout_s=1.0,
        get_timeout_s=3.0,
        put_timeout_s=3.0,
        staging_bytes=32 * KIB,
        negative_cache_s=1.0,
    )


def draw_faults(rng: Random) -> Faults:
    """What the links of one seed do."""
    return Faults(
        drop=rng.choice([0.0, 0.01, 0.05]),
        duplicate=rng.choice([0.0, 0.05]),
        slow=rng.choice([0.0, 0.02]),
        unruly=rng.choice([0.0, 0.05]),
        damage=rng.choice([0.0, 0.2]),
    )
