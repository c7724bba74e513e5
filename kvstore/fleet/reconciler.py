"""The reconciler: an actor that keeps a fleet's workers and coordinators where they should be. Ray restarts it.

Every `fleet.reconcile_s` it looks at Ray's nodes and at the names of the fleet's actors, asks each actor how it is and
tells it where the coordinators are now, and carries out what `kvstore.fleet.reconcile.plan` says. It keeps nothing that
could not be looked up again, but for which nodes were drained: after its own restart those get a worker again.
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from typing import Any

from kvstore.config import parse_toml
from kvstore.errors import KVStoreError
from kvstore.fleet.actor import restarted
from kvstore.fleet.maker import Maker
from kvstore.fleet.ray_nodes import living_nodes
from kvstore.fleet.reconcile import COORDINATOR, WORKER, Backoff, Placed, Plan, Want, Wanted, plan
from kvstore.machine.system import RealClock
from kvstore.seams import Clock

NAME = "reconciler"
REPORT_S = 2.0  # that an actor has to say how it is
HURRY_S = 0.2  # between looks while something starts
BACKOFF_FIRST_S, STABLE_S = 0.5, 60.0
LOG_LINES = 64
STOP_S = 3.0  # that an actor in the way gets to leave


class Reconciler:
    """Async actor. Its arguments are `Maker`'s, the configuration as text."""

    def __init__(self, config_toml: str, token: str, loopback: bool, folder: str) -> None:
        self._config = parse_toml(config_toml)
        self._maker = Maker(self._config, token, loopback, folder)
        self._clock: Clock = RealClock()
        self._want = Want(self._config.fleet.workers, self._config.fleet.coordinators)
        self._backoff = Backoff(BACKOFF_FIRST_S, self._config.fleet.backoff_max_s, STABLE_S)
        self._actors: dict[Placed, Any] = {}  # handles
        self._asked: dict[Placed, asyncio.Future[dict[str, Any]]] = {}  # one question at a time
        self._said: dict[Placed, dict[str, Any]] = {}
        self._heard: dict[Placed, float] = {}
        self._ended: dict[Placed, float] = {}  # by us; Ray names them a moment longer
        self._errors: dict[str, str] = {}  # title -> why its last start failed
        self._places: dict[str, str] = {}  # title of a worker -> the node it was on last
        self._held: dict[str, None] = {}
        self._last = Plan((), (), 0)
        self._passes = 0
        self._log: deque[str] = deque(maxlen=LOG_LINES)
        self._began = self._clock.monotonic()
        self._hurry(self._began)
        if restarted():
            self._say("restarted: goes on with what Ray names")
        self._stopping = asyncio.Event()
        self._running = asyncio.get_running_loop().create_task(self._run())

    async def stop(self) -> None:
        """Start and end nothing any more. Idempotent."""
        self._stopping.set()
        await asyncio.wait([self._running])

    async def release(self) -> None:
        """Nodes whose worker was drained get one again."""
        self._held.clear()

    async def status(self) -> dict[str, Any]:
        """What it sees: `settled` when all that is wanted is up; a row for each actor; the latest lines of its log."""
        now = self._clock.monotonic()
        rows = [self._row(actor, now) for actor in sorted(self._actors)]
        return {
            "pid": os.getpid(),
            "restarted": restarted(),
            "settled": self._settled(),
            "unplaced": self._last.unplaced,
            "held": list(self._held),
            "errors": dict(self._errors),
            "actors": rows,
            "log": list(self._log),
        }

    def _settled(self) -> bool:
        """Whether all that is wanted is up, by the last pass."""
        if not self._passes or not self._actors or self._last.ends or self._last.starts or self._last.unplaced:
            return False
        return all(self._said.get(actor, {}).get("up") for actor in self._actors)

    def _row(self, actor: Placed, now: float) -> dict[str, Any]:
        said = self._said.get(actor, {})
        return {
            "name": actor.title,
            "role": actor.role,
            "node": actor.node,
            "up": bool(said.get("up")),
            "silent": now - self._heard.get(actor, now) > 2 * REPORT_S,
            "id": said.get("id", ""),
            "address": said.get("address", actor.detail if actor.role == COORDINATOR else ""),
            "pid": said.get("pid", 0),
            "found": said.get("found", 0),
            "ssd_folder": self._maker.ssd(actor.detail) if actor.role == WORKER else "",
        }

    # --- a pass ----------------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        import ray

        while not self._stopping.is_set():
            try:
                await self._pass()
                self._passes += 1
            except (ray.exceptions.RayError, KVStoreError, OSError, ValueError, RuntimeError) as error:
                self._say(f"a pass failed and is tried again: {type(error).__name__}: {_line(error)}")
            try:
                async with asyncio.timeout(self._pace_s()):
                    await self._stopping.wait()
            except TimeoutError:
                continue

    async def _pass(self) -> None:
        nodes = living_nodes(self._want.workers)
        now = self._clock.monotonic()
        self._look(now)
        await self._ask(now)
        self._collect(now)
        await self._see_off(now)
        alive = {node.id for node in nodes}
        for gone in [node for node in self._held if node not in alive]:
            del self._held[gone]
        self._last = todo = plan(self._want, nodes, self._actors, self._held)
        for actor, why in todo.ends:
            await self._end(actor, why)
        now = self._clock.monotonic()
        ready = [wanted for wanted in todo.starts if not self._backoff.waits(wanted.title, now)]
        made = await self._maker.details(ready)
        addresses = [*self._addresses(), *(actor.detail for actor in made if actor.role == COORDINATOR)]
        for wanted, actor in zip(ready, made, strict=True):
            self._start(wanted, actor, addresses)

    def _look(self, now: float) -> None:
        """Which actors there are, by Ray's own list. Mutates."""
        import ray
        from ray.util import list_named_actors

        self._ended = {actor: at for actor, at in self._ended.items() if now - at < 2 * STOP_S}
        named = {actor for name in list_named_actors() if (actor := Placed.of(name)) is not None}
        named -= self._ended.keys()
        for actor in [actor for actor in self._actors if actor not in named]:
            delay_s = self._backoff.failed(actor.title, now)
            later = f": started again in {delay_s:g} s" if delay_s else ""
            self._say(f"{actor.title} on {actor.node[:8]} has ended for good{later}")
            self._forget(actor)
        for actor in named - self._actors.keys():
            try:
                self._actors[actor] = ray.get_actor(actor.actor)
            except ValueError:  # it ended in between: seen in the next pass
                continue
            self._heard[actor] = now
            if actor.role == WORKER:
                self._places[actor.title] = actor.node

    async def _ask(self, now: float) -> None:
        """How each actor is; one that does not answer is asked no second time until it has. Mutates."""
        addresses = self._addresses()
        for actor, handle in self._actors.items():
            if actor not in self._asked:
                self._asked[actor] = asyncio.wrap_future(handle.report.remote(addresses).future())
        if self._asked:
            await asyncio.wait(self._asked.values(), timeout=self._pace_s())

    def _collect(self, now: float) -> None:
        import ray

        for actor, answer in [(actor, answer) for actor, answer in self._asked.items() if answer.done()]:
            del self._asked[actor]
            try:
                said = answer.result()
            except ray.exceptions.RayError:  # it died or is restarting: Ray's list says which
                self._said.pop(actor, None)
                continue
            if actor in self._actors:
                self._hear(actor, said, now)

    def _hear(self, actor: Placed, said: dict[str, Any], now: float) -> None:
        before = self._said.get(actor, {})
        self._said[actor], self._heard[actor] = said, now
        if said["up"] and (before.get("pid"), before.get("up")) != (said["pid"], True):
            self._errors.pop(actor.title, None)
            blocks = f", {said['found']} blocks found" if said.get("found") else ", starts empty"
            self._say(
                f"{actor.title} is up on {actor.node[:8]} at {said['address']}{blocks if actor.role == WORKER else ''}"
            )

    async def _see_off(self, now: float) -> None:
        """Actors that hold nothing any more, or could not start. Mutates."""
        for actor, said in list(self._said.items()):
            if said["left"]:
                self._held[actor.node] = None
                await self._end(actor, "it was drained; its node gets no other until kvstore up is called again")
                self._backoff.ended(actor.title)
            elif said["error"] and not said["up"]:
                self._errors[actor.title] = said["error"]
                await self._end(actor, said["error"])
                self._backoff.failed(actor.title, now)

    async def _end(self, actor: Placed, why: str) -> None:
        """Take leave of an actor; one that can't be asked to go is killed. Mutates."""
        import ray

        self._say(f"{actor.title} on {actor.node[:8]} is ended: {why}")
        handle = self._actors[actor]
        if self._said.get(actor, {}).get("up") and actor.role == COORDINATOR:
            await asyncio.wait([asyncio.wrap_future(handle.stop.remote().future())], timeout=STOP_S)
        ray.kill(handle, no_restart=True)
        self._ended[actor] = self._clock.monotonic()
        self._forget(actor)

    def _forget(self, actor: Placed) -> None:
        del self._actors[actor]
        self._said.pop(actor, None)
        self._heard.pop(actor, None)
        self._asked.pop(actor, None)

    # --- starting --------------------------------------------------------------------------------------------------

    def _addresses(self) -> list[str]:
        return sorted(actor.detail for actor in self._actors if actor.role == COORDINATOR)

    def _start(self, wanted: Wanted, actor: Placed, addresses: list[str]) -> None:
        """Hand an actor to Ray. Mutates."""
        if wanted.role == WORKER:
            before = self._places.get(wanted.title, wanted.node.id)
            if before != wanted.node.id:
                self._say(f"{wanted.title} moves from {before[:8]} to {wanted.node.id[:8]}, without its blocks")
            self._places[wanted.title] = wanted.node.id
        self._actors[actor] = self._maker.make(wanted, actor, addresses)
        now = self._clock.monotonic()
        self._heard[actor] = now
        self._backoff.started(wanted.title, now)
        self._hurry(now)

    def _hurry(self, now: float) -> None:
        """Something starts: looks are short until all is up, for as long as a start may take. Mutates."""
        self._hurried = now + self._config.fleet.start_timeout_s

    def _pace_s(self) -> float:
        """Between two looks, and for an answer to one."""
        hurried = not self._settled() and self._clock.monotonic() < self._hurried
        return min(self._config.fleet.reconcile_s, HURRY_S if hurried else REPORT_S)

    def _say(self, what: str) -> None:
        self._log.append(f"{self._clock.monotonic() - self._began:.1f} s: {what}")
        print(f"reconciler: {what}", flush=True)  # noqa: T201 - the actor's log


def _line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
