"""Two OpenAI-compatible servers, the second loads what the first computed; what they count is at their metrics."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kvstore.bench.engine_process import SETTINGS, transfer_config
from tests.engines.cases import note, prompts, whole_blocks
from tests.engines.harness import PATIENT, addresses, directory_blocks, service, wait_until

START_S = 400.0


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Server:
    def __init__(self, model: Path, extra: dict[str, Any] | None, log: Path) -> None:
        self.port = free_port()
        argv = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
        argv += ["--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(self.port), "--enforce-eager"]
        argv += ["--dtype", "float32", "--block-size", "32", "--num-gpu-blocks-override", "256"]
        argv += ["--max-model-len", "2048", "--no-enable-prefix-caching", "--gpu-memory-utilization", "0.1"]
        if extra is not None:
            argv += ["--kv-transfer-config", json.dumps(transfer_config({**PATIENT, **extra}))]
        env = {**os.environ, **SETTINGS}
        del env["VLLM_ENABLE_V1_MULTIPROCESSING"]
        with log.open("ab") as out:
            self.process = subprocess.Popen(argv, stdout=out, stderr=out, env=env, start_new_session=True)

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=30) as answer:
            return str(answer.read().decode())

    def healthy(self) -> bool:
        assert self.process.poll() is None, "the server ended"
        try:
            self.get("/health")
        except OSError:
            return False
        return True

    def complete(self, ids: list[int], tokens: int) -> str:
        body = {"model": "tiny", "prompt": ids, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
        url = f"http://127.0.0.1:{self.port}/v1/completions"
        request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=120) as answer:
            return str(json.load(answer)["choices"][0]["text"])

    def counter(self, name: str) -> float:
        found = re.search(rf"^vllm:kvstore_{name}_total{{[^}}]*}} ([0-9.e+]+)$", self.get("/metrics"), re.MULTILINE)
        return float(found[1]) if found else 0.0

    def stop(self) -> None:
        try:
            os.killpg(self.process.pid, signal.SIGTERM)
            self.process.wait(15)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            pass
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()


@contextmanager
def server(model: Path, extra: dict[str, Any] | None, log: Path) -> Iterator[Server]:
    made = Server(model, extra, log)
    try:
        wait_until(made.healthy, START_S, "the server")
        yield made
    finally:
        made.stop()


def test_two_openai_servers(models: dict[str, Path], tmp_path: Path) -> None:
    asked = prompts(200)
    log = tmp_path / "server.log"
    with service() as cluster:
        with server(models["llama"], addresses(cluster), log) as first:
            said = [first.complete(ids, 12) for ids in asked]
            blocks = sum(len(ids) // 64 for ids in asked)

            def saved() -> bool:
                first.complete([3, 4, 5], 1)
                return first.counter("blocks_saved") >= blocks

            wait_until(saved, 60, "saving")
            wait_until(lambda: directory_blocks(cluster) >= blocks, what="announcing what was saved")
        with server(models["llama"], addresses(cluster), log) as second:
            again = [second.complete(ids, 12) for ids in asked]
            second.complete([3, 4, 5], 1)
            wait_until(lambda: second.counter("tokens_loaded") >= whole_blocks(asked), 30, "the counters")
            loaded = {"tokens_loaded": second.counter("tokens_loaded")}
    assert again == said and len(set(said)) == len(said)
    note("two OpenAI-compatible servers", asked, loaded)
