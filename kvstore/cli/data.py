"""`kvstore purge` and `kvstore inspect`: dropping blocks, and looking at what a worker left on disk."""

from __future__ import annotations

import argparse
import asyncio
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
from kvstore.cli.tables import print_inspection
from kvstore.config import Config
from kvstore.errors import KVStoreError, SetupError, UsageError
from kvstore.inspection import inspect_folder
from kvstore.observe import look
from kvstore.types import KEY_BYTES

PURGE_S = 30.0


def add(commands: Any) -> None:
    purge = command(
        commands,
        "purge",
        "drop the blocks of a namespace, or of one model in it, on every worker",
        examples="""
            kvstore purge --namespace default
            kvstore purge --root 00112233445566778899aabbccddeeff
        """,
    )
    fleet_flags(purge)
    setting(purge, "--namespace", "client.namespace", "NAME", "the namespace")
    purge.add_argument("--root", metavar="HEX", default="", help="digest of one ModelSpec, 32 hexadecimal digits")
    json_flag(purge)
    purge.set_defaults(run=run_purge)
    inspect = commands.add_parser(
        "inspect",
        help="look into the SSD folder of a worker and verify every record",
        description="Read the segment log of a worker, verify every record, count models and namespaces.",
        epilog="examples:\n  kvstore inspect /var/lib/kvstore\n  kvstore inspect /var/lib/kvstore --key 3fa2 --json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    inspect.add_argument("folder", metavar="FOLDER")
    inspect.add_argument(
        "--key", metavar="HEX", default="", help="show header and chunk table of blocks whose key begins so"
    )
    json_flag(inspect)
    inspect.set_defaults(run=run_inspect)


def run_inspect(arguments: argparse.Namespace) -> int:
    report = inspect_folder(arguments.folder, arguments.key)
    if arguments.json:
        print_json(report)
    else:
        print_inspection(report)
    return EXIT_FAULT if report["damaged"] or report["skipped"] else EXIT_OK


def run_purge(arguments: argparse.Namespace) -> int:
    try:
        root = bytes.fromhex(arguments.root)
    except ValueError:
        root = b"?"
    if arguments.root and len(root) != KEY_BYTES:
        raise UsageError(f"--root {arguments.root}: give {2 * KEY_BYTES} hexadecimal digits")
    report = asyncio.run(purge(configuration(arguments), root))
    if arguments.json:
        print_json(report)
    else:
        for id, error in report["failed"].items():
            print(f"worker {id}: {error}")
        print(f"{report['blocks']} blocks dropped on {report['workers']} workers")
    return EXIT_FAULT if report["failed"] else EXIT_OK


async def purge(config: Config, root: bytes) -> dict[str, Any]:
    """Ask every worker; `failed` says who did not do it. SetupError when no coordinator answers."""
    async with reachable_fleet(config) as (observer, coordinators):
        view = await look(observer, coordinators)
        if not view.statuses:
            raise SetupError(f"no coordinator answers at {', '.join(coordinators)}: kvstore status")
        report: dict[str, Any] = {"blocks": 0, "workers": 0, "failed": {}}
        for id, worker in view.workers().items():
            try:
                report["blocks"] += await observer.purge(worker.member.address, root, PURGE_S)
                report["workers"] += 1
            except KVStoreError as error:
                report["failed"][id] = str(error)
        return report
