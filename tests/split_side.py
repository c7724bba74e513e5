"""One host of two: a coordinator, workers, clients under load, looks from there. Of `tests.split_hosts.Side`.

`python -m tests.split_side JSON`, with the address to listen at, a folder, the token file, and the coordinators there
are already.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections import Counter
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from kvstore.auth import client_credentials
from kvstore.client.kv_client import KVClient
from kvstore.config import Config, override
from kvstore.fleet.local_cluster import LocalCluster
from kvstore.machine.system import real_system
from kvstore.transport.rpc import GrpcTransport
from tests.fault_checks import COPIES, SETTINGS, Checks
from tests.fault_load import PAYLOAD, SPEC, Load, client_config, trace

WORKERS = 2
PROMPTS = 12


class Side:
    """Commands are its methods: keywords in, something for JSON out."""

    def __init__(self, about: dict[str, Any], stack: AsyncExitStack) -> None:
        self._about, self._stack = about, stack
        self.prompts = trace(1, PROMPTS)
        self._system = real_system(2)
        stack.callback(self._system.pool.close)
        self._transport = GrpcTransport(self._system.clock)
        self._known: list[str] = about["coordinators"]  # coordinators
        self._load: Load | None = None
        self._clients: list[KVClient] = []
        self._loading = AsyncExitStack()
        self._held: list[int] = []  # first blocks of each prompt that this host had when it was cut off
        self._marks: list[float] = []

    async def start(self) -> dict[str, Any]:
        """Its servers are up."""
        namespaces = Path(self._about["folder"]) / "namespaces.toml"
        namespaces.write_text(f"[namespaces.default]\ncopies = {COPIES}\n")
        sections: dict[str, dict[str, Any]] = {}
        for key, value in SETTINGS.items():
            section, name = key.split(".")
            sections.setdefault(section, {})[name] = value
        sections["server"] |= {
            "bind": f"{self._about['address']}:0",
            "token_file": self._about["token_file"],
            "namespaces_file": str(namespaces),
            "coordinators": self._known,
        }
        self._cluster = LocalCluster(override(Config(), sections), workers=WORKERS, redis=False)
        await self._stack.enter_async_context(self._cluster)
        mine = [server.address for server in self._cluster.coordinators]
        self._known = [*self._known, *mine]
        config = replace(client_config(self._known), token_file=self._about["token_file"])
        self._config = config
        self._checks = Checks(self._transport, self.prompts, client_credentials(config))
        return {"coordinators": mine, "workers": {s.ready["id"]: s.address for s in self._cluster.workers}}

    async def _client(self, stack: AsyncExitStack, *, far: bool = False) -> KVClient:
        system = replace(self._system, host="elsewhere") if far else self._system
        client = await KVClient.connect(self._config, system, self._transport)
        stack.push_async_callback(client.close)
        return client

    async def fill(self, part: int) -> dict[str, Any]:
        """Put every other pair of prompts."""
        async with AsyncExitStack() as stack:
            client = await self._client(stack)
            for number, prompt in enumerate(self.prompts):
                if number // 2 % 2 == part:
                    put = await client.put(SPEC, prompt, [PAYLOAD.make(key) for key in prompt.keys])
                    assert set(put.states) <= {"committed", "held"}, put
        return {}

    async def standing(self, coordinators: list[str], wanted: int) -> dict[str, Any]:
        await self._checks.until(lambda: self._checks.standing(coordinators, wanted), "all know each other")
        return {}

    async def settle(self, workers: dict[str, str], coordinators: list[str]) -> dict[str, Any]:
        await self._checks.until(lambda: self._checks.as_before(workers, coordinators), "everything is as before")
        return {}

    async def load(self) -> dict[str, Any]:
        """Clients ask from now on, one beside the workers and one that reaches them by network only."""
        keys = set[bytes]()
        for server in self._cluster.workers:
            keys |= await self._checks.held(server.address)
        for prompt in self.prompts:
            missing = [depth for depth, key in enumerate(prompt.keys) if key not in keys]
            self._held.append(missing[0] if missing else len(prompt))
        clients = [await self._client(self._loading, far=far) for far in (False, True)]
        self._clients = clients
        self._load = await self._loading.enter_async_context(Load(clients, self.prompts))
        while len(self._load.moments) < 10:
            await asyncio.sleep(0.001)
        return {}

    async def mark(self) -> dict[str, Any]:
        """This is a moment that counts; requests on their way now, at least one."""
        assert self._load is not None
        while not self._load.flying():
            await asyncio.sleep(0.001)
        self._marks.append(asyncio.get_running_loop().time())
        return {"flying": self._load.flying()}

    async def apart(self, workers: list[str]) -> dict[str, Any]:
        """The cut has come about: this host's coordinator knows these workers, its own, and no others."""

        async def complaint() -> str:
            _, known = await self._checks.members(self._cluster.coordinators[0].address)
            return "" if known == dict.fromkeys(workers, "alive") else f"{known}"

        await self._checks.until(complaint, "the hosts are apart")
        return {}

    async def finish(self) -> dict[str, Any]:
        """The load ends; what it saw between the two marks."""
        assert self._load is not None
        begin, end = self._marks
        counted = sum((Counter(client.counters) for client in self._clients), Counter[str]())
        await self._loading.aclose()
        asked, got = self._load.since_of(begin, end, self._held)
        requests, all_asked, all_got = self._load.since(begin, end)
        return {
            "trouble": dict(self._load.trouble),
            "requests": requests,
            "asked_of_own": asked,
            "got_of_own": got,
            "asked": all_asked,
            "got": all_got,
            "counted": counted,
        }


async def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    async with AsyncExitStack() as stack:
        side = Side(json.loads(sys.argv[1]), stack)
        while line := await asyncio.to_thread(sys.stdin.readline):
            command = json.loads(line)
            answer = await getattr(side, command.pop("do"))(**command)
            print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    asyncio.run(main())
