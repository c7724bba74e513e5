"""The real `System`: this machine's clock, memory, disk, threads and processes."""

from __future__ import annotations

import asyncio
import os
import threading
import time  # noqa: TID251 - the real clock
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from random import SystemRandom  # noqa: TID251 - the real random source
from typing import TypeVar

from kvstore.machine.disk import FolderDisk
from kvstore.machine.memory import MemfdMemory
from kvstore.machine.spawn import LocalProcess, LocalSpawner
from kvstore.seams import System

__all__ = ["LocalProcess", "LocalSpawner", "RealClock", "ThreadPool", "host_id", "real_system", "start_daemon"]

T = TypeVar("T")

INLINE_BYTES = 32 << 10
"""Copied and summed in less time than a thread takes to hear of it."""


class RealClock:
    def monotonic(self) -> float:
        return time.monotonic()

    def wall_ns(self) -> int:
        return time.time_ns()


def thread_cpu_s() -> float:
    """CPU seconds of the calling thread: what work costs a core, whoever else is on the machine. For benches."""
    return time.thread_time()


class ThreadPool:
    """A fixed number of threads for blocking byte work; what waits for one is bounded by the callers' byte budgets."""

    def __init__(self, threads: int) -> None:
        if threads < 1:
            raise ValueError("a pool needs a thread")
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="kvstore")

    async def run(self, function: Callable[..., T], *args: object) -> T:
        """Run in a thread. A cancelled caller gets its cancellation only when the thread has let go of the buffers:
        work that has not begun is dropped, work that has is waited for."""
        return await self.run_abortable(None, function, *args)

    async def run_abortable(self, abort: Callable[[], None] | None, function: Callable[..., T], *args: object) -> T:
        """As `run`; work that has begun when the caller is cancelled is asked to end early by `abort`."""
        loop = asyncio.get_running_loop()
        work = self._executor.submit(function, *args)
        waiter = loop.create_future()

        def settle() -> None:
            if not waiter.done():
                waiter.set_result(None)

        def ended(work: Future[T]) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(settle)

        work.add_done_callback(ended)
        try:
            await waiter
        except asyncio.CancelledError:
            if not work.cancel():
                if abort is not None:
                    abort()
                while not work.done():  # so `settle` is still to come, and finds the newest waiter
                    waiter = loop.create_future()
                    try:
                        await waiter
                    except asyncio.CancelledError:
                        continue  # cancelled again: the buffers are still in use
                if not work.cancelled():
                    work.exception()  # seen: the caller is told of its cancellation instead
            raise
        if work.cancelled():  # the pool was closed
            raise asyncio.CancelledError
        return work.result()

    def close(self) -> None:
        """Waits for running work; what has not begun is dropped."""
        self._executor.shutdown(wait=True, cancel_futures=True)


def start_daemon(name: str, target: Callable[[], None]) -> Callable[[float], None]:
    """A thread of its own that does not keep the process alive: the event loop of a client whose caller has none.

    Returns what waits for its end, at most so many seconds.
    """
    thread = threading.Thread(target=target, name=name, daemon=True)  # noqa: TID251 - the real thread
    thread.start()
    return thread.join


def host_id() -> str:
    """Equal on two processes that share a kernel, its process ids and its files: sockets and descriptors can pass."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        boot = file.read().strip()
    return "-".join([boot, *(str(os.stat(f"/proc/self/ns/{space}").st_ino) for space in ("pid", "mnt"))])


def real_system(threads: int = 4) -> System:
    """The ports of this process; `threads` move bytes."""
    return System(
        clock=RealClock(),
        rng=SystemRandom(),  # draws tokens and passwords too
        memory=MemfdMemory(),
        pool=ThreadPool(threads),
        host=host_id(),
        disk=FolderDisk,
        own_pool=ThreadPool,
        inline_bytes=INLINE_BYTES,
    )
