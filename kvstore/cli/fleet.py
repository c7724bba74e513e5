"""`kvstore up`, `down`, `status`, and the supervisor process that `up` leaves behind."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import signal
import sys
import time  # noqa: TID251 - waits for processes
from pathlib import Path
from typing import Any

from kvstore.cli import tables
from kvstore.cli.common import (
    EXIT_FAULT,
    EXIT_INTERRUPTED,
    EXIT_OK,
    EXIT_USAGE,
    client_config,
    command,
    configuration,
    fleet_flags,
    json_flag,
    note,
    print_json,
    reachable_fleet,
    setting,
)  # fmt: skip
from kvstore.config import Config, load_config, to_toml
from kvstore.errors import ConfigError, KVStoreError, SetupError
from kvstore.fleet.state import MARK, SSD_FOLDER, FleetState, fleet_folder, read_status
from kvstore.machine.disk import FolderDisk
from kvstore.machine.processes import ProcessId, carrying
from kvstore.machine.spawn import LocalProcess, LocalSpawner
from kvstore.tiers.redis_link import place

PROGRESS_FILE, CONFIG_FILE, LOG_FILE, LOCK_FILE = "starting.jsonl", "config.toml", "supervisor.log", "lock"
POLL_S = 0.05
DOWN_S = 45.0
KILL_S = 5.0


def add(commands: Any) -> None:
    up = command(
        commands,
        "up",
        "start a fleet: Ray, coordinators, workers, Redis",
        examples="""
            kvstore up
            kvstore up --nodes 2 --set store.host_bytes=4GiB
            kvstore up --redis-url redis://127.0.0.1:6379
            kvstore up --address 10.0.0.1:6379 --redis-url rediss://cache:6380 --token-file token
        """,
    )
    setting(up, "--name", "fleet.name", "NAME", "name of the fleet")
    setting(up, "--address", "fleet.address", "HOST:PORT", "an existing Ray cluster; default: our own, on loopback")
    setting(up, "--nodes", "fleet.nodes", "N", "Ray nodes of our own cluster")
    setting(up, "--workers", "fleet.workers", "N", "workers, 0: one per node")
    setting(up, "--coordinators", "fleet.coordinators", "N", "coordinators")
    setting(up, "--redis-url", "store.redis_url", "URL", "a Redis; default: an embedded one, for one machine")
    setting(up, "--ssd-folder", "store.ssd_folder", "FOLDER", "kept when the fleet ends; default: one that is not")
    setting(up, "--token-file", "server.token_file", "FILE", "cluster token")
    json_flag(up)
    up.set_defaults(run=run_up)

    down = command(commands, "down", "end a fleet: all of it and only it", examples="kvstore down")
    setting(down, "--name", "fleet.name", "NAME", "name of the fleet")
    json_flag(down)
    down.set_defaults(run=run_down)

    status = command(
        commands, "status", "workers, tiers, bytes and compression", examples="kvstore status\nkvstore status --json"
    )
    fleet_flags(status)
    json_flag(status)
    status.set_defaults(run=run_status)


def add_hidden(commands: Any) -> None:
    """The supervisor: started by `up` only, so it is not listed."""
    made = commands.add_parser("fleet-supervisor")
    made.add_argument("folder")
    made.set_defaults(run=run_supervisor)


# --- up ------------------------------------------------------------------------------------------------------------


def run_up(arguments: argparse.Namespace) -> int:
    config = configuration(arguments)
    folder = fleet_folder(config.fleet, os.environ)
    standing = standing_fleet(config, folder)
    if standing is not None:
        standing.supervisor.signal(signal.SIGHUP)  # nodes whose worker was drained get one again
        note(f"fleet {standing.name} is up already")
        return show_up(standing, config, arguments.json)
    mark = f"{config.fleet.name}-{os.urandom(8).hex()}"  # noqa: TID251
    prepare(config, folder)
    argv = [sys.executable, "-m", "kvstore.cli.main", "fleet-supervisor", str(folder)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("KVSTORE_")} | {MARK: mark}
    supervisor = LocalSpawner(death_signal=0).spawn(argv, env=environment, log=str(folder / LOG_FILE))
    try:
        follow(supervisor, folder, config.fleet.start_timeout_s + 30)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            note("interrupted: ending what was started")
        supervisor.terminate(DOWN_S)
        end_marked(mark)
        raise
    state = FleetState.load(folder)
    assert state is not None, "the supervisor said that it is ready"
    return show_up(state, config, arguments.json)


def show_up(state: FleetState, config: Config, as_json: bool) -> int:
    """What is up, as `up` says it at its end."""
    status = asyncio.run(settled_status(state, config))
    if as_json:
        print_json({"name": state.name, "ray_address": state.ray_address, "redis": place(state.redis_url)} | status)
    else:
        tables.print_status(status, title=f"fleet {state.name}")
        print(f"coordinators: {','.join(state.coordinators)}   Ray: {state.ray_address}   end it: kvstore down")
    return EXIT_OK


def standing_fleet(config: Config, folder: Path) -> FleetState | None:
    """The fleet of that name, if it is up with this very configuration. SetupError where it is another, or was not
    ended."""
    state = FleetState.load(folder)
    name = config.fleet.name
    if state is None:
        return None
    if not state.supervisor.alive():
        raise SetupError(f"fleet {name} was not ended cleanly: kvstore down, then up again")
    theirs = (folder / CONFIG_FILE).read_text("utf-8").splitlines()
    other = [line.partition(" ")[0] for line in to_toml(config).splitlines() if line not in theirs]
    if other:
        raise SetupError(f"fleet {name} is up with another {', '.join(other)}: kvstore down, then up again")
    return state


def prepare(config: Config, folder: Path) -> None:
    """The folder of a new fleet with its configuration."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise SetupError(f"{folder} can't be made ({error.strerror}): name another fleet.state_folder") from error
    disk = FolderDisk(str(folder))
    unlock = disk.lock(LOCK_FILE)
    if unlock is None:
        raise SetupError(f"fleet {config.fleet.name} is being started or ended by another process: wait for it")
    unlock()
    for name in (PROGRESS_FILE, LOG_FILE):  # of a start that failed
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / SSD_FOLDER, ignore_errors=True)
    disk.replace(CONFIG_FILE, to_toml(config).encode())


def follow(supervisor: LocalProcess, folder: Path, timeout_s: float) -> None:
    """Show progress until it is ready. Raises what the supervisor said went wrong."""
    seen = 0
    path = folder / PROGRESS_FILE
    for _ in range(int(timeout_s / POLL_S)):
        ended = not supervisor.alive()
        lines = path.read_text("utf-8").splitlines() if path.exists() else []
        for line in lines[seen:]:
            event = json.loads(line)
            if "step" in event:
                note(f"  {event['step']}")
            elif event.get("ready"):
                return
            else:
                raise (ConfigError if event["usage"] else SetupError)(event["error"])
        seen = len(lines)
        if ended:
            raise SetupError(f"the supervisor ended without a word: see {folder / LOG_FILE}")
        time.sleep(POLL_S)
    raise SetupError(f"the fleet was not ready within {timeout_s:g} s: see {folder / LOG_FILE}")


async def settled_status(state: FleetState, config: Config) -> dict[str, Any]:
    """Status once every worker has told every coordinator, or after a lease."""
    from kvstore.operations.observe import look, status_object

    async with reachable_fleet(config, state) as (observer, coordinators):
        for _ in range(int(config.coordinator.lease_s / POLL_S) + 1):
            view = await look(observer, coordinators)
            alive = [worker for worker in view.workers().values() if worker.member.state == "alive" and worker.tiers]
            if len(alive) >= len(state.workers):
                break
            await asyncio.sleep(POLL_S)
        return status_object(view, coordinators) | {"reconciler": read_status(state)}


def run_supervisor(arguments: argparse.Namespace) -> int:
    """Owns the fleet until SIGTERM."""
    from kvstore.fleet.supervisor import Fleet, Interrupted

    folder = Path(arguments.folder)
    disk = FolderDisk(str(folder))
    unlock = disk.lock(LOCK_FILE)
    if unlock is None:
        return EXIT_USAGE
    config = load_config(folder / CONFIG_FILE, env={})

    def tell(**event: Any) -> None:
        with (folder / PROGRESS_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")

    fleet = Fleet(config, folder, os.environ.get(MARK, ""), lambda step: tell(step=step))
    try:
        fleet.start()
        tell(ready=True)
        fleet.wait()
        return EXIT_OK
    except KVStoreError as error:
        tell(error=" ".join(str(error).split()), usage=isinstance(error, ConfigError))
        return EXIT_USAGE
    except (Interrupted, SystemExit):
        return EXIT_INTERRUPTED
    finally:
        fleet.stop()
        unlock()


# --- down ----------------------------------------------------------------------------------------------------------


def run_down(arguments: argparse.Namespace) -> int:
    config = configuration(arguments)
    folder = fleet_folder(config.fleet, os.environ)
    state = FleetState.load(folder)
    if state is None:
        raise SetupError(f"fleet {config.fleet.name} is not up: kvstore up starts one")
    clean = True
    if state.supervisor.signal(signal.SIGTERM):
        clean = gone_within([state.supervisor], DOWN_S)
    elif not state.own_cluster:
        from kvstore.fleet.supervisor import end_detached

        end_detached(state, config.server.stop_grace_s)
    killed = end_marked(state.mark)
    for left in filter(None, (str(folder), state.ray_folder)):
        shutil.rmtree(left, ignore_errors=True)
    report = {"name": state.name, "clean": clean and not killed, "killed": len(killed)}
    if arguments.json:
        print_json(report)
    elif report["clean"]:
        print(f"fleet {state.name} is down")
    else:
        print(f"fleet {state.name} is down; {len(killed)} of its processes had to be killed")
    return EXIT_OK


def end_marked(mark: str) -> list[ProcessId]:
    """Kill what still carries the fleet's mark; what it was. SetupError when something does not die."""
    left = carrying(MARK, mark)
    for _ in range(3):  # one that was being started while we looked
        for process in left:
            process.signal(signal.SIGKILL)
        if gone_within(left, KILL_S) and not (more := carrying(MARK, mark)):
            return left
        left = [*left, *more]
    raise SetupError(f"processes {', '.join(str(p.pid) for p in left if p.alive())} of the fleet do not end: kill them")


def gone_within(processes: list[ProcessId], timeout_s: float) -> bool:
    """Whether all of them ended."""
    for _ in range(int(timeout_s / POLL_S) + 1):
        if not any(process.alive() for process in processes):
            return True
        time.sleep(POLL_S)
    return False


# --- status --------------------------------------------------------------------------------------------------------


def run_status(arguments: argparse.Namespace) -> int:
    return asyncio.run(show_status(configuration(arguments), arguments.json))


async def show_status(config: Config, as_json: bool) -> int:
    """Exit 1 when a coordinator does not answer or a worker is not alive; SetupError when nobody answers."""
    from kvstore.operations.observe import look, status_object

    async with reachable_fleet(config) as (observer, coordinators):
        view = await look(observer, coordinators)
    if not view.statuses:
        raise SetupError(f"no coordinator answers at {', '.join(coordinators)}: {next(iter(view.errors.values()))}")
    _, state = client_config(config)
    status = status_object(view, coordinators) | {"reconciler": None if state is None else read_status(state)}
    if as_json:
        print_json(status)
    else:
        tables.print_status(status)
    healthy = not view.errors and all(worker["state"] == "alive" for worker in status["workers"])
    return EXIT_OK if healthy else EXIT_FAULT
