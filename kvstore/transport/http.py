"""A small HTTP server of a process's own figures: `/metrics`, `/healthz`, `/readyz`. GET only, an answer a connection.

Beyond loopback `/metrics` wants an identity of role node (`Authorization: Bearer`), like any call; health wants none.
With TLS the port answers nothing in plain text, and where callers must show a certificate, `/metrics` wants that too.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from kvstore.auth import Authenticator, is_loopback
from kvstore.errors import KVStoreError, SetupError
from kvstore.operations.metrics import CONTENT_TYPE
from kvstore.transport.base import Credentials
from kvstore.transport.methods import COORDINATOR
from kvstore.transport.tls import Files, http_context

REQUEST_BYTES_MAX = 8192
REQUEST_S = 5.0
CONNECTIONS_MAX = 32
"""At a time; beyond it a connection is closed at once."""

REASONS = {200: "OK", 400: "Bad Request", 401: "Unauthorized", 404: "Not Found", 503: "Service Unavailable"}


class MetricsServer:
    """`kvstore.transport.base.Server` for figures. `page`: the text of /metrics; `ready`: what /readyz says."""

    def __init__(self, page: Callable[[], str], ready: Callable[[], bool], auth: Authenticator) -> None:
        self.address = ""
        self._page, self._ready, self._auth = page, ready, auth
        self._open = True  # to everybody
        self._certified = False  # /metrics is for those who show a certificate
        self._server: asyncio.Server | None = None
        self._connections: dict[asyncio.Task[None], None] = {}

    async def start(self, address: str, tls: Files | None = None) -> MetricsServer:
        """Listening when it returns. SetupError."""
        self._certified = tls is not None and bool(tls.authority)
        context = http_context(tls) if tls is not None else None
        host, _, port = address.rpartition(":")
        if not host or not port.isdigit():
            raise SetupError(f"cannot listen on {address}: write it as HOST:PORT")
        try:
            self._server = await asyncio.start_server(
                self._connected, host.strip("[]"), int(port), limit=REQUEST_BYTES_MAX, ssl=context
            )
        except OSError as error:
            raise SetupError(
                f"cannot listen on {address}: {error.strerror}: choose another server.metrics_bind"
            ) from None
        self._open = is_loopback(address)
        self.address = f"{host}:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def close(self, grace_s: float) -> None:
        """Answers are short: they end at once. Idempotent."""
        server, self._server = self._server, None
        if server is not None:
            server.close()
        tasks = list(self._connections)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=grace_s)

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._connections) >= CONNECTIONS_MAX:
            writer.close()
            return
        task = asyncio.ensure_future(self._serve(reader, writer))
        self._connections[task] = None
        task.add_done_callback(lambda done: self._connections.pop(done, None))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(REQUEST_S):
                try:
                    head = await reader.readuntil(b"\r\n\r\n")
                    shown = bool(writer.get_extra_info("peercert"))
                    status, body = self._answer(head.decode("latin-1"), shown)
                except (asyncio.IncompleteReadError, asyncio.LimitOverrunError):
                    status, body = 400, "send one short GET\n"
                writer.write(_response(status, body))
                await writer.drain()
        except (TimeoutError, OSError):  # of TLS too
            return  # whoever asked is gone, or too slow
        finally:
            writer.close()

    def _answer(self, head: str, certified: bool) -> tuple[int, str]:
        first, *lines = head.split("\r\n")
        parts = first.split(" ")
        if len(parts) != 3 or parts[0] != "GET":
            return 400, "only GET is served\n"
        headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        path = parts[1].partition("?")[0]
        if path == "/healthz":
            return 200, "alive\n"
        if path == "/readyz":
            return (200, "ready\n") if self._ready() else (503, "not ready\n")
        if path != "/metrics":
            return 404, "there are /metrics, /healthz and /readyz\n"
        if self._certified and not certified:
            return 401, "a certificate is needed\n"
        if not self._open and not self._granted(headers.get("authorization", "")):
            return 401, "a bearer token of role node is needed\n"
        return 200, self._page()

    def _granted(self, header: str) -> bool:
        namespace = next(iter(self._auth.policy.namespaces))
        shown = Credentials(namespace, header.removeprefix("Bearer ").strip())
        try:
            return self._auth.authenticate(shown, peer="", method=COORDINATOR["Status"]).role == "node"
        except KVStoreError:
            return False


def _response(status: int, body: str) -> bytes:
    content = body.encode()
    head = f"HTTP/1.1 {status} {REASONS[status]}\r\nContent-Type: {CONTENT_TYPE}\r\nContent-Length: {len(content)}\r\n"
    return head.encode() + b"Connection: close\r\n\r\n" + content
