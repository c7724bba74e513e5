"""What is known of a fleet that is up: one JSON file in its folder, written when it is ready and removed by `down`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from kvstore.config import ClientConfig, FleetConfig
from kvstore.errors import SetupError
from kvstore.machine.disk import FolderDisk
from kvstore.machine.processes import ProcessId

STATE_FILE = "fleet.json"
STATUS_FILE = "reconciler.json"
STATE_VERSION = 1
SSD_FOLDER = "ssd"  # in the fleet's folder, where no other is named
MARK = "TIERED_KVSTORE_FLEET"
"""Environment variable every process of a fleet inherits: `down` ends what carries it, and nothing else."""


@dataclass(frozen=True, slots=True)
class FleetWorker:
    """One worker actor and where it always runs."""

    actor: str
    node: str
    address: str
    worker_id: str
    pid: int
    ssd_folder: str


@dataclass(frozen=True, slots=True)
class FleetState:
    """Of a fleet that was ready once; its supervisor writes it anew when the fleet has settled on something else."""

    name: str
    mark: str  # value of MARK
    supervisor: ProcessId
    ray_address: str
    own_cluster: bool
    coordinators: tuple[str, ...]
    coordinator_actors: tuple[str, ...]
    workers: tuple[FleetWorker, ...]
    redis_url: str
    embedded_redis: bool
    token_file: str
    folder: str
    ray_folder: str  # of our own cluster; empty for an existing one

    def save(self) -> None:
        """Atomically. SetupError when the folder can't be written."""
        content = {"version": STATE_VERSION, **dataclasses.asdict(self)}
        FolderDisk(self.folder).replace(STATE_FILE, json.dumps(content, indent=1).encode())

    @classmethod
    def load(cls, folder: Path) -> FleetState | None:
        """None where no fleet is up. SetupError for a file that this version can't read."""
        path = folder / STATE_FILE
        try:
            fields = json.loads(path.read_text("utf-8"))
            if fields.pop("version") != STATE_VERSION:
                raise ValueError("another version")
            fields["supervisor"] = ProcessId(**fields["supervisor"])
            fields["workers"] = tuple(FleetWorker(**worker) for worker in fields["workers"])
            for name in ("coordinators", "coordinator_actors"):
                fields[name] = tuple(fields[name])
            return cls(**fields)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise SetupError(f"{path} is not readable ({error}): end what runs there and remove the file") from error

    def client(self, config: ClientConfig) -> ClientConfig:
        """`config` pointed at this fleet."""
        return dataclasses.replace(
            config, coordinators=self.coordinators, token_file=config.token_file or self.token_file
        )


def save_status(folder: Path, status: Mapping[str, object]) -> None:
    """Keep what the reconciler says, or that it says nothing. Written only where it differs."""
    content = json.dumps(status, indent=1).encode()
    disk = FolderDisk(str(folder))
    if disk.read(STATUS_FILE) != content:
        disk.replace(STATUS_FILE, content)


def read_status(state: FleetState) -> dict[str, object]:
    """What the reconciler said last; `state` "unknown" when nobody keeps it."""
    if not state.supervisor.alive():
        return {"state": "unknown", "detail": "the supervisor is gone: kvstore down, then up again"}
    status: dict[str, object] = json.loads(FolderDisk(state.folder).read(STATUS_FILE) or b'{"state": "unknown"}')
    return status


def fleet_folder(config: FleetConfig, env: Mapping[str, str]) -> Path:
    """Where the fleet of that name keeps its state: `fleet.state_folder`, else the user's state folder."""
    if config.state_folder:
        return Path(config.state_folder).absolute() / config.name
    base = env.get("XDG_STATE_HOME", "")
    home = Path(base) if Path(base).is_absolute() else Path(env.get("HOME") or "/tmp") / ".local" / "state"
    return home / "tiered-kvstore" / config.name
