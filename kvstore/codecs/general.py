"""Codecs of bytes: lz4, zstd, and the split codec, which compresses the byte planes of elements. docs/FORMAT.md.

`encode` and `decode` hold no shared state (compressors are per thread) and release the GIL where the libraries do.
"""

from __future__ import annotations

import struct
import sys
import threading
from types import ModuleType

import lz4.block
import numpy as np
import zstandard
from numpy.typing import NDArray

from kvstore.codecs.registry import LZ4, RAW, SPLIT, SPLIT_ITEMSIZES, ZSTD
from kvstore.errors import BadRequest, Corrupt, UnknownFormat
from kvstore.types import Buffer

PLANE_RAW, PLANE_ZSTD = 0, 1
_PLANE = struct.Struct("<BI")

SAMPLES = 4
SAMPLE_BYTES = 512
LEAST_GAIN = 0.03
"""A plane is compressed only where a sample shrinks by more than this: zstd on noise costs more than it saves."""

OFTEN = 3 / 16
"""A byte value that is so frequent is worth a tenth by itself: the sample need not be compressed to know."""

GENERAL = (RAW, LZ4, SPLIT, ZSTD)
"""The codecs of this module."""

_local = threading.local()


def encode(codec: int, raw: memoryview, itemsize: int) -> tuple[int, Buffer]:
    """(codec used, stored bytes) of contiguous raw bytes. Where nothing is gained: (RAW, raw itself). Pure."""
    if codec not in GENERAL:
        raise BadRequest(f"codec {codec} is unknown here: give one of {', '.join(map(str, GENERAL))}")
    stored: Buffer = raw
    if codec == LZ4:
        stored = lz4.block.compress(raw, store_size=False)
    elif codec == ZSTD:
        stored = _compressor().compress(raw)
    elif codec == SPLIT and itemsize in SPLIT_ITEMSIZES and len(raw) >= itemsize:
        stored = encode_split(raw, itemsize)
    return (codec, stored) if len(stored) < len(raw) else (RAW, raw)


def decode(codec: int, stored: Buffer, target: memoryview, itemsize: int) -> None:
    """Fill `target`, whose length is the raw length. Corrupt for anything else, UnknownFormat for an unknown codec."""
    if codec == RAW:
        if len(stored) != len(target):
            raise Corrupt(f"a raw chunk has {len(stored)} bytes, not {len(target)}")
        target[:] = stored
    elif codec == LZ4:
        target[:] = _exactly(_decode_lz4(stored, len(target)), len(target), "lz4 chunk")
    elif codec == ZSTD:
        target[:] = unpacked(memoryview(stored), len(target), "chunk")
    elif codec == SPLIT:
        decode_split(memoryview(stored), target, itemsize)
    else:
        raise UnknownFormat(f"chunk codec {codec} is unknown to this build")


def _exactly(data: bytes, length: int, what: str) -> bytes:
    if len(data) != length:
        raise Corrupt(f"{what} decodes to {len(data)} bytes, not {length}")
    return data


def _decode_lz4(stored: Buffer, length: int) -> bytes:
    try:
        return bytes(lz4.block.decompress(stored, uncompressed_size=length))
    except (lz4.block.LZ4BlockError, ValueError) as error:
        raise Corrupt(f"lz4 chunk does not decode: {error}") from None


def _compressor() -> zstandard.ZstdCompressor:
    """Of this thread: zstd contexts are not thread-safe. A small hash table and long matches suit byte planes."""
    made: zstandard.ZstdCompressor | None = getattr(_local, "compressor", None)
    if made is None:
        parameters = zstandard.ZstdCompressionParameters.from_level(
            1, hash_log=6, min_match=7, window_log=17, write_content_size=1, write_checksum=0, write_dict_id=0
        )
        made = _local.compressor = zstandard.ZstdCompressor(compression_params=parameters)
    return made


def _decompressor() -> zstandard.ZstdDecompressor:
    made: zstandard.ZstdDecompressor | None = getattr(_local, "decompressor", None)
    if made is None:
        made = _local.decompressor = zstandard.ZstdDecompressor()
    return made


def _gains(plane: NDArray[np.uint8]) -> bool:
    """Whether a sample of a plane shrinks enough. Deterministic: evenly spaced pieces."""
    if plane.size <= SAMPLES * SAMPLE_BYTES:
        return True
    step, loops = (plane.size - SAMPLE_BYTES) // (SAMPLES - 1), _loops()
    if loops is not None:
        most = loops.commonest(_read_only(plane), step, SAMPLES, SAMPLE_BYTES)
    else:
        most = np.bincount(_sample(plane, step)).max()
    if most >= OFTEN * SAMPLES * SAMPLE_BYTES:
        return True
    sample = _sample(plane, step).tobytes()
    return len(_compressor().compress(sample)) < len(sample) * (1 - LEAST_GAIN)


def _sample(plane: NDArray[np.uint8], step: int) -> NDArray[np.uint8]:
    return np.concatenate([plane[i * step : i * step + SAMPLE_BYTES] for i in range(SAMPLES)])


def _loops() -> ModuleType | None:
    """Compiled loops over pairs, where numba is there already: for numpy's it is not worth importing."""
    if "numba" not in sys.modules:
        return None
    from kvstore.kernels import planes

    return planes


def _split(raw: memoryview, itemsize: int) -> list[NDArray[np.uint8]]:
    """Plane i holds byte i of every element, least significant first. Pairs go by shifts, three times as fast."""
    if itemsize == 2:
        pairs, loops = np.frombuffer(raw, "<u2", len(raw) // 2), _loops()
        if loops is not None:
            pairs.flags.writeable = False
            planes = [np.empty(pairs.size, np.uint8), np.empty(pairs.size, np.uint8)]
            loops.split(pairs, *planes)
            return planes
        return [pairs.astype(np.uint8), (pairs >> 8).astype(np.uint8)]
    elements = np.frombuffer(raw, np.uint8, len(raw) // itemsize * itemsize).reshape(-1, itemsize)
    return [np.ascontiguousarray(elements[:, index]) for index in range(itemsize)]


def _join(planes: list[NDArray[np.uint8]], target: memoryview) -> None:
    """Inverse of `_split`; leaves the bytes after the last whole element alone."""
    itemsize = len(planes)
    if itemsize == 2:
        pairs, loops = np.frombuffer(target, "<u2", len(target) // 2), _loops()
        if loops is not None:
            loops.join(*map(_read_only, planes), pairs)
            return
        np.bitwise_or(planes[0], planes[1].astype("<u2") << 8, out=pairs)
        return
    elements = np.frombuffer(target, np.uint8, len(target) // itemsize * itemsize).reshape(-1, itemsize)
    for index, plane in enumerate(planes):
        elements[:, index] = plane


def _read_only(plane: NDArray[np.uint8]) -> NDArray[np.uint8]:
    view = plane.view()
    view.flags.writeable = False  # kernels are compiled once, for that
    return view


def encode_split(raw: memoryview, itemsize: int, *, check: bool = True) -> bytes:
    """The split codec's bytes, however many they are. `check`: every compressed plane is read back and compared."""
    head: list[bytes] = []
    planes: list[Buffer] = []
    stored: Buffer
    for plane in _split(raw, itemsize):
        frame = packed(plane, check=check) if _gains(plane) else None
        method, stored = (PLANE_RAW, plane.data) if frame is None else (PLANE_ZSTD, frame)
        head.append(_PLANE.pack(method, len(stored)))
        planes.append(stored)
    return b"".join((*head, *planes, raw[len(raw) // itemsize * itemsize :]))


def packed(plane: NDArray[np.uint8], *, check: bool = True) -> bytes | None:
    """A frame of a contiguous plane; None where it is not smaller or, read back (`check`), not the same."""
    frame: bytes = _compressor().compress(plane.data)
    if len(frame) >= plane.size:
        return None
    if check and unpacked(memoryview(frame), plane.size, "plane") != plane.tobytes():
        return None
    return frame


def decode_split(stored: memoryview, target: memoryview, itemsize: int) -> None:
    """Inverse of `encode_split`; mutates `target`. Corrupt or UnknownFormat for anything else."""
    if itemsize not in SPLIT_ITEMSIZES:
        raise UnknownFormat(f"split chunk of {itemsize}-byte elements is unknown to this build")
    count, rest = divmod(len(target), itemsize)
    start = itemsize * _PLANE.size
    if len(stored) < start:
        raise Corrupt("split chunk is shorter than its head")
    planes: list[NDArray[np.uint8]] = []
    for index in range(itemsize):
        method, length = _PLANE.unpack_from(stored, index * _PLANE.size)
        plane = stored[start : start + length]
        if len(plane) != length:
            raise Corrupt("split chunk is shorter than its planes")
        start += length
        planes.append(np.frombuffer(_plane(method, plane, count), np.uint8, count))
    if len(stored) - start != rest:
        raise Corrupt(f"split chunk has {len(stored) - start} bytes after its planes, not {rest}")
    _join(planes, target)
    target[len(target) - rest :] = stored[start:]


def _plane(method: int, plane: memoryview, count: int) -> Buffer:
    """`count` bytes of one plane. The frame's own length is checked first: it is what zstd would allocate."""
    if method == PLANE_RAW:
        if len(plane) != count:
            raise Corrupt(f"a raw plane has {len(plane)} bytes, not {count}")
        return plane
    if method != PLANE_ZSTD:
        raise UnknownFormat(f"plane method {method} is unknown to this build")
    return unpacked(plane, count, "plane")


def unpacked(frame: memoryview, count: int, what: str) -> bytes:
    """What a frame holds: so many bytes, or Corrupt."""
    try:
        if zstandard.get_frame_parameters(frame).content_size != count:
            raise Corrupt(f"a frame has another length than its {what}")
        data = _decompressor().decompress(frame, max_output_size=count, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise Corrupt(f"a {what} does not decode: {error}") from None
    return _exactly(data, count, what)
