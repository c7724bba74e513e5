"""A get whose layers are taken one by one as they arrive."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from types import TracebackType
from typing import Any

from kvstore.client.needs import LayerReady

Get = Callable[[Callable[[LayerReady], object]], Awaitable[Any]]


class LayerStream:
    """An async iterator of `LayerReady`; `result()` is the get's own. Use `async with`: leaving it early ends the get.

    What waits to be taken is bounded by the layers of the model.
    """

    def __init__(self, get: Get) -> None:
        self._get = get
        self._ready: asyncio.Queue[LayerReady | None] = asyncio.Queue()
        self._task: asyncio.Future[Any] | None = None

    async def __aenter__(self) -> LayerStream:
        self._task = asyncio.ensure_future(self._get(self._ready.put_nowait))
        self._task.add_done_callback(lambda done: self._ready.put_nowait(None))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._task is not None
        if not self._task.done():
            self._task.cancel()
        await asyncio.wait([self._task])  # only then nobody writes to the buffers any more
        if kind is None and not self._task.cancelled():
            self._task.result()

    async def __aiter__(self) -> AsyncIterator[LayerReady]:
        while (ready := await self._ready.get()) is not None:
            yield ready

    async def result(self) -> Any:
        """The `GetResult`; raises what the get raises."""
        assert self._task is not None, "use it in `async with`"
        return await asyncio.shield(self._task)
