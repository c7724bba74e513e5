"""What the engine knows of its requests, told to the store: sessions at their begin, output and end at their end.

A request may say more of itself in `kv_transfer_params`, under "kvstore": `session` (text), `ended`, `tool_use`
(booleans), `reuse_s`, `ttl_s` (seconds), `priority` (-8 .. 8). What is not of that kind is left out and counted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

from kvstore.client.engine_face import EngineClient
from kvstore.client.kv_client import KVClient
from kvstore.integrations.vllm.identity import Identity
from kvstore.integrations.vllm.requests import Tracked
from kvstore.keys import Chain
from kvstore.policies.usage import PRIORITY_MAX, SESSION_BYTES_MAX, Finish, Hint, Use

STOPPED = "STOP"
"""The engine's name of an output that came to its end by itself."""


class Counting(Protocol):
    def add(self, name: str, value: float = 1) -> None: ...


class Teller:
    """Nobody waits for what is told, and nothing is told twice. Only the scheduler's thread calls in."""

    def __init__(self, identity: Identity, face: EngineClient, counters: Counting) -> None:
        self._spec, self._shards = identity.spec, identity.needed
        self._face, self._counters = face, counters

    def begins(self, tracked: Tracked, keys: list[bytes]) -> None:
        """A request whose session is known begins; of others the store knows by the blocks they open."""
        session = session_of(said(tracked.request))
        if session and not tracked.told:
            self._tell(keys, Hint(), Use(session=session, blocks=len(keys)))
        tracked.told = True

    def ended(self, tracked: Tracked) -> None:
        """A request is over: how much was generated, how that ended, and what it says of the time after."""
        keys = tracked.builder.chain.keys
        given = said(tracked.request)
        hint, wrong = hint_of(tracked.request, given)
        if wrong:
            self._counters.add("hints_refused", wrong)
        if keys and hint != Hint():
            self._tell(list(keys), hint, None)

    def _tell(self, keys: list[bytes], hint: Hint, use: Use | None) -> None:
        prefix = Chain(self._spec, list(keys))

        async def tell(client: KVClient) -> int:
            return await client.hint(self._spec, prefix, hint, use=use, shards=self._shards)

        self._counters.add("hints" if self._face.submit_work(tell) is not None else "hints_dropped")


def said(request: Any) -> Mapping[str, Any]:
    """What a request says of itself. Pure."""
    found = (getattr(request, "kv_transfer_params", None) or {}).get("kvstore")
    return found if isinstance(found, Mapping) else {}


def session_of(given: Mapping[str, Any]) -> bytes:
    """Empty for none, and for a name too long. Pure."""
    name = given.get("session")
    named = name.encode() if isinstance(name, str) else b""
    return named if len(named) <= SESSION_BYTES_MAX else b""


def hint_of(request: Any, given: Mapping[str, Any]) -> tuple[Hint, int]:
    """What is known at a request's end, and how many of the things it says are not of their kind. Pure."""
    wrong = 0

    def one(name: str, kinds: tuple[type, ...], low: float, high: float) -> Any:
        nonlocal wrong
        value = given.get(name)
        if value is None:
            return None
        if type(value) in kinds and math.isfinite(value) and low <= value <= high:
            return value
        wrong += 1
        return None

    numbers = (int, float)
    ended, tool_use = (one(name, (bool,), 0, 1) for name in ("ended", "tool_use"))
    reuse_s, ttl_s = (one(name, numbers, 0, 1e9) for name in ("reuse_s", "ttl_s"))
    priority = one("priority", (int,), -PRIORITY_MAX, PRIORITY_MAX) or 0
    output = getattr(request, "num_output_tokens", None)
    return Hint(bool(ended), output, _finish(request, bool(tool_use)), reuse_s, ttl_s, priority), wrong


def _finish(request: Any, tool_use: bool) -> Finish:
    """The engine does not know a tool call from an answer: that only who sends the request can say."""
    reason = getattr(request, "get_finished_reason", lambda: None)()
    if reason is None:
        return Finish.TOOL_USE if tool_use else Finish.UNKNOWN
    if getattr(reason, "name", "") != STOPPED:
        return Finish.OTHER
    return Finish.TOOL_USE if tool_use else Finish.END_TURN
