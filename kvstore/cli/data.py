"""`kvstore purge` and `kvstore inspect`: dropping blocks, and looking at what a worker left on disk."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from kvstore.cli.common import (
    EXIT_FAULT,
    EXIT_OK,
    command,
    configuration,
    fleet_flags,
    json_flag,
    print_json,
    reachable_fleet,
    setting,
)  # fmt: skip
from kvstore.cli.tables import print_copies, print_inspection
from kvstore.client.purging import purge_all, purge_id
from kvstore.config import Config
from kvstore.errors import KVStoreError, SetupError, UsageError
from kvstore.machine.system import real_system
from kvstore.operations.inspection import copies_of, inspect_folder
from kvstore.operations.observe import Observer, look
from kvstore.types import KEY_BYTES
from kvstore.wire import common_pb2, worker_pb2

PURGE_S = 30.0
INSPECT_S = 30.0


def add(commands: Any) -> None:
    purge = command(
        commands,
        "purge",
        "drop the blocks of a namespace, or of one model in it, on every worker",
        examples="""
            kvstore purge --namespace default
            kvstore purge --model my/llama --revision v1
            kvstore purge --root 00112233445566778899aabbccddeeff
        """,
    )
    fleet_flags(purge)
    setting(purge, "--namespace", "client.namespace", "NAME", "the namespace")
    purge.add_argument("--model", metavar="ID", default="", help="only blocks of this model, all its specs")
    purge.add_argument("--revision", metavar="NAME", default="", help="of --model: only this revision")
    purge.add_argument("--root", metavar="HEX", default="", help="digest of one ModelSpec, 32 hexadecimal digits")
    json_flag(purge)
    purge.set_defaults(run=run_purge)
    inspect = command(
        commands,
        "inspect",
        "look at a worker's SSD folder, or at every copy of a block, and verify",
        description="Of a folder: read the segment log of a worker, verify every record, count models and namespaces. "
        "Of a key: ask every worker for its copies of that block, in each tier and in Redis, read and verified.",
        examples="""
            kvstore inspect /var/lib/kvstore
            kvstore inspect /var/lib/kvstore --key 3fa2 --json
            kvstore inspect 3fa2c1d09b7e44518a6f0d2e9c3b7a15
        """,
    )
    inspect.add_argument("target", metavar="FOLDER|KEY", help="an SSD folder, or a block's key, 32 hexadecimal digits")
    inspect.add_argument(
        "--key", metavar="HEX", default="", help="in a folder: header and chunk table of blocks whose key begins so"
    )
    fleet_flags(inspect)
    setting(inspect, "--namespace", "client.namespace", "NAME", "of a key: the namespace")
    json_flag(inspect)
    inspect.set_defaults(run=run_inspect)


def run_inspect(arguments: argparse.Namespace) -> int:
    key = key_of(arguments.target)
    if key is not None and not Path(arguments.target).is_dir():
        return run_inspect_key(arguments, key)
    report = inspect_folder(arguments.target, arguments.key)
    if arguments.json:
        print_json(report)
    else:
        print_inspection(report)
    return EXIT_FAULT if report["damaged"] or report["skipped"] else EXIT_OK


def key_of(text: str) -> bytes | None:
    """The key that 32 hexadecimal digits name."""
    try:
        key = bytes.fromhex(text)
    except ValueError:
        return None
    return key if len(key) == KEY_BYTES else None


def run_inspect_key(arguments: argparse.Namespace, key: bytes) -> int:
    report = asyncio.run(inspect_key(configuration(arguments), key))
    if arguments.json:
        print_json(report)
    else:
        print_copies(report)
    return EXIT_FAULT if report["failed"] or not report["copies"] or report["damaged"] else EXIT_OK


async def inspect_key(config: Config, key: bytes) -> dict[str, Any]:
    """Every worker's copies; Redis through the first that answers. SetupError when no coordinator answers."""
    report: dict[str, Any] = {"key": key.hex(), "workers": 0, "copies": [], "damaged": 0, "failed": {}}
    async for observer, id, address in workers(config):
        try:
            reply = await observer.inspect(address, key, not report["workers"], INSPECT_S)
            report["copies"] += copies_of(id, reply)
            report["workers"] += 1
        except KVStoreError as error:
            report["failed"][id] = str(error)
    report["damaged"] = sum(not copy["ok"] for copy in report["copies"])
    return report


async def workers(config: Config) -> AsyncIterator[tuple[Observer, str, str]]:
    """(who asks, id, address) of every worker of the fleet. SetupError when no coordinator answers."""
    async with reachable_fleet(config) as (observer, coordinators):
        view = await look(observer, coordinators)
        if not view.statuses:
            raise SetupError(f"no coordinator answers at {', '.join(coordinators)}: kvstore status")
        for id, worker in view.workers().items():
            yield observer, id, worker.member.address


def run_purge(arguments: argparse.Namespace) -> int:
    try:
        root = bytes.fromhex(arguments.root)
    except ValueError:
        root = b"?"
    if arguments.root and len(root) != KEY_BYTES:
        raise UsageError(f"--root {arguments.root}: give {2 * KEY_BYTES} hexadecimal digits")
    if (arguments.revision and not arguments.model) or (arguments.model and arguments.root):
        raise UsageError("give --root, or --model, or --model and --revision")
    what = worker_pb2.PurgeRequest(root=root, model=arguments.model, revision=arguments.revision)
    report = asyncio.run(purge(configuration(arguments), what))
    if arguments.json:
        print_json(report)
    else:
        for id, error in report["failed"].items():
            print(f"worker {id}: {error}")
        print(f"{report['blocks']} blocks dropped on {report['workers']} workers")
    return EXIT_FAULT if report["failed"] else EXIT_OK


async def purge(config: Config, what: worker_pb2.PurgeRequest) -> dict[str, Any]:
    """Ask every worker, `what` under a new id; `failed` says who did not do it. SetupError when no coordinator
    answers."""
    system = real_system(1)
    what.purge = purge_id(system)
    system.pool.close()
    async with reachable_fleet(config) as (observer, coordinators):
        if not (await look(observer, coordinators)).statuses:
            raise SetupError(f"no coordinator answers at {', '.join(coordinators)}: kvstore status")

        async def members() -> list[common_pb2.Member]:
            return [worker.member for worker in (await look(observer, coordinators)).workers().values()]

        purged = await purge_all(members, lambda address: observer.purge(address, what, PURGE_S))
    failed = {id: str(error) for id, error in purged.failed.items()}
    return {"blocks": purged.blocks, "workers": purged.workers, "failed": failed}
