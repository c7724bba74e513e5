"""What a user installs: exactly three packages, importable without heavy libraries, with the oldest protobuf too."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {"kvstore", "workers", "coordinator"}
FOLDERS_THAT_STAY_HERE = ("tests", "proto", "deploy", "docs", "examples", "tools")


def run_python(code: str, cwd: Path, *, path: str = "") -> str:
    """The output of `code` in a fresh interpreter that does not see the checkout through its working directory."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env={"PYTHONPATH": path}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_wheel_holds_exactly_the_three_packages(tmp_path: Path) -> None:
    source_tree = tmp_path / "source"  # apart from build/, where an earlier build left what has gone since
    skip = shutil.ignore_patterns("build", "dist", ".*", "__pycache__", "*.egg-info")
    shutil.copytree(ROOT, source_tree, ignore=skip)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(source_tree)],
        check=True,
        capture_output=True,
        timeout=120,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == PACKAGES
    assert {"kvstore/py.typed", "kvstore/wire/common_pb2.pyi", "kvstore/wire/worker_pb2.py"} <= set(names)
    source = {str(p.relative_to(ROOT)) for package in PACKAGES for p in (ROOT / package).rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == source


def test_editable_install_exposes_no_more(tmp_path: Path) -> None:
    code = f"""
from importlib.util import find_spec
places = {{n: list(s.submodule_search_locations or []) for n in {FOLDERS_THAT_STAY_HERE!r} if (s := find_spec(n))}}
print([n for n, found in places.items() if {str(ROOT)!r} + "/" + n in found])
print(all(find_spec(n) for n in {sorted(PACKAGES)!r}))
"""
    assert run_python(code, tmp_path).splitlines() == ["[]", "True"]


def test_importing_the_client_needs_no_heavy_library(tmp_path: Path) -> None:
    code = """
import sys
from kvstore import KVClient, ModelSpec
print(sorted(m for m in ("ray", "redis", "torch", "transformers") if m in sys.modules))
"""
    assert run_python(code, tmp_path) == "[]"


ROUND_TRIP = """
import asyncio, google.protobuf, grpc
from kvstore.wire import common_pb2, coordinator_pb2, worker_pb2
request = common_pb2.MatchRequest(root=b"r" * 16, keys=b"k" * 32, wait_ms=7, shards=[common_pb2.Shard(layer_count=2)])
assert common_pb2.MatchRequest.FromString(request.SerializeToString()) == request

async def main():
    from kvstore.auth import Authenticator, load_policy
    from kvstore.transport.base import Credentials
    from kvstore.transport.methods import COORDINATOR
    from kvstore.transport.rpc import GrpcTransport
    from kvstore.machine.system import real_system

    class Echo:
        async def match(self, request, context):
            return common_pb2.MatchReply(blocks=request.wait_ms, boot_id=context.namespace)

    transport = GrpcTransport(real_system().clock)
    server = await transport.serve("127.0.0.1:0", {"Coordinator": Echo()}, Authenticator(load_policy()))
    channel = await transport.connect(server.address, Credentials())
    reply = await channel.unary(COORDINATOR["Match"], request, timeout_s=10)
    await channel.close()
    await server.close(0)
    print(google.protobuf.__version__, grpc.__version__, reply.blocks, reply.boot_id)

asyncio.run(main())
"""


@pytest.mark.parametrize("pair", ["oldest", "newest"])
def test_wire_works_at_both_ends_of_the_supported_range(pair: str, tmp_path: Path) -> None:
    oldest = dict(
        line.split("==") for line in (ROOT / "tests" / "oldest.txt").read_text().split() if not line.startswith("#")
    )
    folder = ROOT / ".venv-oldest"
    assert folder.is_dir(), "run `make setup`: it installs the oldest supported grpcio and protobuf beside the rest"
    out = run_python(ROUND_TRIP, tmp_path, path=str(folder) if pair == "oldest" else "").split()
    assert out[2:] == ["7", "default"]
    assert (out[:2] == [oldest["protobuf"], oldest["grpcio"]]) is (pair == "oldest")
