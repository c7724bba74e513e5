"""The dictionary of digests: what a header's root, shard and namespace digests stand for.

Announcements, the SSD log and the Redis index carry an entry before its first use; a record whose entry is missing
is skipped and counted, so lookups answer None.
"""

from __future__ import annotations

from typing import TypeVar

from kvstore.errors import Overloaded
from kvstore.spec import ModelSpec, Shard, namespace_digest

T = TypeVar("T")


class Catalog:
    """Digest -> ModelSpec, Shard, namespace name. Bounded: beyond the bound a new one is Overloaded."""

    def __init__(self, *, specs_max: int = 4096, shards_max: int = 65536, namespaces_max: int = 65536) -> None:
        self._specs: dict[bytes, ModelSpec] = {}
        self._shards: dict[bytes, Shard] = {}
        self._namespaces: dict[bytes, str] = {}
        self.specs_max = specs_max
        self.shards_max = shards_max
        self.namespaces_max = namespaces_max

    def learn_spec(self, spec: ModelSpec) -> bytes:
        """Its root. Mutates; idempotent. Overloaded beyond the bound."""
        self._learn(self._specs, spec.root, spec, self.specs_max, "model specs")
        return spec.root

    def learn_shard(self, shard: Shard) -> bytes:
        """Its digest. Mutates; idempotent. Overloaded beyond the bound."""
        self._learn(self._shards, shard.digest, shard, self.shards_max, "shards")
        return shard.digest

    def learn_namespace(self, name: str) -> bytes:
        """Its digest. Mutates; idempotent. Overloaded beyond the bound, BadRequest for a name that can't be one."""
        digest = namespace_digest(name)
        self._learn(self._namespaces, digest, name, self.namespaces_max, "namespaces")
        return digest

    def spec(self, root: bytes) -> ModelSpec | None:
        return self._specs.get(root)

    def shard(self, digest: bytes) -> Shard | None:
        return self._shards.get(digest)

    def namespace(self, digest: bytes) -> str | None:
        return self._namespaces.get(digest)

    def specs(self) -> list[ModelSpec]:
        """In the order they were learnt."""
        return list(self._specs.values())

    def shards(self) -> list[Shard]:
        """In the order they were learnt."""
        return list(self._shards.values())

    def namespaces(self) -> list[str]:
        """In the order they were learnt."""
        return list(self._namespaces.values())

    @staticmethod
    def _learn(entries: dict[bytes, T], digest: bytes, entry: T, bound: int, what: str) -> None:
        if digest not in entries and len(entries) >= bound:
            raise Overloaded(f"{bound} {what} are known already: remove unused ones by a restart, or raise the bound")
        entries.setdefault(digest, entry)
