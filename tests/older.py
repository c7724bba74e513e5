"""A process of the version before: it knows neither fields, calls nor capabilities that have come since.

`golden/version_1a.json` lists what it does know, kept for ever. Its transport loses the rest in both directions, as its
own protobuf would.
"""

from __future__ import annotations

import inspect
import json
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

from google.protobuf.message import Message

from kvstore.transport.methods import SERVICES

KNOWN = json.loads((Path(__file__).parent / "golden" / "version_1a.json").read_text())


def older(message: Any, lost: Counter[str]) -> Any:
    """The message without what that version does not know. Mutates it; `lost` counts what it lost. Frames pass."""
    if not isinstance(message, Message):
        return message
    name = message.DESCRIPTOR.name
    known = KNOWN["fields"].get(name, [])
    for field, value in message.ListFields():
        if field.name not in known:
            lost[f"{name}.{field.name}"] += 1
            message.ClearField(field.name)
        elif field.name == "capabilities":
            kept = [one for one in value if one in KNOWN["capabilities"]]
            lost["capabilities"] += len(value) - len(kept)
            value[:] = kept
        elif field.message_type is not None and not field.message_type.GetOptions().map_entry:
            for one in (value,) if isinstance(value, Message) else value:
                older(one, lost)
    return message


async def each(stream: AsyncIterator[Any], lost: Counter[str]) -> AsyncIterator[Any]:
    async for message in stream:
        yield older(message, lost)


class OlderService:
    """A service as that version has it."""

    def __init__(self, service: object, name: str, lost: Counter[str]) -> None:
        for method in SERVICES[name].values():
            if method.name in KNOWN["methods"]:
                setattr(self, method.attribute, self._wrapped(getattr(service, method.attribute), method, lost))

    @staticmethod
    def _wrapped(call: Any, method: Any, lost: Counter[str]) -> Any:
        def asked(request: Any) -> Any:
            return each(request, lost) if method.client_stream else older(request, lost)

        if inspect.isasyncgenfunction(call):

            async def streamed(request: Any, context: Any) -> Any:
                replies = call(asked(request), context)
                try:
                    async for reply in replies:
                        yield older(reply, lost)
                finally:
                    await replies.aclose()

            return streamed

        async def answered(request: Any, context: Any) -> Any:
            return older(await call(asked(request), context), lost)

        return answered


class OlderTransport:
    """A real transport, of a process of that version."""

    def __init__(self, real: Any) -> None:
        self._real = real
        self.lost: Counter[str] = Counter()

    async def serve(self, address: str, services: Mapping[str, object], auth: Any) -> Any:
        mine = {name: OlderService(service, name, self.lost) for name, service in services.items()}
        return await self._real.serve(address, mine, auth)

    async def serve_local(self, path: str, service: object, auth: Any) -> Any:
        return await self._real.serve_local(path, OlderService(service, "WorkerLocal", self.lost), auth)

    async def connect(self, address: str, credentials: Any) -> Any:
        channel, lost = await self._real.connect(address, credentials), self.lost

        class Channel:
            async def unary(self, method: Any, request: Any, *, timeout_s: float) -> Any:
                return older(await channel.unary(method, older(request, lost), timeout_s=timeout_s), lost)

            async def stream(self, method: Any, requests: Any, *, timeout_s: float | None) -> Any:
                replies = channel.stream(method, each(requests, lost), timeout_s=timeout_s)
                try:
                    async for reply in replies:
                        yield older(reply, lost)
                finally:
                    await replies.aclose()

            async def close(self) -> None:
                await channel.close()

        return Channel()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)
