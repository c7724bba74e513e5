"""`kvstore`: the command line. Each command is a module here with `add(commands)` and a function that runs it."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence

from kvstore.cli import bench, compiling, data, demo, doctor, drain, engine_events, fleet, replay, servers, top
from kvstore.cli.common import EXIT_INTERRUPTED, EXIT_OK, Parser, note
from kvstore.errors import KVStoreError

EPILOG = """\
first steps:
  kvstore up                       Ray, a coordinator, a worker and Redis on this machine
  kvstore status                   workers, tiers, bytes, compression
  kvstore top                      rates, latency, lag and errors of all processes, live
  kvstore doctor                   proves that every tier works, or names what does not and the fix
  kvstore down                     ends all of it and only it

Settings come from --config FILE, KVSTORE_SECTION_KEY variables and flags, later ones first.
Exit status: 0 done, 1 it ran and found a fault, 2 usage or environment, 130 interrupted.
"""


def parser() -> Parser:
    """The whole command line."""
    import argparse

    made = Parser(
        prog="kvstore",
        description="A distributed tiered KV cache for LLM inference.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = made.add_subparsers(title="commands", metavar="COMMAND", dest="command", required=True)
    for group in (fleet, top, doctor, demo, servers, engine_events, drain, replay, data, compiling, bench):
        group.add(commands)
    fleet.add_hidden(commands)
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit status. A KVStoreError is one line on stderr, never a traceback."""
    if argv is None:  # a process of its own: being ended is an interruption too, and cleans up
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    arguments = parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except KVStoreError as error:
        note(f"kvstore {arguments.command}: {' '.join(str(error).split())}")
        return error.exit_code
    except KeyboardInterrupt:
        note(f"kvstore {arguments.command}: interrupted")
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of our output has what it wants
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # noqa: TID251 - quiets the exit flush
        return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
