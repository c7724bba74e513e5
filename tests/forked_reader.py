"""Clients in forked and spawned processes. `python -m tests.forked_reader fork|spawn COORDINATOR SOCKET`.

Exit status 0: every process read what was put, and a client made before the fork said that it is of no use.
"""

from __future__ import annotations

import multiprocessing
import os
import sys

import numpy as np

from kvstore.client.engine_face import EngineClient
from kvstore.client.kv_client import GetResult
from kvstore.client.plan import HitPlan
from kvstore.config import ClientConfig
from kvstore.errors import BadRequest
from kvstore.spec import Shard
from tests.service_helpers import FULL, payload, prompt

PREFIX = prompt(77, 6)
WHOLE = Shard.whole(FULL)


def config_of(coordinator: str, socket: str) -> ClientConfig:
    coordinators = (coordinator,) if coordinator != "-" else ()
    return ClientConfig(coordinators=coordinators, workers=(socket,), staging_bytes=1 << 20)


def read(config: ClientConfig) -> int:
    """A client of this process: 0 where it gets every block, byte for byte."""
    with EngineClient(config) as client:
        for _ in range(200):
            ticket = client.submit_match(FULL, PREFIX)
            assert ticket is not None
            found = client.wait(ticket, 10)
            assert found is not None and isinstance(found.value, HitPlan)
            if found.value.blocks == len(PREFIX):
                break
        ticket = client.submit_get(found.value)
        assert ticket is not None
        done = client.wait(ticket, 10)
        assert done is not None and done.error is None
        assert isinstance(done.value, GetResult)
        pairs = zip(done.value.buffers[0], PREFIX.keys, strict=True)
        return 0 if all(np.array_equal(have, payload(FULL, WHOLE, key)) for have, key in pairs) else 3


def fork(config: ClientConfig) -> int:
    """A client, a fork, and both processes go on: the child with one of its own."""
    client = EngineClient(config)
    ticket = client.submit_put(FULL, PREFIX, [payload(FULL, WHOLE, key) for key in PREFIX.keys])
    assert ticket is not None and client.wait(ticket, 10) is not None
    child = os.fork()
    if child == 0:
        status = 4
        try:
            client.submit_match(FULL, PREFIX)
        except BadRequest:
            status = read(config)
        os._exit(status)
    _, status = os.waitpid(child, 0)
    ticket = client.submit_match(FULL, PREFIX)  # the parent's is as it was
    assert ticket is not None
    found = client.wait(ticket, 10)
    client.close()
    assert found is not None and isinstance(found.value, HitPlan)
    return os.waitstatus_to_exitcode(status) or (0 if found.value.blocks == len(PREFIX) else 5)


def spawned(coordinator: str, socket: str) -> None:
    sys.exit(read(config_of(coordinator, socket)))


def spawn(coordinator: str, socket: str) -> int:
    """Processes that inherit nothing, two at a time."""
    with EngineClient(config_of(coordinator, socket)) as client:
        ticket = client.submit_put(FULL, PREFIX, [payload(FULL, WHOLE, key) for key in PREFIX.keys])
        assert ticket is not None and client.wait(ticket, 10) is not None
        context = multiprocessing.get_context("spawn")
        children = [context.Process(target=spawned, args=(coordinator, socket)) for _ in range(2)]
        for child in children:
            child.start()
        for child in children:
            child.join(60)
        return max(child.exitcode if child.exitcode is not None else 6 for child in children)


if __name__ == "__main__":
    how, coordinator_, socket_ = sys.argv[1:]
    sys.exit(spawn(coordinator_, socket_) if how == "spawn" else fork(config_of(coordinator_, socket_)))
