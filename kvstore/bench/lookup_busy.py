"""Lookups while announcements are applied: eight processes ask a coordinator, and an echo that drops all updates."""

from __future__ import annotations

import asyncio

import numpy as np

from kvstore.bench.lookup_load import LoadChild
from kvstore.bench.report import Report

ASKERS = 8
UPDATES_A_S = 100_000
TURNS, TURNS_LONG = 7, 15
TURN_S, TURN_LONG_S = 0.8, 3.0
TURNS_OF_ALL = ("coordinator", "echo", "plain_echo")
"""ours under updates; the echo under the same; the echo alone."""


async def measure_busy(report: Report, request_file: str, coordinator: str, echo: str, *, quick: bool) -> None:
    """Mutates the report: lookups a second and p99 of all askers together, in turns."""
    addresses = [coordinator, echo]
    updates = await LoadChild.start("announce", str(UPDATES_A_S), *addresses)
    askers = await asyncio.gather(*(LoadChild.start("ask", request_file, *addresses) for _ in range(ASKERS)))
    rates: dict[str, list[float]] = {name: [] for name in TURNS_OF_ALL}
    tails: dict[str, list[float]] = {name: [] for name in TURNS_OF_ALL}
    applied: dict[str, list[float]] = {"coordinator": [], "echo": []}
    try:
        seconds = TURN_S if quick else TURN_LONG_S
        for turn in range(-1, TURNS if quick else TURNS_LONG):
            for name in TURNS_OF_ALL:
                at = 0 if name == "coordinator" else 1
                if name != "plain_echo":
                    updates.tell(at=at, seconds=seconds)
                for asker in askers:
                    asker.tell(at=at, seconds=seconds)
                took = np.concatenate([np.array((await asker.answer())["took"]) for asker in askers])
                sent = (await updates.answer())["sent"] if name != "plain_echo" else 0
                if turn >= 0:
                    rates[name].append(len(took) / seconds)
                    tails[name].append(float(np.quantile(took, 0.99)) * 1e3)
                    if name in applied:
                        applied[name].append(sent / seconds)
    finally:
        for child in [updates, *askers]:
            await child.close()
    _say(report, rates, tails, applied)


def _say(
    report: Report,
    rates: dict[str, list[float]],
    tails: dict[str, list[float]],
    applied: dict[str, list[float]],
) -> None:
    for name in TURNS_OF_ALL:
        report.result(f"busy_{name}_lookups", rates[name], "1/s")
        report.result(f"busy_{name}_p99", tails[name], "ms")
    report.result("busy_updates", applied["coordinator"], "blocks/s")
    report.result("busy_echo_updates", applied["echo"], "blocks/s")
    report.ratio("throughput_under_updates_vs_echo", "busy_coordinator_lookups", "busy_echo_lookups", at_least=0.75)
    report.ratio("p99_under_updates_vs_echo", "busy_coordinator_p99", "busy_echo_p99", at_most=1.5)
    report.ratio("throughput_under_updates_vs_plain_echo", "busy_coordinator_lookups", "busy_plain_echo_lookups")
    report.ratio("p99_under_updates_vs_plain_echo", "busy_coordinator_p99", "busy_plain_echo_p99")
    report.target("busy_updates", at_least=0.95 * UPDATES_A_S)
    report.target("busy_echo_updates", at_least=0.95 * UPDATES_A_S)
