"""House rules that no linter knows (docs/ARCHITECTURE.md, "The house")."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILE_LINES_MAX = 400
PARSE_TRIES = 5
FUNCTION_LINES_MAX = 80
PACKAGES = ("kvstore", "workers", "coordinator")
EXCUSED = (
    "kvstore/seams.py",  # the type of the random source
    "kvstore/machine/system.py",
    "kvstore/machine/disk.py",
    "kvstore/machine/memory.py",
    "kvstore/machine/spawn.py",
    "kvstore/fleet/embedded_redis.py",
    "kvstore/bench/baselines.py",
    "kvstore/bench/data_baselines.py",
    "kvstore/transport/",
    "kvstore/cli/",
)
"""Who may touch clock, network and processes directly: the real implementations and the composition root."""


def sources(*folders: str) -> Iterator[tuple[Path, str]]:
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            if not path.name.endswith("_pb2.py"):
                yield path, path.read_text()


def parsed(text: str) -> ast.Module:
    """CPython 3.11 counts the depth of this in one place for all threads (gh-106905 mends it for one): a thread that a
    test before left compiling, and so parsing, upsets it now and then."""
    for _ in range(PARSE_TRIES):
        try:
            return ast.parse(text)
        except SystemError as error:
            if "recursion depth mismatch" not in str(error):
                raise
            upset = error
    raise upset


def test_files_and_functions_stay_readable() -> None:
    long = []
    for path, text in sources("kvstore", "workers", "coordinator", "tests", "examples"):
        if text.count("\n") > FILE_LINES_MAX:
            long.append(f"{path.relative_to(ROOT)}: {text.count(chr(10))} lines")
        for node in ast.walk(parsed(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                if lines > FUNCTION_LINES_MAX:
                    long.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {lines} lines")
    assert long == []


def test_nothing_is_swallowed_and_no_test_sleeps() -> None:
    found = []
    for path, text in sources("kvstore", "workers", "coordinator", "tests", "examples"):
        for node in ast.walk(parsed(text)):
            if isinstance(node, ast.ExceptHandler):
                silent = all(isinstance(b, ast.Pass) for b in node.body)
                if silent and (node.type is None or "Exception" in ast.unparse(node.type)):
                    found.append(f"{path.relative_to(ROOT)}:{node.lineno} swallows every error")
            if (
                isinstance(node, ast.Call)
                and ast.unparse(node.func) == "time.sleep"
                and path.is_relative_to(ROOT / "tests")
            ):
                found.append(f"{path.relative_to(ROOT)}:{node.lineno} sleeps")
    assert found == []


def test_every_module_says_what_it_is() -> None:
    missing = [
        str(path.relative_to(ROOT))
        for path, text in sources("kvstore", "workers", "coordinator")
        if text.strip() and not ast.get_docstring(parsed(text))
    ]
    assert missing == []


REACHING_AROUND = {
    "import time": True,
    "import random": True,
    "import socket": True,
    "import subprocess": True,
    "import grpc": True,
    "import pickle": True,
    "from os import urandom": True,
    "import threading\n\nthreading.Thread()": True,
    "import asyncio": False,
}


@pytest.mark.parametrize("code", sorted(REACHING_AROUND))
def test_the_linter_guards_the_seams(code: str) -> None:
    """What reaches around the ports of kvstore/seams.py is refused anywhere in the three packages."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "ruff",
            "check",
            "--select",
            "TID251",
            "--stdin-filename",
            "kvstore/client/kv_client.py",
            "-",
        ],
        input=f"{code}\n",
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ("TID251" in done.stdout) is REACHING_AROUND[code], done.stdout + done.stderr


def test_only_the_real_implementations_are_excused() -> None:
    excused = [str(path.relative_to(ROOT)) for path, text in sources(*PACKAGES) if "noqa: TID251" in text]
    assert [name for name in excused if not name.startswith(EXCUSED)] == []
