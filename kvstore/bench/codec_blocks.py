"""The codecs with an entropy stage, as the store runs them on whole blocks (`kvstore.codecs.batch`, what it verifies
included), in turns with copies of the same blocks and with other libraries chunk by chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from kvstore.bench.codec_baselines import Baseline, baselines, copy, missing_library
from kvstore.bench.codec_speed import CHUNK, DIM, HEADS, TOGETHER, TOKENS, Memory
from kvstore.bench.report import Report, in_turns
from kvstore.codecs import DENSE, NESTED, batch
from kvstore.layout import Chunk, K, V

BLOCK = TOGETHER * CHUNK
PIECES = [
    Chunk(index, V if index % 2 else K, 0, HEADS, index * CHUNK, CHUNK, (TOKENS, HEADS, DIM), 2, "bfloat16")
    for index in range(TOGETHER)
]


class OfStore:
    """One codec on blocks of a memory. What is encoded within the timing is let go at once."""

    def __init__(self, memory: Memory, codec: int) -> None:
        self.memory, self.codec = memory, codec
        self._stored: dict[int, tuple[bytes, list[batch.Coded]]] = {}

    def _encode(self, block: int) -> list[list[batch.Plane]]:
        raw = self.memory.raw[block * BLOCK : (block + 1) * BLOCK].data
        return batch.encode(raw, PIECES, [self.codec] * TOGETHER)

    def encode(self, blocks: range) -> None:
        for block in blocks:
            self._encode(block)

    def settle(self, blocks: range) -> None:
        """Make the records that are decoded next."""
        for block in blocks:
            data, coded = bytearray(), []
            for piece, planes in zip(PIECES, self._encode(block), strict=True):
                assert planes[0].codec == self.codec, "the bench's memory falls back to another codec"
                spans = []
                for plane in planes:
                    spans.append((len(data), len(plane.data)))
                    data += plane.data
                coded.append(batch.Coded(piece, self.codec, planes[0].params, tuple(spans)))
            self._stored[block] = bytes(data), coded

    def decode(self, blocks: range) -> None:
        for block in blocks:
            data, coded = self._stored[block]
            target = self.memory.back[block * BLOCK : (block + 1) * BLOCK].data
            batch.decode(memoryview(data), coded, target)


class ByChunk:
    """A library, chunk by chunk, likewise."""

    def __init__(self, memory: Memory, library: Baseline) -> None:
        self.memory, self.library = memory, library
        self.stored: dict[int, Any] = {}

    def encode(self, blocks: range) -> None:
        for index in range(blocks.start * TOGETHER, blocks.stop * TOGETHER):
            self.library.encode(self.memory.chunk(self.memory.raw, index))

    def settle(self, blocks: range) -> None:
        for index in range(blocks.start * TOGETHER, blocks.stop * TOGETHER):
            self.stored[index] = self.library.encode(self.memory.chunk(self.memory.raw, index))

    def decode(self, blocks: range) -> None:
        for index in range(blocks.start * TOGETHER, blocks.stop * TOGETHER):
            self.library.decode(self.stored[index], self.memory.chunk(self.memory.back, index))


class Blocks:
    """Rounds over a memory, `blocks` of it at a time: every contestant has the same in a round."""

    def __init__(self, report: Report, clock: Callable[[], float], memory: Memory, rounds: int, blocks: int) -> None:
        self.report, self.clock, self.memory, self.rounds, self.blocks = report, clock, memory, rounds, blocks
        self.turn = 0

    def mine(self) -> range:
        whole = len(self.memory.raw) // BLOCK
        first = self.turn * self.blocks % whole
        return range(first, min(first + self.blocks, whole))

    def copy(self) -> None:
        chunks = range(self.mine().start * TOGETHER, self.mine().stop * TOGETHER)
        m = self.memory
        copy([m.chunk(m.raw, i) for i in chunks], [m.chunk(m.back, i) for i in chunks])

    def run(self) -> None:
        ours = {"nested": OfStore(self.memory, NESTED), "dense": OfStore(self.memory, DENSE)}
        others = self._libraries()
        exact = {*ours, *(name for name, found in others.items() if found.library.exact)}
        contestants: dict[str, Callable[[], object]] = {"blocks/copy": self.copy}
        everyone: dict[str, OfStore | ByChunk] = {**ours, **others}
        for name, one in everyone.items():
            contestants[f"{name}/encode"] = partial(self._turn, one.encode)
            contestants[f"{name}/decode"] = partial(self._turn, one.decode)

        def between(done: str) -> None:
            name, what = done.split("/")
            if what == "encode":
                everyone[name].settle(self.mine())
            if what == "decode":
                if name in exact:
                    span = slice(self.mine().start * BLOCK, self.mine().stop * BLOCK)
                    assert np.array_equal(self.memory.back[span], self.memory.raw[span]), f"{name} changed a bit"
                self.memory.back[self.mine().start * BLOCK : self.mine().stop * BLOCK] = 0
            self.turn += done == list(contestants)[-1]

        seconds = in_turns(self.clock, contestants, rounds=self.rounds, between=between)
        for label, took in seconds.items():
            self.report.result(label, [self.blocks * BLOCK / s / 1e9 for s in took], "GB/s of raw bytes")
        for what, bar, times in (("encode", 0.04, 1.2), ("decode", 0.08, 2.0)):
            self.report.ratio(f"nested/{what}_to_copy", f"nested/{what}", "blocks/copy", at_least=bar)
            self.report.ratio(f"dense/{what}_to_zstd1", f"dense/{what}", f"zstd1/{what}", at_least=times)
        for name, found in others.items():
            size = sum(len(stored) for stored in found.stored.values())
            self.report.result(f"{name}/ratio_synthetic", [len(found.stored) * CHUNK / size], "x")

    def _turn(self, work: Callable[[range], None]) -> None:
        work(self.mine())

    def _libraries(self) -> dict[str, ByChunk]:
        made: dict[str, ByChunk] = {}
        for name, found in baselines().items():
            if found is None:
                for what in ("encode", "decode"):
                    self.report.missing(f"{name}/{what}", "GB/s of raw bytes", missing_library(name))
            else:
                made[name] = ByChunk(self.memory, found)
        return made
