"""Blocks and clients of `bench transfer`: what one round moves, where it lies, and how contestants take turns."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from kvstore.bench.tiers_blocks import COLD_BYTES, Buffers, differing, random_buffers
from kvstore.client.kv_client import KVClient
from kvstore.client.plan import HitPlan
from kvstore.config import ClientConfig
from kvstore.errors import Unavailable
from kvstore.keys import Chain, chain
from kvstore.machine.system import RealClock, real_system
from kvstore.spec import Group, ModelSpec

CACHES, MEMORY = Path("/sys/devices/system/cpu/cpu0/cache"), Path("/proc/meminfo")
FREE_SHARE = 20
SLICE = 32 << 20
SLICES_MAX = 255  # the raw socket names one by a byte

Clock = Callable[[], float]
Turn = Callable[[int], Awaitable[None]]
"""Moves one slice, given by its number."""


@dataclass(frozen=True, slots=True)
class Shape:
    """`together` blocks of `nbytes` in one call; a cycle of slices has `cold` bytes."""

    name: str
    nbytes: int
    together: int
    layers: int = 8
    cold: int = COLD_BYTES

    @property
    def count(self) -> int:
        return self.cold // self.nbytes

    @property
    def slices(self) -> int:
        return self.count // self.together

    def spec(self, use: str) -> ModelSpec:
        """A model whose block has `nbytes`: 64 tokens of bf16, 8 heads."""
        dim = self.nbytes // (64 * 2 * 8 * 2 * self.layers)
        group = Group(layers=self.layers, kv_heads=8, k_dim=dim, v_dim=dim)
        made = ModelSpec(model=f"bench/{self.name}/{use}", groups=(group,), block_tokens=64)
        assert made.group_bytes(group) == self.nbytes
        return made


def cold_bytes() -> int:
    """What a cycle should move so that every turn finds its bytes in DRAM: 8 times the last-level cache that the kernel
    tells of, at most a part of the memory that is free (seven such cycles are held), whole slices of all shapes."""
    cache = max((_kib(path.read_text()) for path in CACHES.glob("index*/size")), default=0)
    [free] = [line for line in MEMORY.read_text().splitlines() if line.startswith("MemAvailable")]
    wanted = min(8 * cache, (int(free.split()[1]) << 10) // FREE_SHARE)
    return max(COLD_BYTES, min(wanted, SLICES_MAX * SLICE) // SLICE * SLICE)


def _kib(size: str) -> int:
    """Bytes of a size as /sys writes it, "491520K"."""
    return int(size.strip().removesuffix("K")) << 10


LARGE = Shape("large", 2 << 20, 16)
SMALL = Shape("small", 256 << 10, 64, layers=1)
DEEP = Shape("deep", 2 << 20, 16, layers=32)


def prompts(spec: ModelSpec, shape: Shape, number: int = 0) -> list[Chain]:
    """A chain for every slice."""
    rng = np.random.Generator(np.random.PCG64(number))
    tokens = rng.integers(0, 1 << 31, (shape.slices, shape.together * spec.block_tokens), np.uint32)
    return [chain(spec, row) for row in tokens]


class Memory:
    """The caller's side: sources, targets and a second set of targets, all of them colder than any cache."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.sources = random_buffers(shape.count, 3, shape.nbytes)
        self.targets, self.copies = Buffers(shape.count, shape.nbytes), Buffers(shape.count, shape.nbytes)

    def slice_of(self, buffers: Buffers, number: int) -> list[memoryview]:
        first = number % self.shape.slices * self.shape.together
        return buffers.views[first : first + self.shape.together]

    def wrong(self, buffers: Buffers, number: int) -> int:
        """Blocks of a slice that are not their source; then they are nothing any more. Mutates."""
        views = self.slice_of(buffers, number)
        found = differing(self.slice_of(self.sources, number), views)
        for view in views:
            np.frombuffer(view, np.uint8)[::4096] ^= 0xFF
        return found

    def close(self) -> None:
        for buffers in (self.sources, self.targets, self.copies):
            buffers.close()


async def client(config: ClientConfig, *, elsewhere: bool = False) -> KVClient:
    """`elsewhere`: one that takes itself to be on another host."""
    system = real_system()
    return await KVClient.connect(config, replace(system, host="elsewhere") if elsewhere else system)


async def put_slice(into: KVClient, memory: Memory, prompt: Chain, number: int, *, again: bool = False) -> None:
    """`again`: blocks may be there already: on a busy machine an answer may come too late, and the block is put
    twice."""
    views = memory.slice_of(memory.sources, number)
    states = (await into.put(prompt.spec, prompt, views)).states
    if not set(states) <= ({"committed", "held"} if again else {"committed"}):
        raise incomplete(f"of {len(states)} blocks that were put some were {', '.join(sorted(set(states)))}", into)


async def plan_of(by: KVClient, prompt: Chain) -> HitPlan:
    """The whole prompt, as soon as the coordinator knows it."""
    for _ in range(100):
        plan = await by.match(prompt.spec, prompt)
        if plan.blocks == len(prompt):
            return plan
    raise incomplete(f"{plan.blocks} of {len(prompt)} blocks are known", by)


def incomplete(what: str, by: KVClient) -> Unavailable:
    """What a bench ends with that can't move its blocks; mostly others keep the machine busy."""
    errors = ", ".join(f"{name} {count}" for name, count in sorted(by.counters.items()) if name.startswith("errors_"))
    return Unavailable(f"{what} ({errors or 'no errors'}): measure again when the machine is less busy")


async def take_turns(
    turns: Mapping[str, Turn], between: Callable[[str, int], Awaitable[None]], slices: int, rounds: int
) -> dict[str, list[float]]:
    """Seconds of every contestant. In one round each moves one slice, and no two the same: what one has just moved is
    in the cache. The first cycle over all slices is not counted. `between(name, slice)` is outside the timing."""
    now: Clock = RealClock().monotonic
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    apart = max(1, slices // len(turns))
    for turn in range(-slices, rounds):
        for place, (name, move) in enumerate(turns.items()):
            number = (turn + place * apart) % slices
            begin = now()
            await move(number)
            took = now() - begin
            if turn >= 0:
                seconds[name].append(took)
            await between(name, number)
    return seconds


def rates(nbytes: int, seconds: Sequence[float]) -> list[float]:
    """GB/s."""
    return [nbytes / s / 1e9 for s in seconds]
