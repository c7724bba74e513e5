"""`kvstore compile`: afterwards no process compiles anything that it takes in."""

from __future__ import annotations

import subprocess
import sys

import pytest

from kvstore.cli.main import main
from kvstore.operations import compiling

LOOK = """
import pkgutil, importlib, sys
import kvstore.kernels as kernels
from kvstore.operations.compiling import compile_all
compile_all()
hits = misses = 0
for module in pkgutil.iter_modules(kernels.__path__):
    for value in vars(importlib.import_module(f"kvstore.kernels.{module.name}")).values():
        if hasattr(value, "stats") and hasattr(value, "signatures"):
            hits += len(value.stats.cache_hits)
            misses += len(value.stats.cache_misses)
print(hits, misses)
"""


def test_the_second_process_finds_everything_on_disk() -> None:
    for _ in range(2):  # the first one compiles, where nobody has
        found = subprocess.run([sys.executable, "-c", LOOK], capture_output=True, text=True, check=True, timeout=300)
    hits, misses = map(int, found.stdout.split())
    assert misses == 0 and hits > 20


def test_the_command_tells_what_it_is_at_and_that_it_is_done(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made: list[str] = []
    parts = tuple((name, lambda name=name: made.append(name)) for name, _ in compiling.PARTS)  # type: ignore[misc]
    monkeypatch.setattr(compiling, "PARTS", parts)
    monkeypatch.setattr("kvstore.cli.compiling.TOLD_S", -1.0)
    assert main(["compile"]) == 0
    assert made == ["copies", "opens", "gets", "lookups", "policy", "codecs"]
    told = capsys.readouterr().err
    assert all(f"compiling: {name}" in told for name in made) and "on disk" in told
