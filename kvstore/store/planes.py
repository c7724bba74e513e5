"""Planes of nested blocks as something to give up: what readers need of them, what they weigh, which ones cost least.

A plane is worth what its block is worth, times the share of reads that are not answered without it; beside its bytes
that compares with what any other block, or plane, is worth beside its own. What a namespace does not allow to lose
(`least_fidelity`) is never a choice, and a policy that knows no more than an order has none either.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from kvstore.codec_rules import CodecRules
from kvstore.config import StoreConfig
from kvstore.header import Header
from kvstore.residency.residency import Residency
from kvstore.residency.rows import NONE
from kvstore.residency.together import RUN_BLOCKS_MAX
from kvstore.types import Fidelity

USUAL_SHARE = (0.4, 0.72, 1.0)
"""Of a nested record, by leading planes: on real KV .37 and .70. Who reads them and finds more reads a second time."""

RECORD_SHARE = 0.77
"""Of raw bytes: a nested record with all planes, on real KV."""

READS_EXACT = 64
"""Reads of the best there is that a namespace is thought to have had before anybody asked: nothing is given up on a few
readers' word."""

READS_MAX = 1 << 16
"""Then all counts are halved, so that they follow what is asked now."""

ALL = int(Fidelity.EXACT)

LOOKED_AT = 4096
"""Blocks looked at when the cheapest planes of a level are wanted, and the share of them that is then offered."""
OFFERED_SHARE = 16


class Planes:
    """One per store. Metadata only."""

    def __init__(
        self,
        residency: Residency,
        config: StoreConfig,
        codecs: Mapping[str, CodecRules],
        nested: Callable[[str, Header], bool],
    ) -> None:
        """`nested`: whether blocks of a namespace and shard may have planes at all."""
        self._residency, self._nested = residency, nested
        self._least = {
            name: rules.least
            for name, rules in codecs.items()
            if rules.least < Fidelity.EXACT and "nested" in rules.names(config.codec)
        }  # by namespace: what may be left, of those that may lose planes
        self._asked: dict[str, list[float]] = {}  # namespace -> reads by the least fidelity they accept
        self._offers: dict[int, list[int]] = {}  # level -> rows, the least worth last
        self._cursor: dict[int, int] = {}  # level -> where the next look begins
        self._barren: dict[int, int] = {}  # level -> bytes used there when nothing was found
        self._whole: dict[int, int] = {}  # row -> copy_id: what is stored without planes after all

    # ---- what readers need

    def opened(self, namespace: str, least: Fidelity, blocks: int) -> None:
        """So many blocks were read by who accepts `least`. Mutates."""
        if namespace in self._least:
            asked = self._asked.setdefault(namespace, [0.0] * (Fidelity.EXACT + 1))
            asked[least] += blocks
            if sum(asked) > READS_MAX:
                self._asked[namespace] = [count / 2 for count in asked]

    def needs(self, row: int, now: int, left: int) -> float:
        """The share of reads of a block worth `now` that one worth `left` does not answer. Pure."""
        residency = self._residency
        computed_on = residency.header(row).computed_on
        asked = self._asked.get(residency.namespace(row), ())
        answered = sum(asked[: min(now, computed_on) + 1])
        lost = sum(asked[left + 1 : min(now, computed_on) + 1])
        spare = 0 if left >= computed_on else READS_EXACT
        return (lost + spare) / max(1.0, answered + READS_EXACT)

    # ---- what they weigh

    def may_lose(self, row: int, worth: int) -> bool:
        """Whether a copy of that fidelity has a plane that its namespace can do without. Pure."""
        namespace = self._residency.namespace(row)
        if self._least.get(namespace, Fidelity.EXACT) >= worth:
            return False
        header = self._residency.header(row)
        return self._whole.get(row) != header.copy_id and self._nested(namespace, header)

    def keep(self, row: int) -> None:
        """Its record has no planes: every chunk was better off with another codec. Mutates."""
        if len(self._whole) >= LOOKED_AT:
            self._whole.clear()
        self._whole[row] = self._residency.header(row).copy_id

    def any_at(self, level: int) -> bool:
        """Whether anything at a level may lose planes. Pure."""
        return bool(self._least) and not self._residency.levels[level].raw

    @staticmethod
    def weight(record_bytes: float, now: int) -> float:
        """Bytes of the last plane of a record with so many. Pure."""
        below = USUAL_SHARE[now - 2] if now > 1 else 0.0
        return record_bytes * (USUAL_SHARE[now - 1] - below) / USUAL_SHARE[now - 1]

    @staticmethod
    def saved(record_bytes: int, now: int, left: int) -> int:
        """Bytes that a record with `now` planes is thought to lose with all but `left`. Pure."""
        return int(record_bytes * (1.0 - USUAL_SHARE[left - 1] / USUAL_SHARE[now - 1]))

    def price(self, row: int, level: int) -> float | None:
        """What a copy at a level is worth beside its bytes; None where no policy can tell, or others keep it. Pure."""
        residency = self._residency
        worth = None if residency.rows.secondary[row] else residency.policies[level].worth(row)
        return None if worth is None else worth / residency.rows.length[level][row]

    def carried(self, row: int, source: int, destination: int) -> int:
        """Leading planes that a block brings to a full level where what gives way is lost: all that are worth more,
        beside their bytes, than the next to leave it. Pure."""
        residency = self._residency
        rule, now = residency.levels[source], int(residency.rows.worth(row, source))
        nbytes = residency.rows.length[source][row] * (RECORD_SHARE if rule.raw else 1.0)
        rival = residency.victim(destination)
        price = None if rival is None or residency.rows.secondary[rival] else self.price(rival, destination)
        worth = residency.policies[destination].worth(row)
        if price is None or worth is None or residency.rows.secondary[row]:
            return now
        return self.left(row, worth, nbytes, now, price)

    def left(self, row: int, worth: int, nbytes: float, now: int, price: float) -> int:
        """Leading planes of a record of `nbytes` that are worth at least `price` beside their bytes. Pure."""
        while self.may_lose(row, now):
            weight = self.weight(nbytes, now)
            if worth * self.needs(row, now, now - 1) / weight >= price:
                break
            now, nbytes = now - 1, nbytes - weight
        return now

    # ---- which ones cost least

    def cheapest(self, level: int, price: float) -> tuple[int, int] | None:
        """A block at a level whose last planes are worth less than `price`, beside their bytes, and how many are worth
        as much: of the blocks looked at, the one that is worth least. None where there is none. Mutates nothing but
        its memory of whom it looked at."""
        residency = self._residency
        for fresh in (False, True):
            if fresh:
                self._look(level)
            offers = self._offers.get(level, [])
            while offers:
                row = offers[-1]
                worth = residency.policies[level].worth(row) if self._offered(row, level) else None
                if worth is not None:
                    now = int(residency.rows.worth(row, level))
                    left = self.left(row, worth, residency.rows.length[level][row], now, price)
                    return (row, left) if left < now else None
                offers.pop()
        return None

    def alike(self, row: int, level: int, nbytes: int, left: int) -> list[int]:
        """`row`, then its parent, and so on: as long as each is worth as much and may lose the same planes. No more
        than `nbytes` ask for, but one. Pure."""
        residency, rows = self._residency, self._residency.rows
        now, worth = int(rows.worth(row, level)), residency.policies[level].worth(row)
        run, freed = [row], self.saved(rows.length[level][row], now, left)
        while freed < nbytes and len(run) < RUN_BLOCKS_MAX and (row := rows.parent[row]) != NONE:
            if not residency.present(row, level) or rows.worth(row, level) != now or not self._offered(row, level):
                break
            if residency.policies[level].worth(row) != worth:
                break
            run.append(row)
            freed += self.saved(rows.length[level][row], now, left)
        return run

    def heartbeat(self) -> None:
        """Look again where nothing was found. Mutates."""
        self._barren.clear()

    def _offered(self, row: int, level: int) -> bool:
        """Whether a block may lose a plane where it lies, now. Pure."""
        rows = self._residency.rows
        here = rows.used[row] and not rows.gone[row] and self._residency.staying(row, level)
        free = here and not rows.pins[row] and not rows.busy[row] and not rows.secondary[row]
        return bool(free) and self.may_lose(row, int(rows.worth(row, level)))

    def _look(self, level: int) -> None:
        """The next so many blocks of a level that may lose planes, the share of them that is worth least. Mutates."""
        residency, rows = self._residency, self._residency.rows
        self._offers[level] = []
        if residency.used[level] <= self._barren.get(level, -1):
            return
        mine = [space for name in self._least for space in residency.spaces(name)]
        least = np.full(len(residency.names) + 1, ALL, np.uint8)
        for space in mine:
            least[space] = self._least[residency.names[space][0]]
        here = np.frombuffer(rows.present, np.uint8) >> level & 1 != 0
        more = np.frombuffer(rows.planes[level], np.uint8) >> least[np.frombuffer(rows.space, np.int32)] != 0
        found = np.flatnonzero(here & more)
        first = int(np.searchsorted(found, self._cursor.get(level, 0)))
        looked = np.concatenate((found[first:], found[:first]))[:LOOKED_AT].tolist()
        offers = [row for row in looked if self._offered(row, level)]
        if not offers:
            self._barren[level] = residency.used[level]
            return
        self._cursor[level] = looked[-1] + 1
        offers.sort(key=residency.policies[level].order)
        self._offers[level] = offers[: max(1, len(offers) // OFFERED_SHARE)][::-1]
