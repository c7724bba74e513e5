"""What adapters tell the store of their requests: nothing of an engine is needed here."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from enum import Enum
from types import SimpleNamespace
from typing import Any

from kvstore.integrations.vllm.identity import Identity, Layout
from kvstore.integrations.vllm.requests import track
from kvstore.integrations.vllm.telling import Teller
from kvstore.policies.usage import Finish, Hint, Use
from kvstore.spec import Group, ModelSpec, Shard

SPEC = ModelSpec(
    model="tiny",
    layout="opaque:test",
    groups=(Group(kind="opaque", layers=2, kv_heads=1, page_tokens=32, page_bytes=512),),
)
IDENTITY = Identity(SPEC, (Layout(("layer.0", "layer.1"), 32, 512, sliding=False),), ((Shard.whole(SPEC),),))


class Reason(Enum):
    """The engine's, by name."""

    STOP = 0
    LENGTH = 1


class Client:
    def __init__(self) -> None:
        self.told: list[tuple[int, Hint, Use | None]] = []

    async def hint(self, spec: ModelSpec, prefix: Any, hint: Hint, *, use: Use | None, shards: Any) -> int:
        assert spec == SPEC and tuple(shards) == IDENTITY.needed
        self.told.append((len(prefix), hint, use))
        return 0


class Face:
    """`EngineClient.submit_work`, at once. `full`: too much is in flight."""

    def __init__(self, *, full: bool = False) -> None:
        self.client, self.full = Client(), full

    def submit_work(self, work: Callable[[Any], Awaitable[Any]]) -> Future[Any] | None:
        if self.full:
            return None
        future: Future[Any] = Future()
        future.set_result(asyncio.run(work(self.client)))  # type: ignore[arg-type]
        return future


class Counted(Counter[str]):
    def add(self, name: str, value: float = 1) -> None:
        self[name] += int(value)


def request(said: Any = None, reason: Reason | None = Reason.STOP) -> Any:
    ids = list(range(512))
    return SimpleNamespace(
        request_id="r",
        all_token_ids=ids,
        prompt_token_ids=ids,
        num_tokens=512,
        num_prompt_tokens=512,
        num_output_tokens=31,
        prompt_embeds=None,
        lora_request=None,
        cache_salt=None,
        mm_features=[],
        kv_transfer_params=None if said is None else {"kvstore": said},
        get_finished_reason=lambda: reason,
    )


def life(said: Any = None, reason: Reason | None = Reason.STOP, *, full: bool = False) -> tuple[Client, Counted]:
    """A request from its first lookup, made twice, to its end."""
    face, counted = Face(full=full), Counted()
    teller = Teller(IDENTITY, face, counted)  # type: ignore[arg-type]
    tracked = track(request(said, reason), SPEC, {})
    assert tracked is not None
    for _ in range(2):
        teller.begins(tracked, tracked.extend(512))
    teller.ended(tracked)
    return face.client, counted


def test_output_and_finish_are_told_at_the_end() -> None:
    client, counted = life()
    assert client.told == [(8, Hint(output_tokens=31, finish=Finish.END_TURN), None)]
    assert life(reason=Reason.LENGTH)[0].told[0][1].finish == Finish.OTHER
    assert life(reason=None)[0].told[0][1].finish == Finish.UNKNOWN
    assert counted == {"hints": 1}


def test_a_session_is_told_once_at_the_begin() -> None:
    client, _ = life({"session": "chat-7", "tool_use": True})
    begin, end = client.told
    assert begin == (8, Hint(), Use(session=b"chat-7", blocks=8))
    assert end[1] == Hint(output_tokens=31, finish=Finish.TOOL_USE) and end[2] is None


def test_what_a_request_says_of_the_time_after() -> None:
    client, _ = life({"ended": True, "reuse_s": 2.5, "ttl_s": 60, "priority": -3})
    [(_, hint, _)] = client.told
    assert hint == Hint(True, 31, Finish.END_TURN, 2.5, 60, -3)


def test_nonsense_is_left_out_and_counted() -> None:
    wrong = {"session": "x" * 65, "ended": 1, "reuse_s": float("nan"), "ttl_s": -1, "priority": 9}
    client, counted = life(wrong)
    assert client.told == [(8, Hint(output_tokens=31, finish=Finish.END_TURN), None)]
    assert counted == {"hints": 1, "hints_refused": 4}
    assert life("no mapping")[1] == {"hints": 1}


def test_nobody_waits_where_too_much_is_in_flight() -> None:
    client, counted = life({"session": "s"}, full=True)
    assert not client.told and counted == {"hints_dropped": 2}
