"""What the design rests on, taken out piece by piece: the simulator must notice each.

A mutant patches the product in this process only; no switch for it exists outside the tests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

from coordinator.session import Session
from kvstore.client.arrivals import Arrivals
from kvstore.client.bulk import Raws
from kvstore.client.host_link import Mapped
from kvstore.client.pieces import Piece
from kvstore.directory.announce import Delta, Inbox, Receiver
from kvstore.directory.answers import Match
from kvstore.directory.directory import Directory
from kvstore.directory.membership import Membership
from kvstore.kernels import landing
from kvstore.store.carrier import Carrier, Ticket
from kvstore.store.purges import Purges
from kvstore.store.staging import Staging
from kvstore.tiers.redis_index import RedisIndex
from workers.announcer import Stream

Patch = tuple[type, str, Callable[..., Any]]


@dataclass(frozen=True, slots=True)
class Mutant:
    """`seed` caught it when it was last looked for. `rare`: many seeds go by, so only the long form of the tests looks.
    `found`: a bug that was there once, and this seed found it."""

    name: str
    what: str
    patches: tuple[Patch, ...]
    seed: int = 0
    found: bool = False
    rare: bool = False

    @contextmanager
    def on(self) -> Iterator[None]:
        """For the time of the block the product is without it."""
        with ExitStack() as stack:
            for owner, name, made in self.patches:
                stack.enter_context(mock.patch.object(owner, name, made))
            yield


# --- memory ----------------------------------------------------------------------------------------------------------


def _always(*_: Any) -> bool:
    return True


_end_of_staging: Callable[..., None] = lambda self, id: None  # noqa: E731 - the peer is gone, its memory is not

_prepare = Raws.prepare


def _prepare_blindly(self: Raws) -> None:
    _prepare(self)
    self._marks.clear()


def _never_reused(*arguments: Any) -> None:
    """Nobody looks at the generations."""


_check, _begin = Arrivals._check, Piece.begin


def _unchecked(self: Arrivals, whole: list[Any]) -> list[str]:
    """Delivered, whichever copy the chunks are of."""
    for item, problem in zip(whole, _check(self, whole), strict=True):
        if problem and item.span is None:
            item.piece.fill(self._asked.spec, item.raw)
    return [""] * len(whole)


def _begin_any(self: Piece, copy_id: int) -> bool:
    """Goes on with the chunks of another copy."""
    self.copy_id = copy_id
    return _begin(self, copy_id)


_write = Carrier._write


async def _free_first(self: Carrier, ticket: Ticket, destination: int, moving: Any) -> Any:
    """Out of the upper tier, then into the lower one."""
    residency, row = self.stack.residency, ticket.row
    if not residency.gone(row) and residency.present(row, ticket.level) and not residency.pinned(row):
        moving.parts = [bytes(part) for part in moving.parts]
        self.stack.drop(row, ticket.level)
    return await _write(self, ticket, destination, moving)


# --- announcements ---------------------------------------------------------------------------------------------------

_register, _heartbeat, _open = Membership.register, Membership.heartbeat, Inbox.open


def _register_any(self: Membership, worker: str, epoch: int, now: float, **options: Any) -> Any:
    life = self._members.get(worker)
    if life is not None and life.epoch > epoch:
        del self._members[worker]
    self._gone.pop(worker, None)
    return _register(self, worker, epoch, now, **options)


def _open_any(self: Inbox, holder: str, epoch: int) -> Any:
    known = self._receivers.get(holder)
    if known is not None and known.epoch > epoch:
        self.forget(holder)
    return _open(self, holder, epoch)


_offer = Receiver.offer


def _offer_beyond(self: Receiver, delta: Delta) -> Any:
    """What lies between is taken for known."""
    if delta.first_seq > self.applied + 1:
        self.applied = delta.first_seq - 1
    return _offer(self, delta)


_learn = Session._learn


def _learn_some(self: Session, *given: Any) -> bool:
    _learn(self, *given)
    return True


_begin_snapshot = Stream._snapshot


def _same_words(self: Stream, namespace: str) -> None:
    """A snapshot that says nothing anew of what was said on the stream before."""
    introduced = self._introduced
    _begin_snapshot(self, namespace)
    self._introduced = introduced
    if namespace in self._parts:
        self._parts[namespace] = self._parts[namespace][0], introduced


_elect = RedisIndex.elect


async def _elect_again(self: RedisIndex, *given: Any) -> int | None:
    """Elected, under the number everybody had before."""
    return None if await _elect(self, *given) is None else 1


# --- lookup ----------------------------------------------------------------------------------------------------------

_match = Directory.match


def _match_anywhere(self: Directory, root: bytes, keys: Any, shards: Any, least: Any) -> Match:
    """What is held behind a gap counts too."""
    found = _match(self, root, keys, shards, least)
    for after in range(found.blocks + 1, len(keys)):
        more = _match(self, root, keys[after:], shards, least)
        if more.blocks:
            moved = [replace(run, first_depth=run.first_depth + after) for run in more.runs]
            return replace(found, blocks=after + more.blocks, runs=[*found.runs, *moved])
    return found


MUTANTS = (
    Mutant("purge-fence", "copies are taken from workers that have yet to do a purge",
           ((Purges, "fences", lambda *_, **__: False),), seed=6),
    Mutant("reader-generation", "a reader on the same host does not look at generations",
           ((Mapped, "current", _always), (Raws, "prepare", _prepare_blindly), (landing, "reused", _never_reused)),
           seed=49, rare=True),
    Mutant("epoch-fence", "a message of an older life is taken",
           ((Membership, "register", _register_any), (Membership, "current", _always), (Inbox, "open", _open_any)),
           seed=94, rare=True),
    Mutant("copy-flip-free", "a block is freed above before it is written below",
           ((Carrier, "_write", _free_first),)),
    Mutant("gap-snapshot", "a coordinator that misses changes does not ask for a snapshot",
           ((Receiver, "offer", _offer_beyond),)),
    Mutant("dead-writer", "the staging memory of a writer that is gone is kept",
           ((Staging, "close", _end_of_staging),)),
    Mutant("copy-id", "chunks are put together whichever copy they are of",
           ((Arrivals, "_check", _unchecked), (Piece, "begin", _begin_any)), seed=11),
    Mutant("announcer-fence", "every worker elected to announce Redis does so under one epoch",
           ((RedisIndex, "elect", _elect_again),), seed=90, rare=True),
    Mutant("contiguity", "blocks behind a gap count as held",
           ((Directory, "match", _match_anywhere),), seed=1),
    Mutant("lost-words", "changes whose dictionary was lost on the way are passed over", seed=80, found=True, rare=True,
           patches=((Session, "_learn", _learn_some), (Stream, "_snapshot", _same_words))),
)  # fmt: skip
