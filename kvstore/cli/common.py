"""What every command shares: the parser, flags that are settings, output, and where the fleet is."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, NoReturn

from kvstore.auth import client_credentials
from kvstore.config import ClientConfig, Config, load_config
from kvstore.errors import ConfigError, SetupError
from kvstore.fleet.state import FleetState, fleet_folder
from kvstore.machine.system import real_system
from kvstore.operations.observe import Observer
from kvstore.transport.rpc import GrpcTransport
from kvstore.transport.tls import client_tls

EXIT_OK, EXIT_FAULT, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130


class Parser(argparse.ArgumentParser):
    """Errors are one line that says where help is."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USAGE, f"{self.prog}: {message} ({self.prog} --help shows what is accepted)\n")


def command(
    commands: Any, name: str, summary: str, *, examples: str = "", description: str = ""
) -> argparse.ArgumentParser:
    """A sub-command with the flags all of them have. `examples`: command lines, one each."""
    lines = "".join(f"  {line.strip()}\n" for line in examples.strip().splitlines())
    made: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=description or summary[0].upper() + summary[1:] + ".",
        epilog=f"examples:\n{lines}" if lines else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument("--config", metavar="FILE", help="TOML file of settings (docs/OPERATIONS.md lists them)")
    made.add_argument(
        "--set", metavar="SECTION.KEY=VALUE", action="append", default=[], help="any setting; may be repeated"
    )
    return made


def setting(parser: argparse._ActionsContainer, flag: str, key: str, metavar: str, help: str) -> None:
    """A flag that is the setting `key` ("section.field")."""
    parser.add_argument(flag, dest=key, metavar=metavar, help=f"{help} [{key}]")


def json_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")


def fleet_flags(parser: argparse.ArgumentParser) -> None:
    """How a command finds a running service."""
    setting(parser, "--name", "fleet.name", "NAME", "the fleet that kvstore up started")
    setting(parser, "--coordinators", "client.coordinators", "HOST:PORT,...", "or these coordinators")
    setting(parser, "--token-file", "client.token_file", "FILE", "cluster token")


def configuration(arguments: argparse.Namespace, env: Mapping[str, str] | None = None) -> Config:
    """Settings of this command line over environment over file. Raises ConfigError."""
    overrides: dict[str, dict[str, object]] = {}
    for item in arguments.set:
        key, equals, value = item.partition("=")
        section, dot, name = key.strip().partition(".")
        if not (equals and dot and name):
            raise ConfigError(f"--set {item}: write --set SECTION.KEY=VALUE, for example --set store.host_bytes=1GiB")
        overrides.setdefault(section, {})[name] = value.strip()
    for key, value in vars(arguments).items():
        if "." in key and value is not None:
            section, _, name = key.partition(".")
            overrides.setdefault(section, {})[name] = value
    return load_config(arguments.config, env, overrides)


def print_json(value: object) -> None:
    print(json.dumps(value), flush=True)


def note(message: str) -> None:
    """One line for a person, on stderr."""
    print(message, file=sys.stderr, flush=True)


def client_config(config: Config, state: FleetState | None = None) -> tuple[ClientConfig, FleetState | None]:
    """How to reach the service: `--coordinators`, else the fleet that is up here, with its state.

    SetupError when there is neither.
    """
    if state is None and config.client.coordinators:
        return config.client, None
    state = state or FleetState.load(fleet_folder(config.fleet, os.environ))
    if state is None:
        raise SetupError(f"fleet {config.fleet.name} is not up here: kvstore up, or pass --coordinators HOST:PORT")
    return state.client(config.client), state


@asynccontextmanager
async def reachable_fleet(
    config: Config, state: FleetState | None = None
) -> AsyncIterator[tuple[Observer, tuple[str, ...]]]:
    """Somebody to ask with, and the coordinators to ask."""
    client, _ = client_config(config, state)
    system = real_system(1)
    try:
        transport = GrpcTransport(system.clock, connect_timeout_s=client.connect_timeout_s, tls=client_tls(client))
        yield Observer(transport, client_credentials(client), client.connect_timeout_s), client.coordinators
    finally:
        system.pool.close()
