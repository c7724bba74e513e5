"""Purges of a short while ago, so that no copy made before one comes back from where it is not done yet.

A purge is done by one worker after the other. Until all have done it, somebody still has the blocks, and a repair, a
drain or a pull-through would bring them back to those who have dropped them. So a worker that does a purge remembers
its id, and takes such a block from another worker only if that one knew the id when it opened the block: whatever it
had from before was gone by then. What a client puts is never refused.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass

from kvstore.seams import Clock
from kvstore.spec import ModelSpec

PURGES_MAX = 64
"""Remembered per namespace; beyond it the oldest is forgotten first."""


@dataclass(frozen=True, slots=True)
class Scope:
    """What a purge drops of a namespace: a root's blocks, a model's (of one revision), or with neither all."""

    root: bytes = b""
    model: str = ""
    revision: str = ""

    def covers(self, root: bytes, spec: ModelSpec | None) -> bool:
        """`spec` None: not known here; a purge by name may mean it. Pure."""
        if self.root:
            return self.root == root
        if not self.model or spec is None:
            return True
        return spec.model == self.model and self.revision in ("", spec.revision)


@dataclass(frozen=True, slots=True)
class _Done:
    id: bytes
    at: float  # of the clock


class Purges:
    """One per store. For `fence_s` after a purge copies are refused; its id is told to others for twice as long, so
    that nobody who did it later is fenced off from who did it first."""

    def __init__(self, clock: Clock, fence_s: float) -> None:
        self._clock, self._fence_s = clock, fence_s
        self._done: dict[str, OrderedDict[Scope, _Done]] = {}  # namespace -> its purges, the oldest first

    def add(self, namespace: str, scope: Scope, id: bytes) -> None:
        """A purge is done here now. Mutates. A later one of the same scope stands for all before it."""
        done = self._done.setdefault(namespace, OrderedDict())
        done[scope] = _Done(id, self._clock.monotonic())
        done.move_to_end(scope)
        while len(done) > PURGES_MAX:
            done.popitem(last=False)

    def known(self, namespace: str) -> list[bytes]:
        """Ids of the purges that were done here. Mutates: old ones go."""
        done = self._done.get(namespace)
        if done is None:
            return []
        old = self._clock.monotonic() - 2 * self._fence_s
        for scope in [scope for scope, one in done.items() if one.at <= old]:
            del done[scope]
        if not done:
            del self._done[namespace]
        return [one.id for one in done.values()]

    def fences(self, namespace: str, root: bytes, spec: ModelSpec | None, known: Collection[bytes] = ()) -> bool:
        """Whether a copy may be from before a purge: its holder knew of the purges in `known` only. Pure."""
        since = self._clock.monotonic() - self._fence_s
        return any(
            one.at > since and one.id not in known and scope.covers(root, spec)
            for scope, one in self._done.get(namespace, {}).items()
        )
