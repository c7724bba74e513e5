"""Block keys: a SHA-256 chain over what KV was computed from. docs/FORMAT.md, "Keys".

    root = SHA-256(b"kvstore/1\\0" + spec JSON)[:16]
    key  = SHA-256(parent key + tokens as u32 LE + extras)[:16]

Only full blocks are keyed. An engine that hides its tokens gives its own chained hash instead (`engine_key`), in a
keyspace whose spec names the algorithm.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from itertools import islice, pairwise

import numpy as np
from numpy.typing import NDArray

from kvstore.errors import BadRequest
from kvstore.spec import ModelSpec
from kvstore.types import KEY_BYTES, Keys, pack_keys

Tokens = Sequence[int] | NDArray[np.integer]

NO_EXTRAS = bytes(4)
MAX_TAG_BYTES = 255
MAX_EXTRA_BYTES = 1 << 20
MAX_EXTRAS = 4096
MAX_HASH_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Extra:
    """An input of the computation that is no token: `lora`, `salt`, `mm:<token index in the block>`, `embeds`.

    `token` is the absolute index where it begins; in a chain a bare tag `mm` gets its index in the block appended.
    """

    tag: str
    value: bytes
    token: int = 0


def token_bytes(tokens: Tokens) -> memoryview:
    """Token ids as u32 LE bytes, one copy at most. BadRequest for an id outside u32."""
    if isinstance(tokens, np.ndarray):
        return _array_u32(tokens).view(np.uint8).data
    if isinstance(tokens, (str, bytes, bytearray, memoryview)):
        raise BadRequest(f"tokens are {type(tokens).__name__}: give a list or an array of integers")
    try:
        ids = array("I", tokens)
    except (OverflowError, TypeError, ValueError) as error:
        raise BadRequest(f"token ids must be integers from 0 to 2^32-1: {error}") from None
    if sys.byteorder != "little":
        ids.byteswap()
    return memoryview(ids).cast("B")


def _array_u32(tokens: NDArray[np.integer]) -> NDArray[np.uint32]:
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise BadRequest(f"tokens are a {tokens.ndim}-d array of {tokens.dtype}: give a 1-d array of integers")
    if tokens.dtype != np.uint32 and tokens.size and (int(tokens.min()) < 0 or int(tokens.max()) > 0xFFFFFFFF):
        raise BadRequest("token ids must be integers from 0 to 2^32-1")
    return np.ascontiguousarray(tokens, dtype="<u4")


def extras_bytes(extras: Iterable[Extra]) -> bytes:
    """u32 LE count, then per extra u32 LE tag length, tag, u32 LE length, bytes, sorted by tag. BadRequest on twins."""
    pairs = sorted((_tag_bytes(extra), bytes(extra.value)) for extra in extras)
    for (tag, _), (following, _) in pairwise(pairs):
        if tag == following:
            raise BadRequest(f"extra {tag.decode()!r} occurs twice in one block: give each tag once")
    parts = [len(pairs).to_bytes(4, "little")]
    for tag, value in pairs:
        parts += (len(tag).to_bytes(4, "little"), tag, len(value).to_bytes(4, "little"), value)
    return b"".join(parts)


def _tag_bytes(extra: Extra) -> bytes:
    try:
        tag = extra.tag.encode()
    except UnicodeEncodeError:
        raise BadRequest("an extra's tag is no valid Unicode text: give a string that encodes as UTF-8") from None
    if not 1 <= len(tag) <= MAX_TAG_BYTES:
        raise BadRequest(f"an extra's tag has {len(tag)} bytes: give 1 to {MAX_TAG_BYTES}")
    if not isinstance(extra.value, (bytes, bytearray, memoryview)):
        raise BadRequest(f"extra {extra.tag!r} has a {type(extra.value).__name__}: give bytes")
    if len(extra.value) > MAX_EXTRA_BYTES:
        raise BadRequest(
            f"extra {extra.tag!r} has {len(extra.value)} bytes: give a digest, or at most {MAX_EXTRA_BYTES} bytes"
        )
    return tag


def block_key(parent: bytes, tokens: Tokens, extras: Iterable[Extra] = ()) -> bytes:
    """Key of one block; tags are hashed as they stand. BadRequest as `token_bytes` and `extras_bytes`."""
    _check_parent(parent)
    return sha256(b"".join((parent, token_bytes(tokens), extras_bytes(extras)))).digest()[:KEY_BYTES]


def engine_key(parent: bytes, last_hash: bytes) -> bytes:
    """Key of one block known only by its last page's hash in the engine's own chain."""
    _check_parent(parent)
    if not 1 <= len(last_hash) <= MAX_HASH_BYTES:
        raise BadRequest(f"an engine hash has {len(last_hash)} bytes: give 1 to {MAX_HASH_BYTES}")
    return sha256(b"".join((parent, len(last_hash).to_bytes(4, "little"), last_hash))).digest()[:KEY_BYTES]


def _check_parent(parent: bytes) -> None:
    if len(parent) != KEY_BYTES:
        raise BadRequest(f"a parent key has {len(parent)} bytes: give the {KEY_BYTES} of a key or root")


@dataclass(slots=True)
class Chain:
    """The keys of a prompt's full blocks, by depth."""

    spec: ModelSpec
    keys: list[bytes] = field(default_factory=list)
    _packed: Keys = field(default_factory=lambda: Keys(b""), compare=False, repr=False)

    @property
    def packed(self) -> Keys:
        """All keys back to back, as lookups want them. Remembered while none is added."""
        if len(self._packed) != len(self.keys):
            self._packed = Keys(pack_keys(self.keys))
        return self._packed

    @property
    def root(self) -> bytes:
        return self.spec.root

    def parent(self, depth: int) -> bytes:
        """The key before; the root for depth 0."""
        return self.keys[depth - 1] if depth else self.spec.root

    def group(self, depth: int) -> bytes:
        """Id of the block's placement group: the key of the group's first block."""
        return self.keys[depth - depth % self.spec.group_blocks]

    def __len__(self) -> int:
        return len(self.keys)


def chain(spec: ModelSpec, tokens: Tokens, extras: Iterable[Extra] = ()) -> Chain:
    """Keys of the full blocks of a prompt; tokens after the last full block are not keyed. Pure."""
    builder = ChainBuilder(spec, extras)
    builder.extend(tokens)
    _ = builder.chain.packed  # now, while the keys are in the cache
    return builder.chain


def engine_chain(spec: ModelSpec, last_hashes: Iterable[bytes]) -> Chain:
    """Keys of blocks known by the hash of each block's last page. BadRequest unless the spec names an engine hash."""
    if not spec.engine_hash:
        raise BadRequest("the spec names no engine_hash: key this model by its tokens, or name the engine's algorithm")
    made = Chain(spec)
    parent = spec.root
    for last_hash in last_hashes:
        parent = engine_key(parent, last_hash)
        made.keys.append(parent)
    return made


class ChainBuilder:
    """A chain that grows as tokens come (a prompt, then what was generated). `extend` mutates `chain` in place."""

    def __init__(self, spec: ModelSpec, extras: Iterable[Extra] = ()) -> None:
        if spec.engine_hash:
            raise BadRequest(f"the spec is keyed by the engine hash {spec.engine_hash!r}: use engine_chain")
        self.chain = Chain(spec)
        self._block_bytes = spec.block_tokens * 4
        self._tail = b""
        self._suffixes = _suffixes(spec, extras)

    def extend(self, tokens: Tokens) -> list[bytes]:
        """Append tokens; the keys of the blocks they completed. On BadRequest nothing was appended."""
        fresh = token_bytes(tokens)
        view = memoryview(b"".join((self._tail, fresh))) if self._tail else fresh
        step, suffixes, keys = self._block_bytes, self._suffixes, self.chain.keys
        first = len(keys)
        parent = self.chain.parent(first)
        whole = len(view) - len(view) % step
        for depth, start in enumerate(range(0, whole, step), first):
            suffix = suffixes.get(depth, NO_EXTRAS) if suffixes else NO_EXTRAS
            parent = sha256(b"".join((parent, view[start : start + step], suffix))).digest()[:16]
            keys.append(parent)
        self._tail = bytes(view[whole:])
        return keys[first:]

    @property
    def tail_tokens(self) -> int:
        """Tokens after the last full block."""
        return len(self._tail) // 4


def _suffixes(spec: ModelSpec, extras: Iterable[Extra]) -> dict[int, bytes]:
    """Encoded extras of the blocks that have any, by depth."""
    by_depth: dict[int, list[Extra]] = {}
    given = list(islice(extras, MAX_EXTRAS + 1))
    if len(given) > MAX_EXTRAS:
        raise BadRequest(f"more than {MAX_EXTRAS} extras in one chain: give a digest of several")
    for extra in given:
        if extra.token < 0:
            raise BadRequest(f"extra {extra.tag!r} begins at token {extra.token}: give its index in the prompt")
        depth, index = divmod(extra.token, spec.block_tokens)
        if extra.tag == "mm":
            extra = replace(extra, tag=f"mm:{index}")
        elif extra.tag.startswith("mm:") and extra.tag != f"mm:{index}":
            raise BadRequest(f"extra {extra.tag!r} begins at index {index} of its block: name it 'mm'")
        by_depth.setdefault(depth, []).append(extra)
    return {depth: extras_bytes(here) for depth, here in by_depth.items()}
