"""What a directory remembers of one copy of a block, in 32 bits. Internal to it.

From the top: tier (2 bits), 3 - fidelity (2), owner (16), stored bytes (12: 7 significant bits, 5 of shift). So copies
in rising order are the fastest tier first, the best fidelity first, one owner's together. The bytes only predict a
load. An owner is one life of a holder, numbered by the directory from 1.
"""

from __future__ import annotations

from kvstore.types import Fidelity, Tier

OWNER_BITS = 16
OWNERS_MAX = (1 << OWNER_BITS) - 1
BYTES_BITS = 7  # significant ones
BYTES_MAX = 127 << 31

KIND_SHIFT = 12
"""A copy shifted by it is its kind, which is equal for blocks that one run of an answer may hold."""

_FIDELITY_AT, _TIER_AT = 28, 30
_TIERS = tuple(Tier(number + 1) for number in range(4))
_FIDELITIES = tuple(Fidelity(3 - number) for number in range(3))


def pack(owner: int, tier: Tier, fidelity: Fidelity, stored_bytes: int) -> int:
    """The bytes are rounded up, by less than one part in 64, and are at most `BYTES_MAX`."""
    shift = max(0, stored_bytes.bit_length() - BYTES_BITS)
    rounded = -(-stored_bytes >> shift)
    if rounded >> BYTES_BITS:
        shift, rounded = shift + 1, rounded >> 1
    if shift > 31:
        shift, rounded = 31, 127
    return (tier - 1) << _TIER_AT | (3 - fidelity) << _FIDELITY_AT | owner << KIND_SHIFT | shift << BYTES_BITS | rounded


def owner_of(copy: int) -> int:
    return copy >> KIND_SHIFT & OWNERS_MAX


def tier_of(copy: int) -> Tier:
    return _TIERS[copy >> _TIER_AT & 3]  # a fifth of what the enum's own lookup costs


def fidelity_of(copy: int) -> Fidelity:
    return _FIDELITIES[copy >> _FIDELITY_AT & 3]


def bytes_of(copy: int) -> int:
    return (copy & (1 << BYTES_BITS) - 1) << (copy >> BYTES_BITS & 31)
