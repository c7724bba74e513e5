"""The codecs there are: ids that never change meaning, what they lose, and what a configured name stands for."""

from __future__ import annotations

from dataclasses import dataclass

from kvstore.errors import BadRequest
from kvstore.spec import DTYPES
from kvstore.types import Fidelity

RAW, LZ4, SPLIT, FAST, INT8, INT4, NESTED, ZSTD, DENSE = range(9)

EXACT, NEAR, COMPACT = Fidelity.EXACT, Fidelity.NEAR, Fidelity.COMPACT


@dataclass(frozen=True, slots=True)
class Codec:
    """`fidelity[n - 1]`: of a chunk of which planes 0..n-1 are there."""

    id: int
    name: str
    fidelity: tuple[Fidelity, ...] = (EXACT,)

    @property
    def planes(self) -> int:
        return len(self.fidelity)


CODECS = (
    Codec(RAW, "raw"),
    Codec(LZ4, "lz4"),
    Codec(SPLIT, "split"),
    Codec(FAST, "fast"),
    Codec(INT8, "int8", (NEAR,)),
    Codec(INT4, "int4", (COMPACT,)),
    Codec(NESTED, "nested", (COMPACT, NEAR, EXACT)),
    Codec(ZSTD, "zstd"),
    Codec(DENSE, "dense"),
)
"""By id."""

KNOWN = tuple(codec.id for codec in CODECS)
PLANES_MAX = max(codec.planes for codec in CODECS)

SPLIT_ITEMSIZES = (1, 2, 4)

FORMS: dict[str, tuple[int, int, int, int]] = {
    "bfloat16": (2, 8, 7, 4),
    "float16": (2, 5, 10, 3),
    "float32": (4, 8, 23, 4),
    "float8_e4m3fn": (1, 4, 3, 3),
    "float8_e5m2": (1, 5, 2, 3),
}
"""Element types of the fast codec: bytes, exponent bits, mantissa bits, code bits."""

FORM_IDS = {name: index for index, name in enumerate(FORMS, 1)}
BY_FORM_ID = {index: FORMS[name] for name, index in FORM_IDS.items()}
QUANTISED = "bfloat16"
"""The element type that int8, int4, nested and dense know; others stay lossless, by the split codec for dense."""

NAMES = ("lossless", "dense", "nested", "near", "compact", "lz4", "zstd", "raw")
"""What a configuration may ask for."""

LOSSLESS_NAMES = ("lossless", "dense", "lz4", "zstd", "raw")

_BEST: dict[str, int] = {"near": INT8, "compact": INT4, "nested": NESTED, "dense": DENSE}
_PLAIN: dict[str, int] = {"raw": RAW, "lz4": LZ4, "zstd": ZSTD}


def codec_for(name: str, dtype: str) -> int:
    """Codec id of a configured name (one of `NAMES`) for elements of `dtype` ("" where unknown). BadRequest.

    `lossless` is the fast codec where it knows the element type and gains most; the split one for other elements of 1,
    2 or 4 bytes; lz4 for the rest. What a lossy codec does not know stays lossless.
    """
    if name not in NAMES:
        raise BadRequest(f"codec is {name!r}: give one of {', '.join(NAMES)}")
    if name in _PLAIN:
        return _PLAIN[name]
    if name in _BEST and dtype == QUANTISED:
        return _BEST[name]
    if name != "dense" and dtype in FORMS and dtype != "float8_e4m3fn":  # of which the split codec makes much more
        return FAST
    return SPLIT if DTYPES.get(dtype) in SPLIT_ITEMSIZES else LZ4


def fallbacks(codec: int, dtype: str) -> tuple[int, ...]:
    """What is tried, in this order, where a codec does not take a chunk or does not gain; raw after all of them."""
    if codec in (RAW, LZ4, ZSTD, SPLIT):
        return ()
    plain = (SPLIT,) if DTYPES.get(dtype) in SPLIT_ITEMSIZES else (LZ4,)
    return plain if codec == FAST else (*((FAST,) if dtype in FORMS else ()), *plain)


def fidelity_of(codec: int, planes: int) -> Fidelity:
    """Of a chunk stored with `planes` leading planes. BadRequest for an unknown codec or number."""
    if codec not in KNOWN or not 1 <= planes <= CODECS[codec].planes:
        raise BadRequest(f"codec {codec} with {planes} planes does not exist")
    return CODECS[codec].fidelity[planes - 1]
