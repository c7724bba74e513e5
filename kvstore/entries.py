"""What a directory remembers of one block: nothing, one copy, or several, as small as Python allows. Internal to it.

A copy is one int: stored bytes | owner (22 bits) | tier (3) | fidelity (2). The bytes are kept to 7 significant bits:
they only predict a load, and so neighbours mostly are equal and are looked at once. An entry is a copy, or a tuple of
copies of different owners where there is more than one. An owner is one life of a holder, numbered by the directory.
"""

from __future__ import annotations

from kvstore.types import Fidelity, Tier

Entry = int | tuple[int, ...]

OWNER_BITS = 22
OWNERS_MAX = 1 << OWNER_BITS
BYTES_MAX = (1 << 33) - 1  # the whole int then fits two 30-bit digits: 32 bytes of memory
BYTES_BITS = 7  # significant ones

_TIER_SHIFT = 2
_OWNER_SHIFT = 5
_BYTES_SHIFT = _OWNER_SHIFT + OWNER_BITS
_OWNER_MASK = OWNERS_MAX - 1
FIDELITY_MASK = 3
KIND_MASK = (1 << _BYTES_SHIFT) - 1
"""Everything but the bytes: equal for blocks that one run of an answer may hold."""


def pack(owner: int, tier: Tier, fidelity: Fidelity, stored_bytes: int) -> int:
    """The bytes are rounded up, by less than one part in 64, and are at most `BYTES_MAX`."""
    shift = max(0, stored_bytes.bit_length() - BYTES_BITS)
    rounded = min((-(-stored_bytes >> shift)) << shift, BYTES_MAX)
    return rounded << _BYTES_SHIFT | owner << _OWNER_SHIFT | tier << _TIER_SHIFT | fidelity


def owner_of(copy: int) -> int:
    return copy >> _OWNER_SHIFT & _OWNER_MASK


def tier_of(copy: int) -> Tier:
    return Tier(copy >> _TIER_SHIFT & 7)


def fidelity_of(copy: int) -> Fidelity:
    return Fidelity(copy & FIDELITY_MASK)


def bytes_of(copy: int) -> int:
    return copy >> _BYTES_SHIFT


def copies_of(entry: Entry | None) -> tuple[int, ...]:
    """All copies of an entry, () for None."""
    if entry is None:
        return ()
    return entry if isinstance(entry, tuple) else (entry,)


def copy_by(entry: Entry | None, owner: int) -> int | None:
    """The copy of one owner."""
    for copy in copies_of(entry):
        if owner_of(copy) == owner:
            return copy
    return None


def entry_of(copies: list[int]) -> Entry | None:
    """Inverse of `copies_of`."""
    if not copies:
        return None
    return copies[0] if len(copies) == 1 else tuple(copies)


def without(entry: Entry, owner: int) -> Entry | None:
    """The entry less one owner's copy: None where nothing is left, the very same object where it had none."""
    if copy_by(entry, owner) is None:
        return entry
    return entry_of([copy for copy in copies_of(entry) if owner_of(copy) != owner])
