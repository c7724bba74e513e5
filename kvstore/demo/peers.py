"""The demo's side of a replica: start its process, send it a request as one line of JSON, read the answer."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvstore.errors import SetupError, Unavailable
from kvstore.seams import Process, Spawner

LINE_BYTES_MAX = 16 << 20


@dataclass(frozen=True, slots=True)
class Answer:
    """What a replica computed for one prompt."""

    tokens: list[int]  # greedy
    logits: NDArray[np.float32]  # [new token, vocabulary]
    prompt_tokens: int
    matched_tokens: int
    loaded_tokens: int
    tokens_by_tier: dict[str, int]
    match_s: float
    load_s: float
    compute_s: float
    store_s: float
    put_states: dict[str, int]
    stored: dict[str, str] = field(default_factory=dict)  # key -> digest of the raw bytes given to the client
    loaded: dict[str, str] = field(default_factory=dict)  # key -> digest of the raw bytes it gave back
    commits: list[list[Any]] = field(default_factory=list)

    @property
    def prefill_s(self) -> float:
        """From the prompt to its logits. Storing comes after and is not part of it."""
        return self.match_s + self.load_s + self.compute_s


class Replica:
    """One inference process. One request at a time."""

    def __init__(self, name: str, process: Process, log: Path) -> None:
        self.name = name
        self.process = process
        self.log = log
        self.spec_json = ""
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self.connected = asyncio.Event()

    def attach(self, hello: dict[str, Any], reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.spec_json = hello["spec"]
        self._reader, self._writer = reader, writer
        self.connected.set()

    async def call(self, op: str, timeout_s: float, **arguments: Any) -> dict[str, Any]:
        """One request, one reply. Unavailable where the process died or did not answer in time."""
        assert self._reader is not None and self._writer is not None, "attached before"
        try:
            async with asyncio.timeout(timeout_s):
                self._writer.write(json.dumps({"op": op, **arguments}).encode() + b"\n")
                await self._writer.drain()
                line = await self._reader.readline()
        except (OSError, TimeoutError) as error:
            raise Unavailable(f"replica {self.name} did not answer {op!r}: {error or 'no answer in time'}") from error
        if not line:
            raise Unavailable(f"replica {self.name} ended: {self.last_words()}")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise Unavailable(f"replica {self.name}: {reply['error']}")
        return reply

    async def answer(self, ids: Sequence[int], mode: str, new: int, after: Sequence[Sequence[Any]] = ()) -> Answer:
        """`mode`: cached, plain (no client), zeroed (blocks loaded and then zeroed)."""
        reply = await self.call("answer", 120.0, ids=list(ids), mode=mode, new=new, after=list(after))
        raw = np.frombuffer(base64.b64decode(reply.pop("logits")), np.float32)
        return Answer(logits=raw.reshape(new, -1), **reply)

    def last_words(self) -> str:
        """The last line of its log."""
        lines = self.log.read_text(errors="replace").strip().splitlines() if self.log.exists() else []
        return lines[-1] if lines else "no output"

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self.process.terminate(5.0)


class Replicas:
    """Both processes and the Unix socket they call back on."""

    def __init__(self, folder: Path, spawner: Spawner, threads: int) -> None:
        self._folder = folder
        self._spawner = spawner
        self._threads = threads
        self._server: asyncio.Server | None = None
        self.named: dict[str, Replica] = {}

    async def start(self, names: Sequence[str], extra: Sequence[str] = ()) -> None:
        """Spawn; does not wait until they are ready."""
        path = str(self._folder / "replicas.sock")
        self._server = await asyncio.start_unix_server(self._accept, path, limit=LINE_BYTES_MAX)
        environment = {**os.environ, "OMP_NUM_THREADS": str(self._threads), "MKL_NUM_THREADS": str(self._threads)}
        for name in names:
            log = self._folder / f"replica-{name}.log"
            argv = [sys.executable, "-m", "kvstore.demo.replica", "--name", name, "--socket", path]
            argv += ["--threads", str(self._threads), *extra]
            self.named[name] = Replica(name, self._spawner.spawn(argv, env=environment, log=str(log)), log)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        hello = json.loads(await reader.readline() or b"{}")
        replica = self.named.get(hello.get("name", ""))
        if replica is None:
            writer.close()
            return
        replica.attach(hello, reader, writer)

    async def ready(self, timeout_s: float) -> None:
        """Wait until both have built their model. SetupError with the last line of the log where one has not."""
        try:
            async with asyncio.timeout(timeout_s):
                for replica in self.named.values():
                    while not replica.connected.is_set():
                        if not replica.process.alive():
                            raise SetupError(f"replica {replica.name} could not start: {replica.last_words()}")
                        await asyncio.wait([asyncio.ensure_future(replica.connected.wait())], timeout=0.1)
        except TimeoutError:
            raise SetupError(f"the replicas were not ready within {timeout_s:.0f} s: free the processor") from None

    async def close(self) -> None:
        """End both processes; idempotent."""
        for replica in self.named.values():
            replica.close()
        if self._server is not None:
            self._server.close()
            self._server = None
