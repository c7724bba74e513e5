"""The local socket: calls to the worker on this host that pass memory. docs/PROTOCOL.md has its bytes.

`local_frames` (pure) knows the bytes, `local_link` moves them and descriptors, `local_server` and `local_client`
are its two ends.
"""

from __future__ import annotations

import asyncio
import socket  # noqa: TID251 - the real socket

from kvstore.errors import Unavailable
from kvstore.transport.base import Authenticator, Credentials
from kvstore.transport.local_client import LocalClient
from kvstore.transport.local_frames import LocalLimits
from kvstore.transport.local_server import LocalServer

__all__ = ["LocalLimits", "connect", "serve"]


async def connect(path: str, credentials: Credentials, limits: LocalLimits) -> LocalClient:
    """Connected and greeted, or Unavailable, Unauthenticated, NotGranted, Incompatible."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        async with asyncio.timeout(limits.connect_timeout_s):
            await asyncio.get_running_loop().sock_connect(sock, path)
    except OSError as error:  # TimeoutError is one too
        sock.close()
        raise Unavailable(f"no worker answers on {path}: {error.strerror or 'timed out'}") from None
    except asyncio.CancelledError:
        sock.close()
        raise
    client = LocalClient(sock, path, limits)
    try:
        await client.greet(credentials)
    except BaseException:
        await client.close()
        raise
    return client


async def serve(path: str, service: object, auth: Authenticator, limits: LocalLimits) -> LocalServer:
    """Listening when it returns. SetupError when the path can't be bound or a live server has it."""
    return LocalServer(path, service, auth, limits)
