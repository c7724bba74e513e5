"""Codecs of chunks, by the id stored in the chunk table. docs/FORMAT.md, "Codecs"; when to use which: docs/CODECS.md.

`registry` names them, `general` has those of plain bytes, `dense` the entropy stage of the dense one; `batch` encodes,
and decodes, the chunks of a block together.
"""

from __future__ import annotations

from kvstore.codecs.general import PLANE_RAW, PLANE_ZSTD, decode, encode
from kvstore.codecs.registry import (
    CODECS,
    DENSE,
    FAST,
    INT4,
    INT8,
    KNOWN,
    LOSSLESS_NAMES,
    LZ4,
    NAMES,
    NESTED,
    PLANES_MAX,
    RAW,
    SPLIT,
    ZSTD,
    Codec,
    codec_for,
    fidelity_of,
)

__all__ = [
    "CODECS",
    "DENSE",
    "FAST",
    "INT4",
    "INT8",
    "KNOWN",
    "LOSSLESS_NAMES",
    "LZ4",
    "NAMES",
    "NESTED",
    "PLANES_MAX",
    "PLANE_RAW",
    "PLANE_ZSTD",
    "RAW",
    "SPLIT",
    "ZSTD",
    "Codec",
    "codec_for",
    "decode",
    "encode",
    "fidelity_of",
]
