"""What happens in the demo, in order: share, come back to earlier conversations, lose a worker, have it back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Protocol

from kvstore.demo.checks import Checks
from kvstore.demo.load import Load, Script
from kvstore.demo.peers import Answer, Replica
from kvstore.demo.tables import TIERS, Report, Row, TierRow

AFTER_MAX = 16
"""Commits that one lookup may name."""


class Cluster(Protocol):
    """What the scenario does to the cluster; `kvstore.demo.cluster` is the real one."""

    async def tiers(self) -> list[TierRow]:
        """Every tier of every worker that answers."""

    async def counters(self) -> dict[str, dict[str, int]]:
        """What each living worker counted, by name."""

    async def settled(self) -> None:
        """Wait, bounded, until blocks have stopped moving between tiers."""

    async def kill(self) -> str:
        """SIGKILL to the first worker's process; what was done, for people."""

    async def returned(self) -> str:
        """Wait, bounded, until that worker is alive again; what came back, for people. Unavailable if it does not."""


class Scenario:
    """One run. `say` gets a line for people, `done` each finished request."""

    def __init__(
        self,
        script: Script,
        replicas: dict[str, Replica],
        cluster: Cluster,
        checks: Checks,
        report: Report,
        say: Callable[[str], None],
        done: Callable[[Row], None],
    ) -> None:
        self._script = script
        self._replicas = replicas
        self._cluster = cluster
        self._say = say
        self._done = done
        self._load = Load(script)
        self._commits: dict[tuple[str, int], int] = {}
        self.checks = checks
        self.report = report

    async def run(self) -> None:
        """All phases. Fills `report` and `checks`; raises only where going on makes no sense."""
        phases = self._script.phases()
        await self._phase("share", phases["share"])
        await self._cluster.settled()
        await self._look("before")
        await self._phase("again", phases["again"])
        await self._cluster.settled()
        await self._look("loaded")
        self._count(self.checks.tiers, self.report.hits(), TIERS)
        self._say(await self._cluster.kill())
        back = asyncio.ensure_future(self._returned())
        try:
            for name, where in phases["outage"]:
                dead = not back.done()
                row = await self._request("outage", name, self._replicas[where])
                if dead:  # it was when the request began
                    self.checks.outage.note(row.equal, row.name)
            found = await back
        finally:
            back.cancel()
        await self._phase("after", phases["after"])
        for name, replica in self._replicas.items():
            self.report.clients[name] = await replica.call("counters", 30.0)
        self.report.workers["end"] = await self._cluster.counters()
        self._recovered(found)

    async def _returned(self) -> str:
        """Tell when the killed worker is back, and what lay in the tiers at that moment."""
        found = await self._cluster.returned()
        self._say(found)
        await self._look("returned")
        return found

    async def _phase(self, phase: str, steps: list[tuple[str, str]]) -> None:
        for name, replica in steps:
            await self._request(phase, name, self._replicas[replica])

    async def _request(self, phase: str, name: str, replica: Replica) -> Row:
        """One prompt with the cache and without, at the same replica; in phase "again" with zeroed blocks too."""
        title, ids = self._load.next(name)
        new = self._script.new_tokens
        after = [[worker, epoch, seq] for (worker, epoch), seq in self._commits.items()][-AFTER_MAX:]
        cached = await replica.answer(ids, "cached", new, after)
        plain = await replica.answer(ids, "plain", new)
        self._load.answered(name, cached.tokens)
        self._remember(cached)
        self.checks.compare(title, cached, plain)
        self.checks.stored(cached)
        if phase == "again" and cached.loaded_tokens > len(ids) / 2:
            self.checks.spoilt(title, await replica.answer(ids, "zeroed", new), plain)
        row = Row.of(phase, title, replica.name, cached, plain)
        self.report.rows.append(row)
        self._done(row)
        return row

    def _remember(self, answer: Answer) -> None:
        """The next request, at the other replica, must see what this one stored."""
        for worker, epoch, seq in answer.commits:
            self._commits.pop((worker, epoch), None)
            self._commits[worker, epoch] = seq

    async def _look(self, moment: str) -> None:
        rows = self.report.tiers[moment] = await self._cluster.tiers()
        self.report.workers[moment] = await self._cluster.counters()
        if moment == "loaded":
            self._count(
                self.checks.filled, {tier: sum(r.blocks for r in rows if r.tier == tier) for tier in TIERS}, TIERS
            )

    @staticmethod
    def _count(check: Any, counts: dict[str, int], tiers: tuple[str, ...]) -> None:
        for tier in tiers:
            check.note(counts[tier] > 0, f"none in {tier}")
        check.detail = ", ".join(f"{tier} {counts[tier]}" for tier in tiers)

    def _recovered(self, back: str) -> None:
        hits = self.report.hits("after")
        self._count(self.checks.recovery, hits, ("ssd", "redis"))
        self.checks.recovery.detail = f"{back}; tokens then served: " + ", ".join(f"{t} {hits[t]}" for t in TIERS)
        outage = self.report.hits("outage")
        self.checks.outage.detail = "tokens served meanwhile: " + ", ".join(f"{t} {outage[t]}" for t in TIERS)
