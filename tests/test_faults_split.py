"""Two hosts that no longer reach each other, and meet again: workers, coordinators and clients on both, under load.

Each host has a coordinator and two workers; every block lies on two of the four. While they are apart: no wrong byte,
no call past its deadline, no exception, and what a host has itself goes on being hit there. Afterwards: two copies of
every block, nothing pinned or staged, and both directories say exactly what the workers hold.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.split_hosts import Side, SplitHosts

pytestmark = pytest.mark.timeout(240)

HITS_MIN = 0.9
SHORT_S, LONG_S = 5.0, 60.0


@dataclass(slots=True)
class Two:
    """Both hosts, up and filled."""

    hosts: SplitHosts
    sides: list[Side]
    workers: list[dict[str, str]]  # of each: id -> address
    coordinators: list[str]

    def both(self, do: str, **arguments: Any) -> list[dict[str, Any]]:
        """One command to both at once."""
        for side in self.sides:
            side.tell(do, **arguments)
        return [side.answer() for side in self.sides]

    def whole(self) -> None:
        self.both("standing", coordinators=self.coordinators, wanted=sum(map(len, self.workers)))

    def settle(self) -> None:
        """By what the first host sees."""
        self.sides[0].ask("settle", workers=self.workers[0] | self.workers[1], coordinators=self.coordinators)


@pytest.fixture
def two(tmp_path: Path) -> Iterator[Two]:
    token = tmp_path / "token"
    token.touch(0o600)
    token.write_text("a-token-of-this-test-alone")
    with ExitStack() as stack:
        try:
            hosts = stack.enter_context(SplitHosts())
        except OSError as error:
            pytest.skip(f"this machine makes no hosts of its own: {error}")
        made = Two(hosts, [], [], [])
        for number, (name, address) in enumerate(zip(hosts.names, hosts.addresses, strict=True)):
            folder = tmp_path / f"host-{number}"
            folder.mkdir()
            about = {"address": address, "folder": str(folder), "token_file": str(token)}
            side = Side(name, folder / "log", about | {"coordinators": list(made.coordinators)})
            stack.callback(side.close)
            made.sides.append(side)
            up = side.ask("start")
            made.workers.append(up["workers"])
            made.coordinators += up["coordinators"]
        made.whole()
        for part, side in enumerate(made.sides):
            side.ask("fill", part=part)
        made.settle()
        yield made


def split(two: Two, seconds: float) -> list[dict[str, Any]]:
    """What each host saw of it."""
    two.both("load")
    flying = two.both("mark")
    two.hosts.cut()
    threading.Event().wait(seconds)  # that they are apart
    for side, own in zip(two.sides, two.workers, strict=True):
        side.ask("apart", workers=list(own))
    two.both("mark")
    two.hosts.heal()
    healed = time.monotonic()
    two.whole()
    seen = two.both("finish")
    two.settle()
    print(f"\nsplit for {seconds:g} s, as before after {time.monotonic() - healed:.1f} s")
    print(*seen, sep="\n")
    return [said | {"flying": flown["flying"]} for said, flown in zip(seen, flying, strict=True)]


def check(seen: list[dict[str, Any]]) -> None:
    for side in seen:
        assert not side["trouble"], side
        assert side["flying"] >= 1 and side["requests"] >= 20 and side["asked_of_own"] > 0, side
        assert side["got_of_own"] >= HITS_MIN * side["asked_of_own"], side


def test_two_hosts_are_split_and_meet_again(two: Two) -> None:
    check(split(two, SHORT_S))


@pytest.mark.slow
def test_two_hosts_are_split_for_a_minute(two: Two) -> None:
    check(split(two, LONG_S))
