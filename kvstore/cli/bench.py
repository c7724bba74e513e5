"""`kvstore bench NAME`: run a benchmark of `kvstore.bench` and print its figures against their bars."""

from __future__ import annotations

import argparse
import importlib
import pkgutil
from typing import Any

from rich.console import Console
from rich.table import Table

import kvstore.bench
from kvstore.bench.report import Report
from kvstore.cli.common import EXIT_FAULT, EXIT_OK, command, json_flag, print_json
from kvstore.cli.compiling import compiled
from kvstore.errors import ConfigError

NOT_BENCHES = ("report", "baselines")


def names() -> list[str]:
    """Modules of `kvstore.bench` that are a benchmark: those without an underscore, which are parts of one."""
    found = [module.name for module in pkgutil.iter_modules(kvstore.bench.__path__)]
    return sorted(name for name in found if "_" not in name and name not in NOT_BENCHES)


def add(commands: Any) -> None:
    made = command(
        commands,
        "bench",
        "measure a part against its bars",
        examples="""
            kvstore bench engine --json
            kvstore bench engine --quick
        """,
    )
    made.add_argument("name", metavar="NAME", help=f"one of {', '.join(names())}")
    json_flag(made)
    made.add_argument("--quick", action="store_true", help="fewer rounds")
    made.add_argument("rest", nargs=argparse.REMAINDER, metavar="...", help="flags of this bench (NAME --help)")
    made.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """0 when every bar is met, 1 otherwise."""
    if arguments.name not in names():
        raise ConfigError(f"there is no bench {arguments.name!r}: known are {', '.join(names())}")
    rest = [flag for flag in arguments.rest if flag != "--json"]
    as_json = arguments.json or len(rest) < len(arguments.rest)
    if arguments.quick and "--quick" not in rest:
        rest.append("--quick")
    if not {"-h", "--help"} & set(rest):
        compiled()  # else some of what is measured waits for them
    report: Report = importlib.import_module(f"kvstore.bench.{arguments.name}").main(rest)
    if as_json:
        print_json(report.as_json())
    else:
        _show(report)
    return EXIT_OK if report.ok else EXIT_FAULT


def _show(report: Report) -> None:
    table = Table("what", "value", "bar", "", title=f"bench {report.bench}")
    for row in report.rows():
        table.add_row(*row)
    console = Console()
    console.print(table)
    for line in report.notes:
        console.print(line)
