"""One inference replica: a process with a language model and a `KVClient`, asked over a Unix socket in lines of JSON.

    python -m kvstore.demo.replica --name A --socket PATH --threads 2

It builds its model, connects to PATH, says hello, then answers: `connect`, `answer`, `warm`, `counters`.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import torch

from kvstore.client.kv_client import KVClient
from kvstore.config import ClientConfig
from kvstore.demo.model import TINY, Size, demo_spec, make_model
from kvstore.demo.peers import LINE_BYTES_MAX
from kvstore.demo.watch import Watched, Zeroed
from kvstore.integrations.transformers import BlockClient, Prefilled, prefill
from kvstore.types import CommitToken

MODES = ("cached", "plain", "zeroed")

log = logging.getLogger("kvstore.demo.replica")


class Server:
    """One model, at most one client, one request at a time."""

    def __init__(self, size: Size, threads: int) -> None:
        torch.set_num_threads(threads)
        self.model = make_model(size)
        self.spec = demo_spec(self.model, threads)
        self.client: KVClient | None = None
        self._operations: dict[str, Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]] = {
            "connect": self._connect,
            "warm": self._warm,
            "counters": self._counters,
            "answer": self._answer,
        }

    async def handle(self, request: dict[str, Any]) -> dict[str, Any]:
        """The reply to one request: whatever went wrong becomes its `error`, the process goes on."""
        try:
            return await self._operations[request.pop("op")](request)
        except Exception as error:
            log.exception("a request failed")
            return {"error": f"{type(error).__name__}: {error}"}

    async def close(self) -> None:
        if self.client is not None:
            await self.client.close()

    async def _connect(self, request: dict[str, Any]) -> dict[str, Any]:
        given: dict[str, Any] = request["config"]
        values: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in given.items()}
        self.client = await KVClient.connect(ClientConfig(**values))
        return {}

    async def _warm(self, request: dict[str, Any]) -> dict[str, Any]:
        """A prefill without a client, so that the first timed one finds its memory mapped."""
        ids = torch.arange(request["tokens"])[None] % 256
        await prefill(self.model, ids, None, spec=self.spec)
        return {}

    async def _counters(self, request: dict[str, Any]) -> dict[str, Any]:
        """What the client counted: hits by tier, misses, errors."""
        return dict(sorted(self.client.counters.items())) if self.client is not None else {}

    async def _answer(self, request: dict[str, Any]) -> dict[str, Any]:
        watched = Watched(self.client) if self.client is not None and request["mode"] != "plain" else None
        client: BlockClient | None = Zeroed(watched) if watched and request["mode"] == "zeroed" else watched
        after = [CommitToken(*token) for token in request["after"]]
        made = await prefill(self.model, torch.tensor([request["ids"]]), client, spec=self.spec, after=after)
        tokens, logits = await asyncio.to_thread(greedy, self.model, made, request["new"])
        stats = made.stats
        return {
            "tokens": tokens,
            "logits": base64.b64encode(logits.numpy().tobytes()).decode(),
            "prompt_tokens": stats.prompt_tokens,
            "matched_tokens": stats.matched_tokens,
            "loaded_tokens": stats.loaded_tokens,
            "tokens_by_tier": {tier.name.lower(): count for tier, count in stats.tokens_by_tier.items()},
            "match_s": stats.match_s,
            "load_s": stats.load_s,
            "compute_s": stats.compute_s,
            "store_s": stats.store_s,
            "put_states": stats.put_states,
            "stored": watched.stored() if watched else {},
            "loaded": watched.loaded() if watched else {},
            "commits": [[token.worker, token.epoch, token.seq] for token in stats.commits],
        }


def greedy(model: Any, made: Prefilled, new: int) -> tuple[list[int], torch.Tensor]:
    """`new` greedy tokens after a prefill and the logits each was chosen from, [new, vocabulary]. Grows the cache."""
    logits = made.logits
    tokens, rows = [], []
    with torch.no_grad():
        for index in range(new):
            rows.append(logits[0])
            tokens.append(int(logits[0].argmax()))
            if index + 1 < new:
                step = torch.tensor([[tokens[-1]]])
                logits = model(step, past_key_values=made.past_key_values, use_cache=True).logits[:, -1]
    return tokens, torch.stack(rows)


async def serve(server: Server, name: str, socket: str) -> None:
    """Answer until the demo hangs up."""
    reader, writer = await asyncio.open_unix_connection(socket, limit=LINE_BYTES_MAX)
    try:
        writer.write(json.dumps({"name": name, "spec": server.spec.canonical_json()}).encode() + b"\n")
        while line := await reader.readline():
            reply = await server.handle(json.loads(line))
            writer.write(json.dumps(reply).encode() + b"\n")
            await writer.drain()
    finally:
        writer.close()
        await server.close()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m kvstore.demo.replica")
    parser.add_argument("--name", required=True)
    parser.add_argument("--socket", required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    asyncio.run(serve(Server(TINY if options.tiny else Size(), options.threads), options.name, options.socket))


if __name__ == "__main__":
    main()
