"""vLLM's KV events: what its own prefix cache holds, as it publishes it over ZMQ. Pure: messages in, events out.

Two encodings are read: arrays with the kind first (`array_like`, as first released), and maps with the kind under
`type`. Fields that are not needed, and fields that later versions add, are passed over.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvstore.directory.msgpack import unpack
from kvstore.errors import Corrupt

PageHash = int | bytes

_STORED = (
    "block_hashes", "parent_block_hash", "token_ids", "block_size", "lora_id", "medium", "lora_name", "extra_keys",
    "group_idx", "kv_cache_spec_kind",
)  # fmt: skip
_REMOVED = ("block_hashes", "medium", "group_idx")


@dataclass(frozen=True, slots=True)
class Stored:
    """Consecutive pages of one chain; `tokens` are theirs, `page_tokens` each."""

    pages: tuple[PageHash, ...]
    parent: PageHash | None
    tokens: tuple[int, ...]
    page_tokens: int
    medium: str  # "GPU" where none is named
    plain: bool  # keyed by tokens alone: no adapter, salt, image or other extra
    group: int = 0
    kind: str = ""  # of the group's attention, where it is told


@dataclass(frozen=True, slots=True)
class Dropped:
    pages: tuple[PageHash, ...]
    medium: str
    group: int = 0


@dataclass(frozen=True, slots=True)
class Cleared:
    """Nothing is held any more."""


Event = Stored | Dropped | Cleared


def parse(payload: bytes) -> list[Event]:
    """The events of one batch, in order; kinds that are not known are left out. Corrupt where it is no batch."""
    batch = unpack(payload)
    events = batch.get("events") if isinstance(batch, dict) else batch[1] if _is_batch(batch) else None
    if not isinstance(events, list):
        raise Corrupt("not a batch of KV events: neither a map with `events` nor an array [time, events, ...]")
    return [event for event in map(_event, events) if event is not None]


def _is_batch(batch: object) -> bool:
    return isinstance(batch, list) and len(batch) >= 2


def _event(event: object) -> Event | None:
    if isinstance(event, dict):
        kind, fields = event.get("type"), event
    elif isinstance(event, list) and event:
        kind = event[0]
        names: Sequence[str] = {"BlockStored": _STORED, "BlockRemoved": _REMOVED}.get(kind, ())
        fields = dict(zip(names, event[1:], strict=False))
    else:
        raise Corrupt("a KV event that is neither a map nor an array")
    if kind == "BlockStored":
        return _stored(fields)
    if kind == "BlockRemoved":
        return Dropped(_hashes(fields.get("block_hashes")), fields.get("medium") or "GPU", fields.get("group_idx") or 0)
    return Cleared() if kind == "AllBlocksCleared" else None


def _stored(fields: dict[str, Any]) -> Stored:
    pages, tokens, size = _hashes(fields.get("block_hashes")), fields.get("token_ids"), fields.get("block_size")
    if not isinstance(size, int) or size < 1 or not isinstance(tokens, list):
        raise Corrupt("a stored KV event without block_size or token_ids")
    if len(tokens) != len(pages) * size or not all(isinstance(token, int) for token in tokens):
        raise Corrupt(f"a stored KV event of {len(pages)} pages of {size} tokens with {len(tokens)} tokens")
    extra = fields.get("extra_keys") or ()
    plain = fields.get("lora_id") is None and not fields.get("lora_name") and not any(extra)
    parent = fields.get("parent_block_hash")
    return Stored(
        pages,
        None if parent is None else _hashes([parent])[0],
        tuple(tokens),
        size,
        fields.get("medium") or "GPU",
        plain,
        fields.get("group_idx") or 0,
        fields.get("kv_cache_spec_kind") or "",
    )


def _hashes(found: object) -> tuple[PageHash, ...]:
    if not isinstance(found, list) or not all(isinstance(one, int | bytes) for one in found):
        raise Corrupt("a KV event without block_hashes")
    return tuple(found)
