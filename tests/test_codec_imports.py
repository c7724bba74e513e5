"""What codecs ask of a process: kernels come with the first chunk that needs them, also where nothing is writable."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run(program: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_client_that_meets_no_such_chunk_imports_neither_numba_nor_torch() -> None:
    program = """
import sys
import kvstore.client.kv_client, kvstore.format
from kvstore import codecs
raw = memoryview(bytes(4096))
used, stored = codecs.encode(codecs.SPLIT, raw, 2)
codecs.decode(used, stored, memoryview(bytearray(4096)), 2)
print(sorted({"numba", "torch"} & set(sys.modules)))
"""
    assert run(program) == "[]"


NEWLY_COMPILED = """
import sys
import numpy as np
from kvstore.codecs.batch import Coded, decode, encode, ready
from kvstore.codecs.registry import codec_for
from kvstore.layout import V, Chunk
from kvstore.spec import DTYPES

def compiled():
    loops = [module for name, module in list(sys.modules.items()) if name.startswith("kvstore.kernels.")]
    known = [(module.__name__, name, value) for module in loops for name, value in vars(module).items()]
    return {(module, name, str(types)) for module, name, value in known for types in getattr(value, "signatures", ())}

names = ("lossless", "dense")
if READY:
    ready(names)
before, rng = compiled(), np.random.default_rng(1)
for dtype, itemsize in DTYPES.items():
    for name in names:
        for content in (bytes(itemsize << 12), rng.bytes(itemsize << 12)):
            for raw in (content, bytearray(content)):
                piece = Chunk(0, V, 0, 1, 0, len(raw), (64, 1, 64), itemsize, dtype)
                [planes] = encode(memoryview(raw), [piece], [codec_for(name, dtype)])
                data, spans = bytearray(), []
                for plane in planes:
                    spans.append((len(data), len(plane.data)))
                    data += plane.data
                coded, target = Coded(piece, planes[0].codec, planes[0].params, tuple(spans)), bytearray(len(raw))
                decode(memoryview(data), [coded], memoryview(target))
                assert target == content
print(len(compiled() - before))
"""


def test_once_ready_no_block_waits_for_the_compiler() -> None:
    """Whatever its elements are, and also where a codec gains nothing and falls back; and the control."""
    assert run(f"READY = True{NEWLY_COMPILED}") == "0"
    assert int(run(f"READY = False{NEWLY_COMPILED}")) > 0


def test_kernels_run_where_neither_home_nor_package_can_be_written(tmp_path: Path) -> None:
    """Numba is told that no folder will do, as on a read-only image: the private one among temporary files serves."""
    program = """
import numba.core.caching as caching
from kvstore.codecs import FAST
from kvstore.codecs.batch import encode
from kvstore.layout import Chunk

def nowhere(*_):
    raise OSError("read-only")
for name in dir(caching):  # in the package, in the user's cache: everywhere but where it is told to
    if "Locator" in name and ("InTree" in name or "UserWide" in name):
        getattr(caching, name).ensure_cache_path = nowhere
piece = Chunk(0, 0, 0, 1, 0, 8192, (64, 1, 64), 2, "bfloat16")
[[plane]] = encode(memoryview(bytes(8192)), [piece], [FAST])
print(plane.codec)
"""
    folder = tmp_path / "tmp"
    folder.mkdir()
    assert run(program, TMPDIR=str(folder), NUMBA_CACHE_DIR="") == "3"
    assert list(folder.glob("kvstore-kernels-*/**/*.nbc")), "nothing was kept: every process would compile anew"
