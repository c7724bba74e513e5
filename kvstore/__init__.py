"""tiered-kvstore: a distributed tiered KV-cache service for LLM inference.

`KVClient` and what it speaks of. Importing this needs neither ray nor redis nor torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvstore.errors import KVStoreError
from kvstore.types import CommitToken, Fidelity, Tier

if TYPE_CHECKING:
    from kvstore.client.kv_client import KVClient
    from kvstore.client.plan import HitPlan
    from kvstore.keys import Chain, Extra, chain
    from kvstore.spec import Group, ModelSpec, Shard

__all__ = [
    "Chain",
    "CommitToken",
    "Extra",
    "Fidelity",
    "Group",
    "HitPlan",
    "KVClient",
    "KVStoreError",
    "ModelSpec",
    "Shard",
    "Tier",
    "chain",
]

_HOMES = {
    "KVClient": "kvstore.client.kv_client",
    "HitPlan": "kvstore.client.plan",
    "Chain": "kvstore.keys",
    "Extra": "kvstore.keys",
    "chain": "kvstore.keys",
    "Group": "kvstore.spec",
    "ModelSpec": "kvstore.spec",
    "Shard": "kvstore.spec",
}


def __getattr__(name: str) -> Any:
    """Loaded on first use, so that pure parts (keys, spec) do not pay for the transport."""
    if name not in _HOMES:
        raise AttributeError(f"module 'kvstore' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
