"""`kvstore doctor`: is every part there, does every tier keep a block, does a client get what it put?"""

from __future__ import annotations

import argparse
import asyncio
from dataclasses import replace
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
from kvstore.errors import SetupError
from kvstore.integrations.vllm.examine import examine_transfer, read_transfer
from kvstore.machine.system import real_system
from kvstore.operations.doctor import Doctor, Engine, Expected
from kvstore.operations.observe import Observer
from kvstore.transport.rpc import GrpcTransport
from kvstore.transport.tls import client_tls


def add(commands: Any) -> None:
    made = command(
        commands,
        "doctor",
        "write and read through every tier of every worker; name faults and fixes",
        examples="""
            kvstore doctor
            kvstore doctor --coordinators 127.0.0.1:7700 --workers 2 --json
            kvstore doctor --vllm-config kv-transfer.json
        """,
    )
    fleet_flags(made)
    made.add_argument(
        "--workers", type=int, default=1, metavar="N", help="how many must be alive, where no fleet says so"
    )
    made.add_argument(
        "--vllm-config", metavar="FILE|JSON", help="what vLLM gets as --kv-transfer-config: examine that, too"
    )
    json_flag(made)
    made.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    engine = None
    if arguments.vllm_config is not None:
        engine = Engine(*examine_transfer(read_transfer(arguments.vllm_config)))
    report = asyncio.run(examine(configuration(arguments), arguments.workers, engine))
    if arguments.json:
        print_json(report)
    else:
        tables.print_checks(report)
    return EXIT_OK if report["ok"] else EXIT_FAULT


async def examine(config: Config, workers: int, engine: Engine | None = None) -> dict[str, Any]:
    """The report. The service is that of the engine's settings where nothing else names one. SetupError where there is
    nothing to examine."""
    if engine is not None and engine.client is not None and not config.client.coordinators:
        config = replace(config, client=engine.client)
    client, state = client_config(config)
    if not client.coordinators:
        raise SetupError("no coordinator is known: pass --coordinators HOST:PORT")
    system = real_system(2)
    try:
        transport = GrpcTransport(system.clock, connect_timeout_s=client.connect_timeout_s, tls=client_tls(client))
        observer = Observer(transport, client_credentials(client), client.connect_timeout_s)
        return await Doctor(observer, client, system, Expected.of(state, config, workers), engine).examine()
    finally:
        system.pool.close()
