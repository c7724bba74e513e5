"""How a process is put together from its configuration: the real transport, an allocator fit for large messages,
and a collector that leaves alone what stays."""

from __future__ import annotations

import ctypes
import gc

from kvstore.config import Config
from kvstore.seams import System
from kvstore.transport.rpc import GrpcTransport
from kvstore.transport.tls import server_tls

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
MALLOC_BYTES = 256 << 20


def server_transport(config: Config, system: System) -> GrpcTransport:
    """The transport of a server with the bounds of its configuration. SetupError for TLS files that don't fit."""
    return GrpcTransport(
        system.clock,
        message_bytes_max=config.server.message_bytes_max,
        calls_max=config.server.calls_max,
        local_connections_max=config.server.local_connections_max,
        connect_timeout_s=config.client.connect_timeout_s,
        tls=server_tls(config),
    )


def tune_malloc() -> None:
    """Large buffers come from the heap and stay there: mapping each message anew costs a page fault per 4 KiB."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # glibc
        libc.mallopt(M_MMAP_THRESHOLD, MALLOC_BYTES)
        libc.mallopt(M_TRIM_THRESHOLD, MALLOC_BYTES)


def settle() -> None:
    """Call it once a server has started: what it consists of is never looked at by the garbage collector again. A whole
    collection otherwise goes over 130,000 objects of imported modules, 40 ms and more in which nobody is answered."""
    gc.collect()
    gc.freeze()
