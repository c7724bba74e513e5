"""A small trace replayed for as long as faults go on: every byte, every deadline, every exception is looked at."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from kvstore.client.kv_client import KVClient
from kvstore.config import ClientConfig
from kvstore.keys import Chain, chain
from kvstore.operations.payload import Payload, replay_spec, tokens_of

BLOCK_BYTES = 16 << 10
SPEC = replay_spec(BLOCK_BYTES)
MATCH_S, CALL_S, SLACK_S = 1.0, 3.0, 1.0
PACE_S = 0.01  # between two requests of one driver: the servers need the processor, too
PAYLOAD = Payload(BLOCK_BYTES)


def trace(seed: int, prompts: int = 16, blocks: int = 6) -> list[Chain]:
    """Prompts that share their beginnings in pairs, as turns of one conversation do."""
    made = []
    for number in range(prompts):
        shared = [seed * 10_000 + number // 2 * 100 + depth for depth in range(blocks // 2)]
        own = [seed * 10_000 + 5_000 + number * 100 + depth for depth in range(blocks - blocks // 2)]
        made.append(chain(SPEC, tokens_of((*shared, *own))))
    return made


def client_config(coordinators: Sequence[str]) -> ClientConfig:
    """Of a client whose every call has one of the deadlines above."""
    return ClientConfig(
        coordinators=tuple(coordinators),
        match_timeout_s=MATCH_S,
        get_timeout_s=CALL_S,
        put_timeout_s=CALL_S,
        negative_cache_s=0.5,
        staging_bytes=512 << 10,
    )


@dataclass(slots=True)
class Moment:
    """One request: seconds of the loop's clock, which prompt, blocks asked for and got."""

    began: float
    ended: float
    prompt: int
    asked: int
    got: int


@dataclass(slots=True)
class Load:
    """`async with Load(clients, prompts) as load`: drivers ask for prompts at random, and put what is missing."""

    clients: Sequence[KVClient]
    prompts: Sequence[Chain]
    moments: list[Moment] = field(default_factory=list)
    trouble: Counter[str] = field(default_factory=Counter)  # wrong bytes, late calls, exceptions
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)
    _flying: dict[int, float] = field(default_factory=dict)  # driver -> when its request began
    _over: bool = False

    async def __aenter__(self) -> Load:
        self._tasks = [asyncio.create_task(self._drive(number)) for number in range(len(self.clients))]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._over = True
        for result in await asyncio.gather(*self._tasks, return_exceptions=True):
            if isinstance(result, BaseException):
                self.trouble[f"exception {type(result).__name__}: {result}"] += 1

    def flying(self) -> int:
        """Requests on their way now."""
        return len(self._flying)

    def since(self, begin: float, end: float) -> tuple[int, int, int]:
        """Requests that ended between the two moments, the blocks they asked for, and those they got."""
        found = [moment for moment in self.moments if begin <= moment.ended <= end]
        return len(found), sum(moment.asked for moment in found), sum(moment.got for moment in found)

    def since_of(self, begin: float, end: float, first: Sequence[int]) -> tuple[int, int]:
        """Of the first `first[prompt]` blocks of each request that ended between the moments: asked for, and got."""
        found = [moment for moment in self.moments if begin <= moment.ended <= end]
        asked = sum(first[moment.prompt] for moment in found)
        return asked, sum(min(moment.got, first[moment.prompt]) for moment in found)

    async def _drive(self, number: int) -> None:
        loop, draw, client = asyncio.get_running_loop(), random.Random(number), self.clients[number]
        while not self._over:
            which = draw.randrange(len(self.prompts))
            prompt = self.prompts[which]
            self._flying[number] = began = loop.time()
            got = await self.one(client, prompt)
            del self._flying[number]
            self.moments.append(Moment(began, loop.time(), which, len(prompt), got))
            await asyncio.sleep(PACE_S)

    async def one(self, client: KVClient, prompt: Chain) -> int:
        """Look up, load and check, put the rest; blocks that were there."""
        plan = await self._timed("match", MATCH_S, client.match(SPEC, prompt))
        got = 0
        if plan.blocks:
            result = await self._timed("get", CALL_S, client.get(plan))
            got = result.blocks
            for depth in range(got):
                if not PAYLOAD.check(prompt.keys[depth], result.buffers[0][depth]):
                    self.trouble["wrong bytes"] += 1
        if got < len(prompt):
            blocks = [PAYLOAD.make(key) for key in prompt.keys[got:]]
            await self._timed("put", CALL_S, client.put(SPEC, prompt, blocks, got))
        return got

    async def _timed(self, what: str, deadline_s: float, call: Any) -> Any:
        loop = asyncio.get_running_loop()
        began = loop.time()
        result = await call
        took = loop.time() - began
        if took > deadline_s + SLACK_S:
            self.trouble[f"{what} took {took:.1f} s"] += 1
        return result
