"""`kvstore doctor`: is every part there, does every tier keep a block, does a client get what it put?"""

from __future__ import annotations

import argparse
import asyncio
from typing import Any

from kvstore.auth import client_credentials
from kvstore.cli import tables
from kvstore.cli.common import (
    EXIT_FAULT,
    EXIT_OK,
    client_config,
    command,
    configuration,
    fleet_flags,
    json_flag,
    print_json,
)  # fmt: skip
from kvstore.config import Config
from kvstore.doctor import Doctor, Expected
from kvstore.errors import SetupError
from kvstore.observe import Observer
from kvstore.system import real_system
from kvstore.transport.rpc import GrpcTransport


def add(commands: Any) -> None:
    made = command(
        commands,
        "doctor",
        "write and read through every tier of every worker; name faults and fixes",
        examples="""
            kvstore doctor
            kvstore doctor --coordinators 127.0.0.1:7700 --workers 2 --json
        """,
    )
    fleet_flags(made)
    made.add_argument(
        "--workers", type=int, default=1, metavar="N", help="how many must be alive, where no fleet says so"
    )
    json_flag(made)
    made.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    report = asyncio.run(examine(configuration(arguments), arguments.workers))
    if arguments.json:
        print_json(report)
    else:
        tables.print_checks(report)
    return EXIT_OK if report["ok"] else EXIT_FAULT


async def examine(config: Config, workers: int) -> dict[str, Any]:
    """The report. SetupError where there is nothing to examine."""
    client, state = client_config(config)
    if not client.coordinators:
        raise SetupError("no coordinator is known: pass --coordinators HOST:PORT")
    system = real_system(2)
    try:
        transport = GrpcTransport(system.clock, connect_timeout_s=client.connect_timeout_s)
        observer = Observer(transport, client_credentials(client), client.connect_timeout_s)
        return await Doctor(observer, client, system, Expected.of(state, config, workers)).examine()
    finally:
        system.pool.close()
