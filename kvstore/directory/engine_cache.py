"""An engine's own prefix cache, known from its KV events: pages become blocks where all pages of a block are there.

Pure. Keys are made from the events' tokens, so that they are the service's own. What cannot be keyed (adapters, salts,
images; pages whose beginning was never seen) is left out and counted: the engine then has more than it is scored for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from kvstore.directory.kv_events import Cleared, Dropped, Event, PageHash, Stored
from kvstore.directory.runs import Added, Change, Removed
from kvstore.errors import UsageError
from kvstore.keys import block_key
from kvstore.spec import ModelSpec, Shard
from kvstore.types import Fidelity, Tier

WHOLE_KINDS = ("", "full_attention", "mla_attention")
"""Attention whose pages decide how far a prefix reaches; windows and states are taken to follow."""

DEVICE = "GPU"


@dataclass(slots=True)
class _Page:
    parent: PageHash | None
    index: int  # in its chain
    tokens: tuple[int, ...]
    key: bytes = b""  # of the block that ends with it; the pages before may be gone again
    before: bytes = b""  # key of the block before that one
    group: bytes = b""
    told: bool = False  # whether its block is announced
    present: bool = True  # False: dropped, but others hang on it
    children: dict[PageHash, None] = field(default_factory=dict)


class EngineCache:
    """Events in, changes of blocks out. `pages_max` bounds the memory: pages beyond it are left out and counted."""

    def __init__(self, spec: ModelSpec, pages_max: int = 1 << 20) -> None:
        """UsageError for a spec whose keys are not made from tokens."""
        if spec.engine_hash:
            raise UsageError("the spec is keyed by an engine's hash: give one that is keyed by tokens")
        self.spec, self.pages_max = spec, pages_max
        self.counters: Counter[str] = Counter()
        self.shards = [Shard.whole(spec, group) for group in range(len(spec.groups))]
        self._pages: dict[PageHash, _Page] = {}
        self._a_block = 0  # pages of a block, known with the first event
        self._other_groups: dict[int, None] = {}
        self._block_bytes = [spec.group_bytes(group) for group in spec.groups]

    def take(self, events: Iterable[Event]) -> list[Change]:
        """What has changed, in order. Mutates."""
        changes: list[Change] = []
        for event in events:
            if isinstance(event, Cleared):
                changes += self.clear()
            elif event.medium == DEVICE and not self._follows(event):
                changes += self._stored(event) if isinstance(event, Stored) else self._dropped(event)
        return changes

    def clear(self) -> list[Change]:
        """Nothing is held any more: also where events were lost. Mutates."""
        gone = [self._removed(page) for page in self._pages.values() if page.told]
        self._pages.clear()
        return [change for one in gone for change in one]

    def blocks(self) -> list[Added]:
        """Everything held."""
        return [added for page in self._pages.values() if page.told for added in self._added(page)]

    def _follows(self, event: Stored | Dropped) -> bool:
        """Whether it is of a group that does not decide. Mutates."""
        if isinstance(event, Stored) and event.kind not in WHOLE_KINDS:
            self._other_groups[event.group] = None
        return event.group in self._other_groups

    def _stored(self, event: Stored) -> list[Change]:
        if not event.plain or self.spec.block_tokens % event.page_tokens:
            self.counters["pages_not_keyed"] += len(event.pages)
            return []
        self._a_block = self.spec.block_tokens // event.page_tokens
        parent, changes = event.parent, list[Change]()
        for at, hashed in enumerate(event.pages):
            known = self._pages.get(hashed)
            if known is None:
                known = self._new(hashed, parent, event.tokens[at * event.page_tokens : (at + 1) * event.page_tokens])
                if known is None:
                    return changes
            known.present = True
            for end in self._ends(known):
                changes += self._tell(end)
            parent = hashed
        return changes

    def _new(self, hashed: PageHash, parent: PageHash | None, tokens: tuple[int, ...]) -> _Page | None:
        before = None if parent is None else self._pages.get(parent)
        if parent is not None and before is None:
            self.counters["pages_without_beginning"] += 1
            return None
        if len(self._pages) >= self.pages_max:
            self.counters["pages_beyond_bound"] += 1
            return None
        page = self._pages[hashed] = _Page(parent, before.index + 1 if before is not None else 0, tokens)
        if before is not None:
            before.children[hashed] = None
        if self._is_end(page):
            self._key(page)
        return page

    def _is_end(self, page: _Page) -> bool:
        return page.index % self._a_block == self._a_block - 1

    def _line(self, page: _Page) -> list[_Page]:
        """The pages of the block that this one ends, first to last, as far as they are known."""
        line = [page]
        while line[-1].index % self._a_block and (parent := line[-1].parent) is not None and parent in self._pages:
            line.append(self._pages[parent])
        return line[::-1]

    def _key(self, page: _Page) -> None:
        line = self._line(page)
        above = line[0].parent
        previous = self._pages[above] if above is not None else None
        page.before = previous.key if previous is not None else self.spec.root
        page.key = block_key(page.before, [token for one in line for token in one.tokens])
        depth = page.index // self._a_block
        page.group = page.key if previous is None or depth % self.spec.group_blocks == 0 else previous.group

    def _ends(self, page: _Page) -> list[_Page]:
        """Pages that end a block which this one belongs to: itself, or those below it."""
        line, ends = [page], list[_Page]()
        while line:
            here = line.pop()
            if self._is_end(here):
                ends.append(here)
            else:
                line += [self._pages[child] for child in here.children]
        return ends

    def _tell(self, end: _Page) -> list[Change]:
        line = self._line(end)
        if end.told or len(line) < self._a_block or not all(page.present for page in line):
            return []
        end.told = True
        return list(self._added(end))

    def _dropped(self, event: Dropped) -> list[Change]:
        changes: list[Change] = []
        for hashed in event.pages:
            page = self._pages.get(hashed)
            if page is None or not page.present:
                continue
            for end in self._ends(page):
                if end.told:
                    end.told = False
                    changes += self._removed(end)
            page.present = False
            self._forget(hashed)
        return changes

    def _forget(self, hashed: PageHash | None) -> None:
        """Let go of a page that nothing hangs on, and of those above it that only waited for it."""
        while hashed is not None and (page := self._pages.get(hashed)) is not None:
            if page.present or page.children:
                return
            del self._pages[hashed]
            if page.parent is not None and page.parent in self._pages:
                self._pages[page.parent].children.pop(hashed, None)
            hashed = page.parent

    def _added(self, page: _Page) -> list[Added]:
        depth = page.index // self._a_block
        return [
            Added(
                self.spec.root, shard.digest, page.key, page.before, page.group, depth, Tier.HOT, Fidelity.EXACT, nbytes
            )
            for shard, nbytes in zip(self.shards, self._block_bytes, strict=True)
        ]

    def _removed(self, page: _Page) -> list[Change]:
        return [Removed(shard.digest, page.key) for shard in self.shards]
