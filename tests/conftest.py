"""Fixtures every test shares."""

from __future__ import annotations

import faulthandler
import gc
import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

with suppress(ImportError):  # the engines' environment has none
    import hypothesis  # noqa: F401 - else its plugin does at the very end, and parses while a thread may compile

faulthandler.enable()


def mapped_memfds() -> int:
    """Mappings of this process that a memfd is behind."""
    return Path("/proc/self/maps").read_text().count("/memfd:")


@pytest.fixture
def no_leaks() -> Iterator[None]:
    """Descriptors, threads and mapped memfds after the test are those before it."""
    gc.collect()
    descriptors, threads, memfds = len(os.listdir("/proc/self/fd")), threading.active_count(), mapped_memfds()
    yield
    gc.collect()
    assert mapped_memfds() <= memfds, "memfds are still mapped"
    assert len(os.listdir("/proc/self/fd")) <= descriptors, "descriptors leaked"
    assert threading.active_count() <= threads, "threads leaked"
