"""Codecs over 256 MiB of KV in memory, in turns with copies of the same chunks: the kernels that the store calls.

Chunks are 64 tokens of 8 heads of 128 (128 KiB), 16 to a kernel call, as in blocks of 2 MiB. Stored bytes go to memory
as cold as the source's. `codec_blocks` has what needs an entropy coder, `codec_threads` two threads.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from kvstore.bench.codec_baselines import copy
from kvstore.bench.codec_kv import llama_like
from kvstore.bench.report import Report, in_turns
from kvstore.codecs import batch
from kvstore.codecs.registry import FORM_IDS

TOKENS, HEADS, DIM = 64, 8, 128
CHUNK = TOKENS * HEADS * DIM * 2
TOGETHER = 16
BF16 = FORM_IDS["bfloat16"]
WHOLE_BYTES = 256 << 20
NO_REST = np.empty(0, np.uint8)
Bytes = NDArray[np.uint8]
Jobs = NDArray[np.int64]


class Memory:
    """The chunks, half K and half V, where they are encoded to, and where they are decoded to: all faulted in."""

    def __init__(self, nbytes: int = WHOLE_BYTES) -> None:
        self.count = nbytes // CHUNK
        self.raw, self.back, self.out = (np.empty(nbytes, np.uint8) for _ in range(3))
        self.back.fill(0)  # a page of np.zeros is nobody's until it is written
        self.out.fill(0)
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
        if name == "nested01":
            first = [batch.quant_bytes(4, TOKENS, HEADS * DIM, bool(v)) for v in memory.by_row.tolist()]
            low = batch.low_bytes(TOKENS, HEADS * DIM)
            self.jobs = np.array(
                [(*row[:4], row[4], n, row[4] + n, low, row[0]) for row, n in zip(rows, first, strict=True)], np.int64
            )
            self.sizes[:] = self.jobs[:, 5] + low

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
                self.use.nested_encode(m.source, m.out, NO_REST, jobs, by_row)

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
                self.use.nested_decode(m.stored, m.back, NO_REST, jobs, by_row)


class Speed:
    """Rounds over the memory, a part of it at a time: every contestant has the same chunks in a round."""

    def __init__(self, report: Report, clock: Callable[[], float], memory: Memory, rounds: int, parts: int) -> None:
        self.report, self.clock, self.rounds, self.parts = report, clock, rounds, parts
        self.memory = memory
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
        }.items():  # fmt: skip
            self._kernel(name, encode, decode)

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
        if name == "fast":
            assert np.array_equal(m.back, m.raw), f"{name} changed a bit"
        self.report.ratio(f"{name}/encode_to_copy", f"{name}/encode", f"{name}/copy", at_least=encode)
        self.report.ratio(f"{name}/decode_to_copy", f"{name}/decode", f"{name}/copy", at_least=decode)
