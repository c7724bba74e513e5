"""Copy and sum without the interpreter's lock: the bytes arrive, and the sum is xxhash's own."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

from kvstore.checksum import SHORT_BYTES, copy_and_checksum_all, prepare
from kvstore.errors import BadRequest
from kvstore.kernels import copysum
from kvstore.kernels.moves import move

EDGES = (241, 255, 256, 257, 1023, 1024, 1025, 1088, 1089, 2047, 2048, 2049, 262_143, 262_144, 262_145, 524_289)


def pair(size: int, seed: int, shift: int = 0) -> tuple[memoryview, memoryview]:
    """Random bytes and room for them, both `shift` bytes off any alignment."""
    source = memoryview(bytearray(np.random.default_rng(seed).bytes(size + shift)))[shift:]
    return source, memoryview(bytearray(size + shift))[shift:]


@pytest.mark.parametrize("size", EDGES)
@pytest.mark.parametrize("shift", [0, 3])
def test_the_sum_is_xxh3_at_every_edge(size: int, shift: int) -> None:
    source, target = pair(size, size, shift)
    assert copysum.copy_all([(source, target)]) == [xxh3_64_intdigest(source)]
    assert target == source


@given(st.lists(st.integers(SHORT_BYTES + 1, 9000), min_size=1, max_size=5), st.integers(0, 1 << 30))
def test_many_at_once(sizes: list[int], seed: int) -> None:
    jobs = [pair(size, seed + at) for at, size in enumerate(sizes)]
    assert copysum.copy_all(jobs) == [xxh3_64_intdigest(source) for source, _ in jobs]
    assert all(target == source for source, target in jobs)


def test_a_flipped_bit_shows() -> None:
    source, target = pair(5000, 1)
    (before,) = copysum.copy_all([(source, target)])
    for at in (0, 63, 64, 1023, 1024, 4095, 4999):
        source[at] ^= 1
        assert copysum.copy_all([(source, target)]) != [before]
        source[at] ^= 1
    assert copysum.copy_all([(source, target)]) == [before]


def test_short_ones_and_strangers_go_the_other_way() -> None:
    prepare()
    jobs = [pair(size, size) for size in (0, 1, SHORT_BYTES, SHORT_BYTES + 1, 4096)]
    assert copy_and_checksum_all(jobs) == [xxh3_64_intdigest(source) for source, _ in jobs]
    assert all(target == source for source, target in jobs)
    source, target = pair(4096, 1)
    untouched = bytes(target)
    for bad in ((source[:-1], target), (source[::2], target[::2]), (source, target.toreadonly())):
        with pytest.raises(BadRequest):
            copy_and_checksum_all([(source, target), bad])
        assert bytes(target) == untouched, "nothing is copied before all are looked at"


def test_a_source_that_changes_meanwhile_is_stored_as_it_was_summed() -> None:
    """A hostile writer's memory: each byte of it is read once, so no sum is of other bytes than those that arrived."""
    source, target = bytearray(1 << 20), memoryview(bytearray(1 << 20))
    at, stop, changed = np.frombuffer(source, np.uint64), threading.Event(), 0

    def scribble() -> None:
        while not stop.is_set():
            at[:] += 1

    writer = threading.Thread(target=scribble)
    writer.start()
    try:
        for _ in range(200):
            (found,) = copysum.copy_all([(memoryview(source), target)])
            assert found == xxh3_64_intdigest(target)
            changed += len(set(np.frombuffer(target, np.uint64)[:: 1 << 9].tolist())) > 1
    finally:
        stop.set()
        writer.join()
    assert changed, "the source never changed under a copy: this shows nothing"


@pytest.mark.parametrize("sizes", [[1], [63, 64, 65], [4 << 20], [(4 << 20) + 77], [300_001] * 15])
@pytest.mark.parametrize("shift", [0, 5, 64])
def test_moved_bytes_arrive_and_nothing_beside_them(sizes: list[int], shift: int) -> None:
    """Small steps through the caches, large ones past them, to addresses of any alignment."""
    total = sum(sizes) + 200 * len(sizes)
    source = np.random.default_rng(1).integers(0, 255, total, np.uint8)
    target, wanted = np.full(total, 255, np.uint8), np.full(total, 255, np.uint8)
    starts, at = [], shift
    for size in sizes:
        starts.append(at)
        wanted[at : at + size] = source[at : at + size]
        at += size + 100
    offsets = np.array(starts, np.uint64)
    lengths = np.array(sizes, np.uint64)
    move(offsets + np.uint64(target.ctypes.data), offsets + np.uint64(source.ctypes.data), lengths)
    assert np.array_equal(target, wanted)
