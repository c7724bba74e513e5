"""What each codec made of the chunks that were written to each tier since the start, and how long it took."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvstore.codecs import CODECS
from kvstore.types import Tier


@dataclass(slots=True)
class Use:
    """Of one codec in one tier. Times are of whole calls, shared out by raw bytes where codecs are mixed."""

    chunks: int = 0
    raw_bytes: int = 0
    stored_bytes: int = 0
    encode_s: float = 0.0  # of those encoded on their way to this tier
    decode_s: float = 0.0  # of those decoded here on their way up; readers decode for themselves


class CodecUse:
    """One per store. Synchronous."""

    def __init__(self) -> None:
        self._uses: dict[tuple[Tier, int], Use] = {}

    def written(self, tier: Tier, table: NDArray[np.void], encode_s: float = 0.0) -> None:
        """A record with this chunk table came to a tier. Mutates."""
        whole = int(table["raw"].sum(dtype=np.int64))
        for codec in sorted(set(table["codec"].tolist())):
            rows = table[table["codec"] == codec]
            use = self._of(tier, codec)
            raw = int(rows["raw"].sum(dtype=np.int64))
            use.chunks += int(np.count_nonzero(rows["plane"] == 0))
            use.raw_bytes += raw
            use.stored_bytes += int(rows["stored"].sum(dtype=np.int64))
            use.encode_s += encode_s * raw / whole

    def decoded(self, tier: Tier, table: NDArray[np.void], decode_s: float) -> None:
        """A record of a tier was decoded on its way up. Mutates."""
        whole = int(table["raw"].sum(dtype=np.int64))
        for codec in sorted(set(table["codec"].tolist())):
            raw = int(table["raw"][table["codec"] == codec].sum(dtype=np.int64))
            self._of(tier, codec).decode_s += decode_s * raw / whole

    def _of(self, tier: Tier, codec: int) -> Use:
        return self._uses.setdefault((tier, codec), Use())

    def of(self, tier: Tier) -> dict[str, Use]:
        """By the codec's name, in the order of first use. Pure."""
        return {CODECS[codec].name: use for (where, codec), use in self._uses.items() if where == tier}
