"""An event loop whose time jumps, and processes on it that can stop.

Nothing here waits: when no callback is ready, the clock moves to the next timer. The real client, worker and
coordinator code runs on it unchanged, a day in a second, the same way for the same seed.
"""

from __future__ import annotations

import asyncio
import contextvars
import gc
import itertools
import selectors
import traceback
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

T = TypeVar("T")

START_S = 1_000.0  # not 0: a clock that begins at 0 hides code that takes 0 for "never"
STEPS_MAX = 20_000_000
SHOWN = 20  # tasks named in a message


class SimError(AssertionError):
    """The simulated program did what no program may do."""


class Deadlock(SimError):
    """Every task waits, and no timer is set."""


class TimeLimit(SimError):
    """Not finished within its virtual time."""


class SimProcess:
    """One incarnation of a process: everything spawned in it stops with it. Made by `MemoryNetwork.boot`."""

    def __init__(self, name: str, host: str, clock_offset_s: float = 0.0, clock_rate: float = 1.0) -> None:
        self.name = name
        self.host = host
        self.clock_offset_s = clock_offset_s
        self.clock_rate = clock_rate  # its seconds in one of ours
        self.wall_step_s = 0.0  # what somebody set its wall clock back or ahead by
        self.crashed = False
        self.paused = False
        self.paused_s = 0.0  # in all
        self.slow_s = 0.0  # at most what a byte mover takes; 0: as usual
        self.slowed = 0  # how often it was made slow
        self.mappings: list[Any] = []  # `tests.sim.memory.Mapping`: what it has mapped of others
        self.on_announce: Callable[[], None] | None = None  # called once, when it has sent an announcement
        self.on_read: Callable[[], None] | None = None  # called once, when it begins to read what it has mapped
        self._paused_at = 0.0
        self._parked: list[_Cell] = []

    def __repr__(self) -> str:
        return f"<{self.name}{' crashed' if self.crashed else ''}>"

    def spawn(self, coro: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """A task of this process: it, and all it starts, stands still from `crash` on."""
        return asyncio.get_running_loop().create_task(coro, context=self.context())

    def context(self) -> contextvars.Context:
        context = contextvars.copy_context()
        context.run(_PROCESS.set, self)
        return context

    def monotonic(self) -> float:
        """This process's clock: each has its own origin and drifts, so that comparing two processes' clocks shows."""
        return asyncio.get_running_loop().time() * self.clock_rate + self.clock_offset_s

    def pause(self) -> None:
        """Stand still (a long collection, a stopped container) until `resume`; timers that pass in between are late."""
        self.paused = True
        self._paused_at = asyncio.get_running_loop().time()

    def resume(self) -> None:
        if not self.paused:
            return
        self.paused = False
        self.paused_s += asyncio.get_running_loop().time() - self._paused_at
        if not self.crashed:
            self._replay()

    def crash(self) -> None:
        """Nothing of it runs again: no `finally`, no cleanup, as after SIGKILL."""
        self.crashed = True

    def bury(self) -> None:
        """After the scenario: let what stood still run, so that it can be cancelled and collected."""
        self.crashed = self.paused = False
        self._replay()

    def _replay(self) -> None:
        parked, self._parked = self._parked, []
        for cell in parked:
            cell.again()


_PROCESS: contextvars.ContextVar[SimProcess | None] = contextvars.ContextVar("process", default=None)


def current_process() -> SimProcess | None:
    """Of the running task; None in the scenario itself."""
    return _PROCESS.get()


class _Cell:
    """One callback of a process; kept aside when the process stands still at its time."""

    __slots__ = ("args", "callback", "context", "handle", "process")

    def __init__(self, process: SimProcess, callback: Callable[..., object], args: tuple[Any, ...]) -> None:
        self.process = process
        self.callback = callback
        self.args = args
        self.context: contextvars.Context | None = None
        self.handle: asyncio.Handle | None = None

    def __call__(self) -> None:
        if self.process.crashed or self.process.paused:
            self.process._parked.append(self)
        else:
            self.callback(*self.args)

    def again(self) -> None:
        asyncio.get_running_loop().call_soon(self._unless_cancelled, context=self.context)

    def _unless_cancelled(self) -> None:
        """What came before it in the same turn may have cancelled it."""
        if self.handle is not None and not self.handle.cancelled():
            self.callback(*self.args)


class _Task(asyncio.Task[Any]):
    """Hashes by number, not by address: asyncio keeps tasks in sets and walks through them."""

    _numbers = itertools.count()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._number = next(self._numbers)
        super().__init__(*args, **kwargs)

    def __hash__(self) -> int:
        return self._number

    __eq__ = object.__eq__


class _Jump(selectors.SelectSelector):
    """Instead of waiting for descriptors, moves the clock."""

    loop: VirtualLoop

    def select(self, timeout: float | None = None) -> list[Any]:
        self.loop.jump(timeout)
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """`time()` is virtual seconds. `limit_s`: virtual time a scenario may take."""

    def __init__(self, limit_s: float = 3_600.0) -> None:
        self._now = START_S
        self._limit = START_S + limit_s
        self._steps = 0
        self._closing = False
        self.problems: list[str] = []
        selector = _Jump()
        selector.loop = self
        super().__init__(selector)
        _Task._numbers = itertools.count()
        self.set_task_factory(_make_task)
        self.set_exception_handler(self._problem)

    def time(self) -> float:
        return self._now

    def jump(self, timeout: float | None) -> None:
        """Called when the loop would wait: to the next timer."""
        self._steps += 1
        if self._steps > STEPS_MAX:
            raise TimeLimit(f"no end after {STEPS_MAX} steps: {self.waiting()}")
        if timeout == 0:
            return
        if timeout is None:
            raise Deadlock(f"every task waits for ever at {self._now:.6f}: {self.waiting()}")
        self._now = max(self._now, self._scheduled[0].when())  # type: ignore[attr-defined]
        if self._now > self._limit and not self._closing:
            raise TimeLimit(f"not finished at {self._now:.3f}: {self.waiting()}")

    def waiting(self) -> str:
        """The unfinished tasks, for a message."""
        tasks = sorted((t for t in asyncio.all_tasks(self) if not t.done()), key=hash)
        names = [getattr(t.get_coro(), "__qualname__", str(t)) for t in tasks]
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        return ", ".join(names[:SHOWN]) + more

    def call_soon(  # type: ignore[override]
        self, callback: Any, *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.Handle:
        cell = self._cell(callback, args, context)
        if cell is None:
            return super().call_soon(callback, *args, context=context)
        cell.handle = super().call_soon(cell, context=cell.context)
        return cell.handle

    def call_at(  # type: ignore[override]
        self, when: float, callback: Any, *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.TimerHandle:
        cell = self._cell(callback, args, context)
        if cell is None:
            return super().call_at(when, callback, *args, context=context)
        when = self._now + (when - self._now) / cell.process.clock_rate
        handle = super().call_at(when, cell, context=cell.context)
        cell.handle = handle
        return handle

    def _cell(self, callback: Any, args: tuple[Any, ...], context: contextvars.Context | None) -> _Cell | None:
        process = _PROCESS.get() if context is None else context.get(_PROCESS)
        if process is None:
            return None
        cell = _Cell(process, callback, args)
        cell.context = contextvars.copy_context() if context is None else context
        return cell

    def run_in_executor(self, *args: Any) -> Any:  # type: ignore[override]
        raise SimError("a thread in the simulator: use System.pool")

    def _add_reader(self, fd: Any, callback: Any, *args: Any) -> Any:
        if self._ssock is not None and fd != self._ssock.fileno():  # type: ignore[attr-defined]
            raise SimError("a real descriptor in the simulator: use the Transport")
        return super()._add_reader(fd, callback, *args)  # type: ignore[misc]

    def _write_to_self(self) -> None:
        """Nobody sleeps: there is nobody to wake."""

    def _problem(self, _loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        what = context.get("task") or context.get("future") or context.get("handle") or ""
        where = "".join(traceback.format_tb(error.__traceback__)[-2:]) if error is not None else ""
        self.problems.append(f"{context.get('message')}: {error!r} {what}\n{where}")

    def end(self, processes: Sequence[SimProcess] = ()) -> None:
        """Let every process run again, cancel all tasks, close. SimError where one does not end."""
        self._closing = True
        self._steps = 0

        async def bury() -> None:
            for process in processes:
                process.bury()

        try:
            self.run_until_complete(bury())
            for _ in range(100):  # a cancelled task may start another
                tasks = [t for t in asyncio.all_tasks(self) if not t.done()]
                if not tasks:
                    break
                for task in tasks:
                    task.cancel()
                self.run_until_complete(asyncio.wait(tasks, timeout=60.0))
            else:
                raise SimError(f"these can't be cancelled: {self.waiting()}")
            self.run_until_complete(self.shutdown_asyncgens())
        finally:
            self.close()


def _make_task(loop: asyncio.AbstractEventLoop, coro: Any, **kwargs: Any) -> asyncio.Task[Any]:
    return _Task(coro, loop=loop, **kwargs)


def run(coro: Coroutine[Any, Any, T], *, limit_s: float = 3_600.0, processes: Sequence[SimProcess] = ()) -> T:
    """The result of `coro` on a fresh virtual loop.

    Raises Deadlock, TimeLimit, or SimError for an exception that nobody caught in any task. `processes`: a list
    that the scenario fills (`MemoryNetwork.processes`), buried at the end.
    """
    loop = VirtualLoop(limit_s)
    gc.freeze()  # what is older than this run is not looked through at its end
    try:
        result = loop.run_until_complete(coro)
        gc.collect()  # a task that failed unseen reports it when it is collected
        problems = list(loop.problems)
    finally:
        gc.unfreeze()
        loop.end(processes)
    if problems:
        raise SimError("; ".join(problems[:SHOWN]))
    return result
