"""Clients in processes that were forked from one with a client, or spawned: each makes its own, reads every byte."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from kvstore.client.kv_client import KVClient
from kvstore.errors import BadRequest
from tests.service_cluster import MiniCluster
from tests.service_helpers import FULL, prompt


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[MiniCluster]:
    async with MiniCluster(tmp_path) as made:
        await made.coordinator()
        await made.worker("a")
        yield made


async def run(cluster: MiniCluster, how: str, coordinator: str) -> tuple[int | None, str]:
    """(exit status, what it said) of tests/forked_reader.py."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.forked_reader",
        how,
        coordinator,
        cluster.workers[0].socket,
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},  # newer Pythons warn of a fork beside threads: that is the test
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    async with asyncio.timeout(60):
        said, _ = await process.communicate()
    return process.returncode, said.decode()


async def test_a_forked_process_makes_a_client_of_its_own(cluster: MiniCluster) -> None:
    assert await run(cluster, "fork", "-") == (0, "")


async def test_after_a_fork_of_a_process_with_grpc_the_host_s_hits_go_on(cluster: MiniCluster) -> None:
    """gRPC itself does not live through it: a miss there, never a wait."""
    status, said = await run(cluster, "fork", cluster.addresses[0])
    assert status == 0, said


async def test_spawned_processes_have_clients(cluster: MiniCluster) -> None:
    status, said = await run(cluster, "spawn", cluster.addresses[0])
    assert status == 0, said


async def test_a_client_made_before_a_fork_says_so(cluster: MiniCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    client: KVClient = await cluster.client()
    here = os.getpid()
    with monkeypatch.context() as forked:
        forked.setattr(os, "getpid", lambda: here + 1)
        for call in (client.match(FULL, prompt(1, 2)), client.put(FULL, prompt(1, 2), [])):
            with pytest.raises(BadRequest, match="fork"):
                await call
    assert (await client.match(FULL, prompt(1, 2))).blocks == 0
