"""`kvstore demo`: two inference replicas share KV; everything after the command belongs to kvstore.demo."""

from __future__ import annotations

import argparse
from typing import Any


def add(commands: Any) -> None:
    made = commands.add_parser(
        "demo", help="two inference replicas share KV through all four tiers", add_help=False, prefix_chars="\0"
    )
    made.add_argument("rest", nargs=argparse.REMAINDER)
    made.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from kvstore.demo.main import main

    return main(arguments.rest)
