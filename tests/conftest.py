"""Fixtures every test shares."""

from __future__ import annotations

import faulthandler
import gc
import os
import threading
from collections.abc import Iterator

import pytest

faulthandler.enable()


@pytest.fixture
def no_leaks() -> Iterator[None]:
    """Descriptors and threads after the test are those before it."""
    gc.collect()
    descriptors, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    yield
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= descriptors, "descriptors leaked"
    assert threading.active_count() <= threads, "threads leaked"
