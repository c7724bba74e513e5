"""Homes of a placement group: where its copies belong. A pure function of the group's id and the membership.

Rendezvous hashing (Thaler and Ravishankar, "Using name-based mappings to increase hit rates", 1998): every member
gets a weight per group, the highest ones win, so a member that comes or goes moves only its own share. Load is no
input: all who see the same membership (equal `membership_digest`) draw the same homes without asking each other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable


def weight(group_id: bytes, member: str) -> bytes:
    """8 bytes, uniform; greater is nearer. The group's id is a key (16 bytes), so the concatenation is unambiguous."""
    return hashlib.blake2b(group_id + member.encode(), digest_size=8).digest()


def rank(group_id: bytes, members: Iterable[str]) -> list[str]:
    """Members by falling weight, each once; ties by name."""
    distinct = sorted(dict.fromkeys(members))
    return sorted(distinct, key=lambda member: weight(group_id, member), reverse=True)


def homes(group_id: bytes, writer_host_worker: str | None, members: Iterable[str], copies: int) -> list[str]:
    """Up to `copies` workers that should hold the group: the one on the writer's host first, if it is a member."""
    ranked = rank(group_id, members)
    if writer_host_worker is not None and writer_host_worker in ranked:
        ranked.remove(writer_host_worker)
        ranked.insert(0, writer_host_worker)
    return ranked[: max(copies, 0)]


def membership_digest(members: Iterable[str]) -> bytes:
    """16 bytes that are equal exactly where the set of members is, in whatever order it was learnt."""
    digest = hashlib.sha256(b"members\0")
    for member in sorted(dict.fromkeys(members)):
        name = member.encode()
        digest.update(len(name).to_bytes(4, "little"))
        digest.update(name)
    return digest.digest()[:16]
