"""`kvstore top`: all processes, live."""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import sys
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
)
from kvstore.errors import ConfigError, Unavailable
from kvstore.machine.system import real_system
from kvstore.operations.observe import View, look
from kvstore.operations.top import screen, top_object

HOME, CLEAR_BELOW, CLEAR_LINE = "\x1b[H", "\x1b[J", "\x1b[K"
ENTER, LEAVE = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"
"""The terminal's other screen without a cursor, and back."""

INTERVAL_MIN_S = 0.1


def add(commands: Any) -> None:
    made = command(
        commands,
        "top",
        "rates, latency, bytes, lag and errors of all processes, live",
        examples="kvstore top\nkvstore top --interval 5\nkvstore top --once --json",
    )
    fleet_flags(made)
    made.add_argument("--interval", type=float, default=2.0, metavar="SECONDS", help="between two looks (default 2)")
    made.add_argument("--once", action="store_true", help="look twice, `--interval` apart, show the rates, and end")
    json_flag(made)
    made.set_defaults(run=run_top)


def run_top(arguments: argparse.Namespace) -> int:
    if arguments.interval < INTERVAL_MIN_S:
        raise ConfigError(f"--interval {arguments.interval}: at least {INTERVAL_MIN_S} seconds")
    return asyncio.run(top(arguments))


async def top(arguments: argparse.Namespace) -> int:
    """Until Ctrl-C, or once. Unavailable when no coordinator answers."""
    clock = real_system(1).clock
    live = not arguments.once and not arguments.json and sys.stdout.isatty()
    async with reachable_fleet(configuration(arguments)) as (observer, coordinators):
        before: View | None = None
        before_at = clock.monotonic()
        if live:
            print(ENTER, end="", flush=True)
        try:
            while True:
                view, at = await look(observer, coordinators), clock.monotonic()
                if not view.statuses:
                    raise Unavailable(f"no coordinator answers: {next(iter(view.errors.values()))}")
                shown = top_object(view, before, at - before_at, coordinators)
                if before is not None or not arguments.once:
                    show(shown, live=live, as_json=arguments.json)
                if arguments.once and before is not None:
                    return EXIT_OK if not view.errors else EXIT_FAULT
                before, before_at = view, at
                await asyncio.sleep(arguments.interval)
        finally:
            if live:
                print(LEAVE, end="", flush=True)


def show(shown: dict[str, Any], *, live: bool, as_json: bool) -> None:
    """One look: a JSON object a line, a screen that is written over, or a table after the other."""
    if as_json:
        print_json(shown)
        return
    size = shutil.get_terminal_size() if live else os.terminal_size((200, 10_000))
    text = screen(shown, size.columns, size.lines - 1)
    if live:
        text = HOME + text.replace("\n", CLEAR_LINE + "\n") + CLEAR_LINE + CLEAR_BELOW
    print(text, flush=True)
