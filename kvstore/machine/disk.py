"""The real `Disk`: one folder, O_DIRECT where the file system takes it."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import stat
from collections.abc import Callable, Sequence
from contextlib import suppress

from kvstore.errors import SetupError
from kvstore.types import Buffer

ALIGNMENT = 4096
"""Offsets, lengths and addresses of direct I/O are multiples of this (covers 512 and 4096 byte sectors)."""

IOV_MAX = 1024
"""Parts the kernel takes in one pwritev; a longer call comes back short, as a short write does."""


class FolderFile:
    """An open file of a `FolderDisk`. Blocking calls; OSError as the kernel reports it."""

    def __init__(self, fd: int, direct: bool) -> None:
        self._fd: int | None = fd
        self.direct = direct

    def fileno(self) -> int:
        if self._fd is None:
            raise OSError(errno.EBADF, "file is closed")
        return self._fd

    def pread_into(self, offset: int, target: memoryview) -> int:
        return self.preadv_into(offset, [target])

    def preadv_into(self, offset: int, targets: Sequence[memoryview]) -> int:
        done, rest = 0, [target for target in targets[:IOV_MAX] if len(target)]
        while rest:
            got = os.preadv(self.fileno(), rest, offset + done)
            done += got
            if got == 0 or (self.direct and got % ALIGNMENT):  # unaligned: a direct read reached the end of the file
                break
            while rest and got >= len(rest[0]):
                got -= len(rest.pop(0))
            if got:
                rest[0] = rest[0][got:]
        return done

    def pwritev(self, offset: int, parts: Sequence[Buffer]) -> int:
        return os.pwritev(self.fileno(), list(parts[:IOV_MAX]), offset)

    def sync(self) -> None:
        os.fdatasync(self.fileno())

    def truncate(self, size: int) -> None:
        os.ftruncate(self.fileno(), size)

    def size(self) -> int:
        return os.fstat(self.fileno()).st_size

    def close(self) -> None:
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)


class FolderDisk:
    """One folder, made when missing (its parent must exist), private to this user. SetupError when unusable."""

    def __init__(self, folder: str) -> None:
        self.folder = os.path.abspath(folder)
        try:
            os.mkdir(self.folder, 0o700)
        except FileExistsError:
            pass
        except FileNotFoundError as error:
            raise SetupError(f"folder {folder}: its parent does not exist; create it or name another folder") from error
        except OSError as error:
            raise SetupError(f"folder {folder} cannot be made ({error.strerror}); name a writable one") from error
        if not stat.S_ISDIR(os.stat(self.folder).st_mode):
            raise SetupError(f"{folder} is not a folder; name a folder")
        self._locks: dict[str, int] = {}
        self.direct = self._probe()

    def _path(self, name: str) -> str:
        if not name or name in (".", "..") or "/" in name or "\0" in name:
            raise ValueError(f"{name!r} is not a plain file name")
        return os.path.join(self.folder, name)

    def _probe(self) -> bool:
        """A real aligned write and read through O_DIRECT; False where the file system refuses it."""
        path = os.path.join(self.folder, f".probe-{os.getpid()}")
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        try:
            plain = os.open(path, flags, 0o600)  # noqa: TID251 - the real disk
            os.close(plain)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                return False  # a full disk is a state of the tier, not of the set-up
            raise SetupError(f"folder {self.folder} is not writable ({error.strerror}); name a writable one") from error
        try:
            fd = os.open(path, flags | os.O_DIRECT, 0o600)  # noqa: TID251 - the real disk
        except OSError:
            fd = -1
        try:
            return fd >= 0 and self._direct_works(fd)
        finally:
            if fd >= 0:
                os.close(fd)
            with suppress(FileNotFoundError):
                os.unlink(path)

    @staticmethod
    def _direct_works(fd: int) -> bool:
        page = mmap.mmap(-1, 2 * ALIGNMENT)  # anonymous maps are page aligned
        with memoryview(page) as view:
            view[:ALIGNMENT] = b"\xa5" * ALIGNMENT
            try:
                works = (
                    os.pwritev(fd, [view[:ALIGNMENT]], 0) == ALIGNMENT
                    and os.preadv(fd, [view[ALIGNMENT:]], 0) == ALIGNMENT
                    and view[:ALIGNMENT] == view[ALIGNMENT:]
                )
            except OSError:
                works = False
        page.close()
        return works

    def open(self, name: str, *, create: bool = False, direct: bool = False) -> FolderFile:
        path, direct = self._path(name), direct and self.direct
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_DIRECT if direct else 0)
        made = create and not os.path.exists(path)
        fd = os.open(path, flags | (os.O_CREAT if create else 0), 0o600)  # noqa: TID251 - the real disk
        if made:
            self._sync_folder()
        return FolderFile(fd, direct)

    def names(self) -> list[str]:
        """Plain files only, sorted."""
        with os.scandir(self.folder) as entries:
            return sorted(entry.name for entry in entries if entry.is_file(follow_symlinks=False))

    def remove(self, name: str) -> None:
        """Gone for good when it returns, also after a power loss."""
        os.unlink(self._path(name))
        self._sync_folder()

    def replace(self, name: str, content: bytes) -> None:
        path = self._path(name)
        aside = f"{path}.new"  # what a crash leaves is overwritten by the next one
        try:
            fd = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)  # noqa: TID251 - the real disk
            try:
                view = memoryview(content)
                while view:
                    view = view[os.write(fd, view) :]
                os.fsync(fd)
            finally:
                os.close(fd)
            os.replace(aside, path)  # noqa: TID251 - the real disk
        except OSError:
            with suppress(FileNotFoundError):
                os.unlink(aside)
            raise
        self._sync_folder()

    def read(self, name: str) -> bytes | None:
        try:
            with open(self._path(name), "rb") as file:
                return file.read()
        except FileNotFoundError:
            return None

    def lock(self, name: str) -> Callable[[], None] | None:
        if name in self._locks:
            return None
        fd = os.open(self._path(name), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)  # noqa: TID251 - the real disk
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return None
        self._locks[name] = fd

        def unlock() -> None:
            if self._locks.pop(name, None) is not None:
                os.close(fd)

        return unlock

    def free_bytes(self) -> int:
        found = os.statvfs(self.folder)
        return found.f_bavail * found.f_frsize

    def _sync_folder(self) -> None:
        fd = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)  # noqa: TID251 - the real disk
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
