"""The real `Memory`: memfd segments, faulted in at once, sealed before anybody else can see them."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import sys
from contextlib import suppress

import numpy as np

from kvstore.errors import SetupError

F_SEAL_FUTURE_WRITE = 0x10  # linux/fcntl.h; Python names it from 3.13 on
MADV_POPULATE_WRITE = 23  # linux 5.14
PAGE = mmap.PAGESIZE


class MemfdSegment:
    """Shared memory of this process. `fd` may be passed to a peer at any time: it is sealed already."""

    def __init__(self, fd: int, mapping: mmap.mmap, nbytes: int) -> None:
        self.fd: int | None = fd
        self.nbytes = nbytes
        self.view = memoryview(mapping)[:nbytes]
        self._mapping: mmap.mmap | None = mapping

    def close(self) -> None:
        """Close the descriptor and unmap; while somebody still holds a view, the mapping lives as long as that view."""
        fd, self.fd = self.fd, None
        if fd is not None:
            os.close(fd)
        mapping, self._mapping = self._mapping, None
        if mapping is not None:
            with suppress(BufferError):
                self.view.release()
            with suppress(BufferError):
                mapping.close()


class MemfdMemory:
    """Maker of segments. SetupError when the kernel has no memory to give."""

    def segment(self, name: str, nbytes: int, *, sealed_writes: bool) -> MemfdSegment:
        if nbytes <= 0:
            raise ValueError(f"a segment of {nbytes} bytes")
        size = -(-nbytes // PAGE) * PAGE
        fd = os.memfd_create(name[:200], os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, size)
            mapping = mmap.mmap(fd, size)
            with suppress(OSError):  # advice only: kernels without huge shared pages say EINVAL
                mapping.madvise(mmap.MADV_HUGEPAGE)
            _fault_in(mapping, size)
            _seal(fd, sealed_writes)
        except (OSError, MemoryError) as error:
            os.close(fd)
            reason = getattr(error, "strerror", None) or str(error)
            raise SetupError(f"no {nbytes >> 20} MiB of shared memory ({reason}); lower host_bytes") from error
        return MemfdSegment(fd, mapping, nbytes)


def _fault_in(mapping: mmap.mmap, size: int) -> None:
    """Touch every page now: a first touch later runs at a tenth of the speed, or dies of SIGBUS when memory is out.

    Through ctypes, because mmap.madvise keeps the interpreter lock for as long as the kernel clears pages.
    """
    pages = np.frombuffer(mapping, dtype=np.uint8)
    libc = ctypes.CDLL(None, use_errno=True)
    done = libc.madvise(ctypes.c_void_p(pages.ctypes.data), ctypes.c_size_t(size), MADV_POPULATE_WRITE)
    if done != 0:
        code = ctypes.get_errno()
        if code in (12, 14):  # ENOMEM, EFAULT: no memory behind the mapping
            raise OSError(code, os.strerror(code))
        pages[::PAGE] = 0  # kernels before 5.14


def _seal(fd: int, writes: bool) -> None:
    seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
    if writes:
        try:
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals | F_SEAL_FUTURE_WRITE)
        except OSError as error:  # before Linux 5.1: say so, never pass an unsealed segment
            raise SetupError(
                f"this kernel cannot seal shared memory against writing ({sys.platform}); use Linux 5.1+"
            ) from error
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals | fcntl.F_SEAL_SEAL)
