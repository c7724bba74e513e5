"""`EngineClient`: the client for engine workers that have no event loop. Submit, go on computing, poll.

One daemon thread runs the loop of a `KVClient`; nothing but finished results crosses over. Everything here returns at
once, but for `wait` and the constructor, which say how long.
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar

from kvstore.client.getting import Buffers
from kvstore.client.hinting import NO_HINT
from kvstore.client.kv_client import GetResult, KVClient
from kvstore.client.needs import LayerReady
from kvstore.client.plan import HitPlan
from kvstore.client.put_blocks import PutResult
from kvstore.config import ClientConfig
from kvstore.errors import BadRequest, KVStoreError, SetupError
from kvstore.keys import Chain, Tokens
from kvstore.policies.usage import Hint, Use
from kvstore.spec import ModelSpec, Shard
from kvstore.types import CommitToken, Fidelity

T = TypeVar("T")

INFLIGHT_MAX = 1024
"""Operations that are submitted and not yet polled. Beyond it `submit_*` answers None: poll first."""

CLOSE_S = 10.0

StartThread = Callable[[str, Callable[[], None]], Callable[[float], object]]
"""(name, target) -> what waits for the thread's end, at most so many seconds."""


@dataclass(frozen=True, slots=True)
class Done:
    """One finished operation. `error` is a wrong argument, told late; `value` is None then."""

    ticket: int
    value: HitPlan | GetResult | PutResult | int | None
    error: KVStoreError | None = None


class EngineClient:
    """Made in the process that uses it: after a fork it is of no use, and says so. `close` it, or use `with`."""

    def __init__(
        self,
        config: ClientConfig,
        *,
        start_thread: StartThread | None = None,
        connect: Callable[[], Awaitable[KVClient]] | None = None,
    ) -> None:
        """Waits at most the connect timeout, twice. Raises as `KVClient.connect`."""
        if start_thread is None:
            from kvstore.machine.system import start_daemon

            start_thread = start_daemon
        self._pid = os.getpid()
        self._loop = asyncio.new_event_loop()
        self._tickets = 0
        self._working: dict[Future[Any], None] = {}
        self._running: dict[int, Future[Any]] = {}
        self._finished: deque[int] = deque()  # appended by the thread, popped by the caller
        self._join = start_thread("kvstore-client", self._run)
        opening = asyncio.run_coroutine_threadsafe(_opened(connect or (lambda: KVClient.connect(config))), self._loop)
        try:
            self.client = opening.result(2 * config.connect_timeout_s + 1)
        except FutureTimeout:
            opening.cancel()
            self._stop_loop()
            raise SetupError("the client did not get ready in time: check the addresses") from None
        except BaseException:
            self._stop_loop()
            raise

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            self._loop.close()

    def _stop_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._join(CLOSE_S)

    def __enter__(self) -> EngineClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- submit ----------------------------------------------------------------------------------------------------

    def submit_match(
        self,
        spec: ModelSpec,
        prefix: Chain | Tokens,
        shards: Sequence[Shard] | None = None,
        least: Fidelity = Fidelity.EXACT,
        after: Sequence[CommitToken] = (),
        *,
        recompute_tokens_per_s: float | None = None,
        timeout_s: float | None = None,
    ) -> int | None:
        """A ticket for a `HitPlan`; None when too much is in flight."""
        options = {"recompute_tokens_per_s": recompute_tokens_per_s, "timeout_s": timeout_s}
        return self._submit(lambda: self.client.match(spec, prefix, shards, least, after, **options))

    def submit_get(
        self,
        plan: HitPlan,
        into: Buffers | None = None,
        *,
        layers: range | None = None,
        on_layer: Callable[[LayerReady], object] | None = None,
        timeout_s: float | None = None,
    ) -> int | None:
        """A ticket for a `GetResult`. The buffers belong to the service until it is done. `on_layer` is called in the
        client's thread: let it set a flag or an event, no more."""
        return self._submit(lambda: self.client.get(plan, into, layers=layers, on_layer=on_layer, timeout_s=timeout_s))

    def submit_prefetch(self, plan: HitPlan, *, timeout_s: float | None = None) -> int | None:
        """A ticket for the number of blocks that are in memory near by."""
        return self._submit(lambda: self.client.prefetch(plan, timeout_s=timeout_s))

    def submit_put(
        self,
        spec: ModelSpec,
        prefix: Chain,
        blocks: Sequence[Any],
        first: int = 0,
        shard: Shard | None = None,
        computed_on: Fidelity = Fidelity.EXACT,
        *,
        timeout_s: float | None = None,
    ) -> int | None:
        """A ticket for a `PutResult`. The blocks must not change until it is done."""
        return self._submit(
            lambda: self.client.put(spec, prefix, blocks, first, shard, computed_on, timeout_s=timeout_s)
        )

    def submit_hint(
        self, spec: ModelSpec, prefix: Chain | Tokens, hint: Hint = NO_HINT, *, use: Use | None = None
    ) -> int | None:
        """A ticket for the number of blocks that the workers hold of it: see `KVClient.hint`."""
        return self._submit(lambda: self.client.hint(spec, prefix, hint, use=use))

    def submit_work(self, work: Callable[[KVClient], Awaitable[T]]) -> Future[T] | None:
        """Several calls of the client as one operation, in its loop: the future ends with it (poll that, there is no
        ticket). None when too much is in flight. `work` moves bytes through `client.system.pool` only."""
        self._check_process()
        if len(self._working) >= INFLIGHT_MAX:
            return None
        future = asyncio.run_coroutine_threadsafe(_awaited(lambda: work(self.client)), self._loop)
        self._working[future] = None
        future.add_done_callback(lambda done: self._working.pop(done, None))
        return future

    def _submit(self, operation: Callable[[], Awaitable[Any]]) -> int | None:
        self._check_process()
        if len(self._running) >= INFLIGHT_MAX:
            return None
        self._tickets += 1
        ticket = self._tickets
        future = asyncio.run_coroutine_threadsafe(_awaited(operation), self._loop)
        self._running[ticket] = future
        future.add_done_callback(lambda done: self._finished.append(ticket))
        return ticket

    # --- poll ------------------------------------------------------------------------------------------------------

    def poll(self) -> list[Done]:
        """What has finished since the last call; each ticket once."""
        self._check_process()
        done = []
        while self._finished:
            ticket = self._finished.popleft()
            future = self._running.pop(ticket, None)
            if future is not None:
                done.append(_done(ticket, future))
        return done

    def wait(self, ticket: int, timeout_s: float) -> Done | None:
        """One operation's end, None when it does not come in time. BadRequest for a ticket that is none (any more)."""
        self._check_process()
        future = self._running.get(ticket)
        if future is None:
            raise BadRequest(f"ticket {ticket} is not in flight: it was polled already, or never given")
        try:
            future.exception(timeout_s)
        except FutureTimeout:
            return None
        del self._running[ticket]
        return _done(ticket, future)

    def close(self) -> None:
        """Cancel what is in flight and end the thread. Idempotent."""
        self._check_process()
        if self._loop.is_closed() or not self._loop.is_running():
            return
        for future in [*self._running.values(), *list(self._working)]:
            future.cancel()
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(CLOSE_S)
        self._stop_loop()

    async def _end(self) -> None:
        mine = asyncio.current_task()
        tasks = [task for task in asyncio.all_tasks() if task is not mine]
        await self.client.close()
        rest = [task for task in tasks if not task.done()]
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise BadRequest("this EngineClient was made before a fork: make one in the process that uses it")


async def _opened(connect: Callable[[], Awaitable[KVClient]]) -> KVClient:
    return await connect()


async def _awaited(operation: Callable[[], Awaitable[Any]]) -> Any:
    return await operation()


def _done(ticket: int, future: Future[Any]) -> Done:
    if future.cancelled():
        return Done(ticket, None, BadRequest("cancelled: the client was closed"))
    error = future.exception()
    if error is None:
        return Done(ticket, future.result())
    if isinstance(error, KVStoreError):
        return Done(ticket, None, error)
    raise error
