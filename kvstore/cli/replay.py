"""`kvstore replay TRACE`: concurrent clients drive a trace through a service and check every byte that comes back."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from kvstore.auth import client_credentials
from kvstore.cli.common import EXIT_FAULT, EXIT_OK, command, configuration, json_flag, note, print_json, setting
from kvstore.cli.tables import console, size, table
from kvstore.client.kv_client import KVClient
from kvstore.config import KIB, MIB, ClientConfig, Config, override
from kvstore.errors import ServiceError, SetupError, UsageError
from kvstore.fleet.local_cluster import LocalCluster
from kvstore.machine.system import real_system
from kvstore.operations.observe import Observer
from kvstore.operations.payload import replay_spec
from kvstore.operations.replay import TIERS, Replay
from kvstore.operations.replay_sizes import TierSizes, choose_sizes, store_settings
from kvstore.operations.trace import Footprint, Request, check_chained, footprint, read_trace
from kvstore.seams import System
from kvstore.transport.rpc import GrpcTransport
from kvstore.transport.tls import client_tls
from kvstore.values import parse_size

STAGING_BYTES = 8 * MIB  # faulted in before the first put; puts of a replay are small
SIZE_HELP = 'over all workers: bytes ("64MiB") or a share of the bytes the requests ask for ("10%%")'


def add(commands: Any) -> None:
    made = command(
        commands,
        "replay",
        "drive a Mooncake-format trace through the service and check every byte",
        description="Match, get, verify, put the rest: for every request of a trace (.jsonl or .jsonl.zst).\n"
        "Default: a fresh service on this machine, its tiers sized so that each serves a part of the hits.",
        examples="""
            kvstore replay trace.jsonl.zst --requests 500 --json
            kvstore replay trace.jsonl --hot-bytes 5% --host-bytes 10% --ssd-bytes 20% --concurrency 16
            kvstore replay trace.jsonl --coordinators 127.0.0.1:7700
        """,
    )
    made.add_argument("trace", metavar="TRACE", help="JSON lines in the Mooncake format, plain or .zst")
    made.add_argument("--requests", type=_count, metavar="N", help="only the first N")
    made.add_argument("--concurrency", type=_count, default=4, metavar="C", help="requests at a time (default 4)")
    made.add_argument("--workers", type=_count, default=2, metavar="W", help="of the fresh service (default 2)")
    made.add_argument("--block-bytes", type=_block_bytes, default=16 * KIB, metavar="SIZE", help="raw bytes of a block")
    for tier in TIERS:
        made.add_argument(f"--{tier}-bytes", metavar="SIZE", help=SIZE_HELP)
    made.add_argument("--codec", choices=("raw", "lossless"), help="on leaving hot (default lossless)")
    made.add_argument("--pace", action="store_true", help="keep the trace's arrival times")
    setting(made, "--coordinators", "client.coordinators", "HOST:PORT,...", "a running service instead of a fresh one")
    setting(made, "--address", "client.coordinators", "HOST:PORT,...", "the same")
    setting(made, "--token-file", "client.token_file", "FILE", "cluster token of the running service")
    json_flag(made)
    made.set_defaults(run=run)


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _block_bytes(text: str) -> int:
    try:
        nbytes = parse_size(text)
        replay_spec(nbytes)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return nbytes


def run(arguments: argparse.Namespace) -> int:
    config = configuration(arguments)
    trace = Trace.scan(arguments.trace, arguments.requests)
    result = asyncio.run(replay(arguments, config, trace))
    if arguments.json:
        print_json(result)
    else:
        print_result(result)
    return EXIT_FAULT if result["wrong"] else EXIT_OK


@dataclass(frozen=True, slots=True)
class Trace:
    """The requests of one run, read again each time they are needed."""

    path: str
    requests_max: int | None
    footprint: Footprint
    first_half: int  # requests in the first half of the time span

    def read(self) -> Iterable[Request]:
        return read_trace(self.path, self.requests_max)

    @classmethod
    def scan(cls, path: str, requests_max: int | None) -> Trace:
        """Read it once, all of it that will be replayed. UsageError names a malformed line."""
        times = [request.timestamp_ms for request in read_trace(path, requests_max)]
        if not times:
            raise UsageError(f"{path} holds no request: give a trace in the Mooncake format")
        if any(later < earlier for earlier, later in pairwise(times)):
            note(f"{path}: timestamps go back: requests are replayed in file order")
        middle = (times[0] + times[-1]) / 2
        half = next((index for index, time in enumerate(times) if time >= middle and index), len(times))
        half = half if times[0] < times[-1] else len(times) // 2
        check_chained(read_trace(path, requests_max))
        return cls(path, requests_max, footprint(read_trace(path, requests_max)), half)


async def replay(arguments: argparse.Namespace, config: Config, trace: Trace) -> dict[str, Any]:
    """Run it against a running service, or a fresh one that is gone afterwards."""
    system = real_system(config.store.threads)
    try:
        async with contextlib.AsyncExitStack() as stack:
            if config.client.coordinators:
                configs = await _beside_workers(config.client, system)
            else:
                cluster = await stack.enter_async_context(_fresh(arguments, config, trace))
                configs = [cluster.client_config(index) for index in range(arguments.workers)]
            configs = [replace(client, staging_bytes=min(client.staging_bytes, STAGING_BYTES)) for client in configs]
            clients = [await stack.enter_async_context(_client(client, system)) for client in configs]
            observer = _observer(configs[0], system)
            progress = stack.enter_context(_progress())
            task = progress.add_task("requests", total=trace.footprint.requests)
            run = Replay(
                clients,
                observer,
                system.clock,
                block_bytes=arguments.block_bytes,
                concurrency=arguments.concurrency,
                pace=arguments.pace,
                progress=lambda: progress.advance(task),
            )
            return await run.run(iter(trace.read()), trace.first_half)
    finally:
        system.pool.close()


def _fresh(arguments: argparse.Namespace, config: Config, trace: Trace) -> LocalCluster:
    """A service whose tiers are small beside what the requests ask for."""
    if arguments.codec:
        config = override(config, {"store": {"codec": arguments.codec}})
    given = TierSizes(*(getattr(arguments, f"{tier}_bytes") for tier in TIERS))
    spec = replay_spec(arguments.block_bytes)
    asked = trace.footprint
    in_flight = arguments.concurrency * asked.accesses / asked.requests
    chosen = choose_sizes(trace.read(), asked, spec, config.store, given, in_flight)
    note("tiers over all workers: " + ", ".join(f"{t} {size(n)}" for t, n in zip(TIERS, chosen, strict=True)))
    settings = store_settings(chosen, arguments.workers, config.store)
    config = override(config, {"store": settings | {"caller_time": not arguments.pace}})
    return LocalCluster(config, workers=arguments.workers)


@contextlib.asynccontextmanager
async def _client(config: ClientConfig, system: System) -> AsyncIterator[KVClient]:
    client = await KVClient.connect(config, system)
    try:
        yield client
    finally:
        await client.close()


def _observer(config: ClientConfig, system: System) -> Observer:
    transport = GrpcTransport(system.clock, connect_timeout_s=config.connect_timeout_s, tls=client_tls(config))
    return Observer(transport, client_credentials(config), config.connect_timeout_s)


async def _beside_workers(config: ClientConfig, system: System) -> list[ClientConfig]:
    """One client for each worker of a running service on this machine; else one for all."""
    where = config.coordinators[0]
    try:
        members = (await _observer(config, system).members(where)).members
    except ServiceError as error:
        raise SetupError(f"no service answers at {where}: start one, or leave out --coordinators ({error})") from error
    sockets = [member.socket for member in members if member.socket and member.host == system.host]
    return [replace(config, workers=(socket,)) for socket in sockets] or [config]


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True)


def print_result(result: dict[str, Any]) -> None:
    """For a person."""
    columns = ("", "requests", "blocks", *TIERS, "missed", "stored", "wrong")
    rows = table(*columns, right=" ".join(columns))
    for name, row in (("all", result), ("second half", result["second_half"])):
        hits = [str(row["hits"][tier]) for tier in TIERS]
        counts = [row["requests"], row["blocks"], *hits, row["misses"], row["stored"], row["wrong"]]
        rows.add_row(name, *(str(count) for count in counts))
    out = console()
    out.print(rows)
    speed = f"{result['seconds']} s, {result['requests'] / max(result['seconds'], 1e-9):.1f} requests/s"
    out.print(f"{speed}, get p50 {result['get_ms_p50']} ms, p99 {result['get_ms_p99']} ms")
