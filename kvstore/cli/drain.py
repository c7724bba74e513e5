"""`kvstore drain`: one worker moves what is worth keeping to others, then leaves."""

from __future__ import annotations

import argparse
import asyncio
import time  # noqa: TID251 - shows how long it took
from typing import Any

from kvstore.cli.common import (
    EXIT_FAULT,
    EXIT_OK,
    command,
    configuration,
    fleet_flags,
    json_flag,
    note,
    print_json,
    reachable_fleet,
)  # fmt: skip
from kvstore.config import Config
from kvstore.errors import SetupError, UsageError
from kvstore.operations.observe import View, look
from kvstore.wire import common_pb2

POLL_S = 0.2


def add(commands: Any) -> None:
    made = command(
        commands,
        "drain",
        "move a worker's blocks to the others, then let it leave",
        description="The worker takes no new blocks, the others copy what is worth keeping, then it leaves and stops.",
        examples="""
            kvstore drain w-3fa2
            kvstore drain node-7 --timeout 300
        """,
    )
    made.add_argument("worker", metavar="WORKER", help="its id, the beginning of it, or the name of its node")
    made.add_argument("--timeout", metavar="SECONDS", type=float, default=0.0, help="at most [worker.drain_s]")
    fleet_flags(made)
    json_flag(made)
    made.set_defaults(run=run_drain)


def run_drain(arguments: argparse.Namespace) -> int:
    if arguments.timeout < 0:
        raise UsageError(f"--timeout {arguments.timeout}: give seconds")
    report = asyncio.run(drain(configuration(arguments), arguments.worker, arguments.timeout))
    if arguments.json:
        print_json(report)
    else:
        print(
            f"worker {report['worker']} has left: {report['moved']} blocks moved, {report['held']} were elsewhere, "
            f"{report['left']} not moved, {report['seconds']:.1f} s"
        )
    return EXIT_FAULT if report["left"] else EXIT_OK


async def drain(config: Config, name: str, timeout_s: float) -> dict[str, Any]:
    """Begin it, follow it, and say what became of the blocks. SetupError where it can't be reached."""
    begun = time.monotonic()
    async with reachable_fleet(config) as (observer, coordinators):
        view = await look(observer, coordinators)
        if not view.statuses:
            raise SetupError(f"no coordinator answers at {', '.join(coordinators)}: kvstore status")
        worker = named(view, name)
        while True:
            reply = await observer.drain(worker.member.address, timeout_s)
            if reply.done:
                break
            note(f"  {reply.groups_done} of {reply.groups} groups, {reply.blocks_moved} blocks moved")
            await asyncio.sleep(POLL_S)
    return {
        "worker": worker.member.id,
        "groups": reply.groups,
        "moved": reply.blocks_moved,
        "held": reply.blocks_held,
        "left": reply.blocks_left,
        "seconds": round(time.monotonic() - begun, 3),
    }


def named(view: View, name: str) -> common_pb2.WorkerStatus:
    """The one worker that a person means. UsageError where it is none, or several."""
    workers = view.workers()
    if name in workers:
        return workers[name]
    found = [worker for id, worker in workers.items() if id.startswith(name) or worker.member.node == name]
    if len(found) != 1:
        known = ", ".join(f"{id} ({worker.member.node})" for id, worker in workers.items()) or "none"
        raise UsageError(f"{name} names {len(found)} workers: give one of {known}")
    return found[0]
