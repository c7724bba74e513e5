"""What the codecs are compared with, on the same chunks: copies, general compressors, and a cast."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import lz4.block
import numpy as np
import torch
import zstandard
from numpy.typing import NDArray

Chunks = Sequence[NDArray[np.uint8]]


@dataclass(frozen=True, slots=True)
class Baseline:
    """`encode(chunk)` gives anything with a length in bytes; `decode(that, target)` fills the chunk's place."""

    encode: Callable[[NDArray[np.uint8]], Any]
    decode: Callable[[Any, NDArray[np.uint8]], None]
    exact: bool = True


def copy(sources: Chunks, targets: Chunks) -> None:
    """Chunk by chunk, one thread."""
    for source, target in zip(sources, targets, strict=True):
        np.copyto(target, source)


def baselines() -> dict[str, Baseline | None]:
    """By name; None where the package is not installed."""
    pack, unpack = zstandard.ZstdCompressor(level=1), zstandard.ZstdDecompressor()

    def from_lz4(stored: Any, target: NDArray[np.uint8]) -> None:
        target[:] = np.frombuffer(lz4.block.decompress(stored, uncompressed_size=len(target)), np.uint8)

    def from_zstd(stored: Any, target: NDArray[np.uint8]) -> None:
        target[:] = np.frombuffer(unpack.decompress(stored), np.uint8)

    def to_fp8(chunk: NDArray[np.uint8]) -> Any:
        return torch.from_numpy(chunk).view(torch.bfloat16).to(torch.float8_e4m3fn).view(torch.uint8).numpy()

    def from_fp8(stored: Any, target: NDArray[np.uint8]) -> None:
        cast = torch.from_numpy(stored).view(torch.float8_e4m3fn)
        torch.from_numpy(target).view(torch.bfloat16).copy_(cast)

    return {
        "zstd1": Baseline(lambda chunk: pack.compress(chunk.data), from_zstd),
        "lz4": Baseline(lambda chunk: lz4.block.compress(chunk.data, store_size=False), from_lz4),
        "zipnn": _zipnn(),
        "fp8": Baseline(to_fp8, from_fp8, exact=False),
    }


def missing_library(name: str) -> str:
    """Why there is no figure of it."""
    return f"{name} is not installed: pip install {name} (a source distribution, which needs a C compiler)"


def _zipnn() -> Baseline | None:
    if find_spec("zipnn") is None:
        return None
    from zipnn import ZipNN

    codec = ZipNN(input_format="byte", bytearray_dtype="bfloat16", threads=1)

    def decode(stored: Any, target: NDArray[np.uint8]) -> None:
        target[:] = np.frombuffer(codec.decompress(stored), np.uint8)

    return Baseline(lambda chunk: bytes(codec.compress(chunk.tobytes())), decode)
