"""Every compiled loop (numba) made and on disk, before anybody waits for one. The first time on a machine, and after an
update, that takes most of a minute: whoever does it beside its work answers late meanwhile."""

from __future__ import annotations

from collections.abc import Callable

from kvstore.checksum import prepare as copies
from kvstore.client.bulk import ready as gets
from kvstore.codecs import NAMES
from kvstore.codecs.batch import ready as codecs
from kvstore.directory.block_table import prepare as lookups
from kvstore.policies.base import prepare as policy
from kvstore.store.together import prepare as opens

PARTS: tuple[tuple[str, Callable[[], None]], ...] = (
    ("copies", copies),
    ("opens", opens),
    ("gets", gets),
    ("lookups", lookups),
    ("policy", lambda: policy("default")),
    ("codecs", lambda: codecs(NAMES)),
)


def compile_all(told: Callable[[str], None] = lambda what: None) -> None:
    """`told` hears of each part as it begins. Seconds where all is on disk already."""
    for what, make in PARTS:
        told(what)
        make()
