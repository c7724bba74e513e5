"""`kvstore engine-events`: beside an engine, tells the coordinators what its own prefix cache holds."""

from __future__ import annotations

import argparse
import asyncio
import signal
from pathlib import Path
from typing import Any

from kvstore.cli.common import EXIT_OK, command, configuration, note, setting
from kvstore.config import Config
from kvstore.errors import SetupError, UsageError
from kvstore.spec import ModelSpec


def add(commands: Any) -> None:
    made = command(
        commands,
        "engine-events",
        "tell coordinators what an engine's own prefix cache holds, for Score",
        description="Reads vLLM's KV events. Run it on the engine's host; what it says counts in Score only.",
        examples="""
            kvstore engine-events replica-1 --events tcp://127.0.0.1:5557 --spec spec.json --coordinators 10.0.0.4:7700
            kvstore engine-events replica-1 --events tcp://127.0.0.1:5557 --replay tcp://127.0.0.1:5558 --spec spec.json
        """,
    )
    made.add_argument("engine", metavar="NAME", help="the replica's name, as the router gives it to Score")
    made.add_argument("--events", metavar="ENDPOINT", required=True, help="where the engine publishes")
    made.add_argument("--replay", metavar="ENDPOINT", default="", help="where it answers for what was missed")
    made.add_argument("--topic", metavar="TOPIC", default="", help="of the events; default: all")
    made.add_argument("--spec", metavar="FILE", required=True, help="the ModelSpec that its prompts are keyed by")
    made.add_argument("--namespace", metavar="NAME", default="default", help="whose prompts they are")
    setting(made, "--coordinators", "server.coordinators", "HOST:PORT,...", "where to announce")
    setting(made, "--token-file", "server.token_file", "FILE", "cluster token")
    made.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Until a signal."""
    if not arguments.engine or ":" in arguments.engine:
        raise UsageError(f"the engine's name is {arguments.engine!r}: give a word without a colon")
    try:
        spec = ModelSpec.from_json(Path(arguments.spec).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise SetupError(f"cannot read the spec {arguments.spec}: {error}") from None
    config = configuration(arguments)
    if not config.server.coordinators:
        raise UsageError("no coordinator given: set --coordinators")
    asyncio.run(_bridge(config, arguments, spec))
    return EXIT_OK


async def _bridge(config: Config, arguments: argparse.Namespace, spec: ModelSpec) -> None:
    from kvstore.assembly import server_transport
    from kvstore.machine.system import real_system
    from kvstore.transport.zmq_events import batches
    from workers.engine_bridge import EngineBridge

    system = real_system(1)
    bridge = EngineBridge(
        config,
        system,
        server_transport(config, system),
        name=arguments.engine,
        namespace=arguments.namespace,
        spec=spec,
        address=arguments.events,
    )
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    await bridge.start()
    note(f"announcing what {arguments.engine} holds to {', '.join(config.server.coordinators)}")
    running = asyncio.create_task(bridge.run(batches(arguments.events, arguments.replay, arguments.topic)))
    waiting = asyncio.create_task(stopped.wait())
    try:
        await asyncio.wait([running, waiting], return_when=asyncio.FIRST_COMPLETED)
    finally:
        waiting.cancel()
        if not running.done():
            running.cancel()
        await asyncio.wait([running, waiting])
        await bridge.stop()
        system.pool.close()
    if not running.cancelled():
        running.result()  # raises what went wrong
