"""Codecs over 256 MiB of KV in memory, in turns with copies of the same chunks: the kernels that the store calls.

Chunks are 64 tokens of 8 heads of 128 (128 KiB), 16 to a kernel call, as in blocks of 2 MiB. Stored bytes go to memory
as cold as the source's.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvstore.bench.codec_baselines import baselines, copy
from kvstore.bench.codec_kv import llama_like
from kvstore.bench.report import Report, in_turns
from kvstore.codecs import batch, general
from kvstore.codecs.registry import FORM_IDS

TOKENS, HEADS, DIM = 64, 8, 128
CHUNK = TOKENS * HEADS * DIM * 2
TOGETHER = 16
BF16 = FORM_IDS["bfloat16"]
WHOLE_BYTES = 256 << 20
Bytes = NDArray[np.uint8]
Jobs = NDArray[np.int64]


class Memory:
    """The chunks, half K and half V, where they are encoded to, and where they are decoded to: all faulted in."""

    def __init__(self, nbytes: int = WHOLE_BYTES) -> None:
        self.count = nbytes // CHUNK
        self.raw, self.back = np.empty(nbytes, np.uint8), np.zeros(nbytes, np.uint8)
        self.out, self.rest = np.zeros(nbytes + CHUNK, np.uint8), np.zeros(nbytes, np.uint8)
        tiles = [self._tile(seed) for seed in range(8)]
        for index in range(self.count):
            self.raw[index * CHUNK : (index + 1) * CHUNK] = tiles[index % 8]
        self.source, self.stored = self.raw.view(), self.out.view()  # what kernels read is read-only
        self.source.flags.writeable = self.stored.flags.writeable = False
        self.by_row = (np.arange(self.count) % 2).astype(np.uint8)

    @staticmethod
    def _tile(seed: int) -> Bytes:
        values = llama_like(TOKENS, HEADS, DIM, seed, value=bool(seed % 2)).numpy()
        bits: Bytes = (values.view(np.uint32) >> 16).astype(np.uint16).reshape(-1).view(np.uint8)
        return bits

    def chunk(self, of: Bytes, index: int) -> Bytes:
        return of[index * CHUNK : (index + 1) * CHUNK]


class Kernel:
    """One codec over ranges of chunks, `TOGETHER` to a call."""

    def __init__(self, memory: Memory, name: str) -> None:
        self.memory, self.name, self.use = memory, name, batch.backend()
        rows = [(i * CHUNK, CHUNK, TOKENS, HEADS * DIM, i * CHUNK, CHUNK - 1) for i in range(memory.count)]
        self.jobs = np.array(rows, np.int64)
        self.sizes = np.zeros(memory.count, np.int64)
        if name.startswith("nested"):
            first = [batch.quant_bytes(4, TOKENS, HEADS * DIM, bool(v)) for v in memory.by_row.tolist()]
            low = batch.low_bytes(TOKENS, HEADS * DIM)
            self.jobs = np.array(
                [(*row[:4], row[4], n, row[4] + n, low, row[0]) for row, n in zip(rows, first, strict=True)], np.int64
            )
            self.sizes[:] = self.jobs[:, 5] + low
        self.planes: dict[int, bytes] = {}

    def encode(self, chunks: range) -> None:
        m = self.memory
        for first in range(chunks.start, chunks.stop, TOGETHER):
            mine = slice(first, min(first + TOGETHER, chunks.stop))
            jobs, by_row = self.jobs[mine], m.by_row[mine]
            if self.name == "fast":
                self.sizes[mine] = self.use.fast_encode(BF16, m.source, m.out, jobs)
            elif self.name in ("int8", "int4"):
                self.sizes[mine] = self.use.quant_encode(int(self.name[3:]), m.source, m.out, jobs, by_row)
            else:
                rest = m.rest if self.name == "nested" else m.rest[:0]
                self.use.nested_encode(m.source, m.out, rest, jobs, by_row)
                if self.name == "nested":
                    for index in range(mine.start, mine.stop):
                        self.planes[index] = general.encode_split(m.chunk(m.rest, index).data, 2)

    def decode(self, chunks: range) -> None:
        m = self.memory
        for first in range(chunks.start, chunks.stop, TOGETHER):
            mine = slice(first, min(first + TOGETHER, chunks.stop))
            jobs, by_row = self.jobs[mine].copy(), m.by_row[mine]
            jobs[:, 0], jobs[:, 4] = self.jobs[mine][:, 4], self.jobs[mine][:, 0]
            if self.name == "fast":
                jobs[:, 1], jobs[:, 5] = self.sizes[mine], CHUNK
                self.use.fast_decode(BF16, m.stored, m.back, jobs)
            elif self.name in ("int8", "int4"):
                jobs[:, 1], jobs[:, 5] = self.sizes[mine], CHUNK
                self.use.quant_decode(int(self.name[3:]), m.stored, m.back, jobs, by_row, 1.0, 0.0)
            else:
                jobs[:, 1], jobs[:, 5] = self.jobs[mine][:, 5], CHUNK
                rest = m.rest if self.name == "nested" else m.rest[:0]
                if self.name == "nested":
                    for index in range(mine.start, mine.stop):
                        place = m.chunk(m.rest, index).data
                        general.decode_split(memoryview(self.planes[index]), place, 2)
                self.use.nested_decode(m.stored, m.back, rest, jobs, by_row)


class Speed:
    """Rounds over the memory, a part of it at a time: every contestant has the same chunks in a round."""

    def __init__(self, report: Report, clock: Callable[[], float], rounds: int, parts: int) -> None:
        self.report, self.clock, self.rounds, self.parts = report, clock, rounds, parts
        self.memory = Memory()
        self.turn = 0

    def chunks(self) -> range:
        size = self.memory.count // self.parts
        first = self.turn % self.parts * size
        return range(first, first + size)

    def copy(self) -> None:
        m = self.memory
        mine = self.chunks()
        copy([m.chunk(m.raw, i) for i in mine], [m.chunk(m.back, i) for i in mine])

    def run(self) -> None:
        for name, (encode, decode) in {
            "fast": (0.45, 0.65), "int8": (0.5, 0.75), "int4": (0.45, 0.65), "nested01": (0.25, 0.5),
            "nested": (0.04, 0.08),
        }.items():  # fmt: skip
            self._kernel(name, encode, decode)
        self._dense()
        self._threads()

    def _timed(self, contestants: dict[str, Callable[[], object]], last: str) -> dict[str, list[float]]:
        def between(name: str) -> None:
            self.turn += int(name == last)

        return in_turns(self.clock, contestants, rounds=self.rounds, between=between)

    def _rates(self, label: str, seconds: list[float]) -> None:
        nbytes = len(self.chunks()) * CHUNK
        self.report.result(label, [nbytes / s / 1e9 for s in seconds], "GB/s of raw bytes")

    def _kernel(self, name: str, encode: float, decode: float) -> None:
        m, kernel = self.memory, Kernel(self.memory, name)
        kernel.encode(range(m.count))  # every part is there before it is decoded
        seconds = self._timed(
            {
                "copy": self.copy,
                "encode": lambda: kernel.encode(self.chunks()),
                "decode": lambda: kernel.decode(self.chunks()),
            },
            "decode",
        )
        for what in ("copy", "encode", "decode"):
            self._rates(f"{name}/{what}", seconds[what])
        kernel.decode(range(m.count))
        if name in ("fast", "nested"):
            assert np.array_equal(m.back, m.raw), f"{name} changed a bit"
        self.report.ratio(f"{name}/encode_to_copy", f"{name}/encode", f"{name}/copy", at_least=encode)
        self.report.ratio(f"{name}/decode_to_copy", f"{name}/decode", f"{name}/copy", at_least=decode)

    def _dense(self) -> None:
        """Chunk by chunk through the libraries: dense beside zstd on the raw bytes, and the others for the table."""
        m = self.memory
        kept: dict[str, dict[int, Any]] = {}
        encoders: dict[str, Callable[[Bytes], Any]] = {
            "dense": lambda chunk: general.encode_split(chunk.data, 2, verify=False),
            "dense_verified": lambda chunk: general.encode_split(chunk.data, 2),
        }
        decoders: dict[str, Callable[[Any, Bytes], None]] = {
            name: lambda stored, target: general.decode_split(memoryview(stored), target.data, 2)
            for name in ("dense", "dense_verified")
        }
        exact = {"dense", "dense_verified"}
        for name, found in baselines().items():
            if found is None:
                self.report.missing(
                    f"{name}/encode", "GB/s of raw bytes", f"{name} is not installed: pip install {name}"
                )
                continue
            encoders[name], decoders[name] = found.encode, found.decode
            exact |= {name} if found.exact else set()

        def encode(name: str) -> None:
            for index in self.some():
                kept.setdefault(name, {})[index] = encoders[name](m.chunk(m.raw, index))

        def decode(name: str) -> None:
            for index in self.some():
                decoders[name](kept[name][index], m.chunk(m.back, index))

        contestants: dict[str, Callable[[], object]] = {}
        for name in encoders:
            contestants[f"{name}/encode"] = partial(encode, name)
            contestants[f"{name}/decode"] = partial(decode, name)

        def between(done: str) -> None:
            name, what = done.split("/")
            if what == "decode" and name in exact:
                assert all(bool(np.array_equal(m.chunk(m.back, i), m.chunk(m.raw, i))) for i in self.some()), name
            self.turn += done == list(contestants)[-1]

        seconds = in_turns(self.clock, contestants, rounds=self.rounds, between=between)
        nbytes = len(self.some()) * CHUNK
        for label, mine in seconds.items():
            self.report.result(label, [nbytes / s / 1e9 for s in mine], "GB/s of raw bytes")
        self.report.ratio("dense/encode_to_zstd1", "dense/encode", "zstd1/encode", at_least=1.2)
        self.report.ratio("dense/decode_to_zstd1", "dense/decode", "zstd1/decode", at_least=2.0)
        for name in encoders:
            if not name.startswith("dense"):
                size = sum(len(stored) for stored in kept[name].values())
                self.report.result(f"{name}/ratio_synthetic", [len(kept[name]) * CHUNK / size], "x")

    def some(self) -> range:
        """Slow contestants get a quarter of what the kernels get: it moves on through the memory all the same."""
        mine = self.chunks()
        quarter = max(1, len(mine) // 4)
        first = mine.start + self.turn // self.parts % 4 * quarter
        return range(first, first + quarter)

    def _threads(self) -> None:
        """Two threads on chunks that stay in their caches, each with its own."""
        memory = Memory(4 * CHUNK)
        kernel = Kernel(memory, "fast")
        kernel.encode(range(4))

        def work(first: int) -> None:
            for _ in range(200):
                kernel.decode(range(first, first + 2))

        with ThreadPoolExecutor(2) as pool:
            seconds = in_turns(
                self.clock,
                {"one": lambda: work(0), "two": lambda: list(pool.map(work, (0, 2)))},
                rounds=self.rounds,
            )
        rate = 200 * 2 * CHUNK / 1e9
        self.report.result("threads/one", [rate / s for s in seconds["one"]], "GB/s of raw bytes")
        self.report.result("threads/two", [2 * rate / s for s in seconds["two"]], "GB/s of raw bytes")
        self.report.ratio("threads/two_to_one", "threads/two", "threads/one", at_least=1.5)
