"""Compiled loops (numba) that run without the interpreter lock: made at the first call, kept on disk for later ones.

Importing a module of this package imports numba (over half a second), so callers do it where they first need one.
The compiled code lies where numba puts it: `NUMBA_CACHE_DIR`, else `__pycache__` beside the source, else the user's
cache folder. Where none of them may be written, a folder of the user's own under the temporary one is used: what numba
reads back from it is trusted, so a folder that others could have filled is not.
"""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numba
from numba.core.options import DefaultOptions

F = TypeVar("F", bound=Callable[..., Any])
_STAMP = sum(path.stat().st_mtime_ns for path in Path(__file__).parent.glob("*.py"))


def jit(function: F) -> F:
    """Compile without the interpreter's lock, for the types of the first call. Cached on disk wherever possible."""
    return _compiled(function, {})


def jit_borrowing(function: F) -> F:
    """`jit` for loops that only borrow their arrays: nothing in them is allocated, nor what they call.

    Otherwise numba counts references: an atomic operation whenever an array is passed on or taken out of a tuple of
    arrays. In the directory's `apply` these were two thirds of its time.
    """
    known = hasattr(DefaultOptions, "_nrt")  # private, but there since long before the oldest numba we take
    return _compiled(function, {"_nrt": False} if known else {})


def _compiled(function: F, options: dict[str, bool]) -> F:
    try:
        return _cached(function, options)
    except RuntimeError:  # numba found no folder to write to
        folder = private_folder(Path(tempfile.gettempdir()) / f"kvstore-kernels-{os.getuid()}")
    if folder is not None:
        before, numba.config.CACHE_DIR = numba.config.CACHE_DIR, str(folder)
        try:
            return _cached(function, options)
        except RuntimeError:  # nor there
            folder = None
        finally:
            numba.config.CACHE_DIR = before
    return numba.njit(nogil=True, **options)(function)  # type: ignore[no-any-return]


def _cached(function: F, options: dict[str, bool]) -> F:
    """numba takes compiled code for current when its own file has not changed: the files of what it calls count too."""
    made: F = numba.njit(cache=True, nogil=True, **options)(function)
    kept = made._cache._cache_file  # type: ignore[attr-defined]
    kept._source_stamp = (kept._source_stamp, _STAMP)
    return made


def private_folder(path: Path) -> Path | None:
    """The folder, made where missing; None where it is, or may be, anybody else's."""
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        found = path.lstat()
    except OSError:
        return None
    mine = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077
    return path if mine else None
