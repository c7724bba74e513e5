"""`kvstore bench engine`: what reuse through the service is worth to a real vLLM, on this CPU.

Three engines in processes of their own take turns on the same prompts: `replica` loads what another replica computed
before, `plain` has no connector and computes, `dictionary` (kvstore.bench.engine_baseline) loads from its own process.
Their greedy ids are compared in every round, outside the timing.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import quantiles
from typing import Any

from kvstore.bench.engine_models import VISIBLE, prompt
from kvstore.bench.engine_process import SETTINGS, transfer_config
from kvstore.bench.report import Report
from kvstore.config import load_config
from kvstore.errors import SetupError
from kvstore.fleet.local_cluster import LocalCluster

PROMPT_TOKENS = 1600
PROMPTS = 2
"""Computed by the first replica, then asked for in turns."""

ROUNDS, ROUNDS_QUICK = 7, 3
FRESH = (400, 8)
"""Prompt and output tokens of a request that nobody has seen: throughput without any reuse."""

LOOKUPS = 300
START_S, ANSWER_S = 300.0, 180.0
PLACES = (".venv-engines/bin/python",)
"""Where `make test-engines` puts an interpreter with vllm."""


class EngineProcess:
    """kvstore.bench.engine_process as a child. `close` it."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    async def start(cls, python: str, log: str) -> EngineProcess:
        with Path(log).open("ab") as errors:  # noqa: ASYNC230 - a log to hand on, nobody else is on this loop
            process = await asyncio.create_subprocess_exec(
                python,
                "-m",
                "kvstore.bench.engine_process",
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=errors,
                env={**os.environ, **SETTINGS},
                limit=1 << 24,
            )
        return cls(process)

    async def ask(self, job: dict[str, Any], timeout_s: float = ANSWER_S) -> dict[str, Any]:
        """SetupError when it ends or does not answer."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        stdin.write(json.dumps(job).encode() + b"\n")
        try:
            async with asyncio.timeout(timeout_s):
                line = await stdout.readline()
        except TimeoutError:
            raise SetupError(f"the engine did not answer within {timeout_s} s") from None
        if not line:
            raise SetupError("the engine ended: its log is in the bench's folder, keep it with --folder")
        answer: dict[str, Any] = json.loads(line)
        return answer

    async def run(self, prompts: list[list[int]], tokens: int) -> dict[str, Any]:
        return await self.ask({"do": "run", "prompts": prompts, "tokens": tokens})

    async def close(self) -> None:
        if self._process.returncode is None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            try:
                async with asyncio.timeout(20):
                    await self._process.wait()
            except TimeoutError:
                self._process.kill()
                await self._process.wait()


class Contest:
    """The engines of one run."""

    def __init__(self, python: str, folder: Path, report: Report, rounds: int) -> None:
        self._python, self._folder, self._report, self._rounds = python, folder, report, rounds
        self._engines: dict[str, EngineProcess] = {}
        self._wrong: list[str] = []  # rounds whose ids differ
        self._missed: list[str] = []  # rounds in which the replica did not load what is stored

    async def run(self) -> None:
        model = str(self._folder / "model")
        make = f"from kvstore.bench.engine_models import *; make_model(Path({model!r}), size=VISIBLE)"
        maker = await asyncio.create_subprocess_exec(self._python, "-c", make, stderr=asyncio.subprocess.DEVNULL)
        if await maker.wait():
            raise SetupError("the model could not be made: the engine's environment needs torch and transformers")
        config = load_config(env={}, overrides={"store": {"host_bytes": "1GiB", "hot_bytes": "768MiB"}})
        async with LocalCluster(config, workers=1, redis=False) as cluster:
            assert cluster.coordinator is not None
            ours = transfer_config({"coordinators": cluster.coordinator.address})
            asked = [prompt(PROMPT_TOKENS, seed) for seed in range(PROMPTS)]
            try:
                await self._seed(model, ours, asked)
                dictionary = transfer_config({}, "DictConnector", "kvstore.bench.engine_baseline")
                await self._build("plain", model, None)
                await self._build("dictionary", model, dictionary)
                await self._build("replica", model, ours)
                await self._first_token(asked)
                await self._throughput()
                await self._lookups(asked)
            finally:
                for engine in self._engines.values():
                    await engine.close()

    async def _build(self, name: str, model: str, transfer: dict[str, Any] | None) -> EngineProcess:
        engine = await EngineProcess.start(self._python, str(self._folder / f"{name}.log"))
        self._engines[name] = engine
        job = {"do": "build", "model": model, "transfer": transfer, "settings": {"num_gpu_blocks_override": 96}}
        await engine.ask(job, START_S)
        return engine

    async def _seed(self, model: str, transfer: dict[str, Any], asked: list[list[int]]) -> None:
        """The first replica computes the prompts and is gone: what the second has, it has from the service."""
        engine = await self._build("first", model, transfer)
        for ids in asked:
            await engine.run([ids], 1)
        blocks = sum(len(ids) // 64 for ids in asked)
        for _ in range(100):
            answer = await engine.run([[3, 4, 5]], 1)
            if answer["counters"].get("blocks_saved", 0) >= blocks:
                break
        else:
            raise SetupError(f"the first replica saved {answer['counters']} instead of {blocks} blocks")
        await engine.close()
        del self._engines["first"]

    async def _first_token(self, asked: list[list[int]]) -> None:
        seconds: dict[str, list[float]] = {name: [] for name in ("plain", "replica", "dictionary")}
        before = 0.0
        for turn in range(-PROMPTS, self._rounds):  # the first turns warm up: the dictionary computes in them
            ids = asked[turn % PROMPTS]
            said: dict[str, Any] = {}
            for name in seconds:
                answer = await self._engines[name].run([ids], 1)
                said[name] = answer["ids"]
                if turn >= 0:
                    seconds[name].append(answer["seconds"])
                if name == "replica":
                    loaded = answer["counters"].get("tokens_loaded", 0) - before
                    before += loaded
                    if loaded < PROMPT_TOKENS - 2 * 64:
                        self._missed.append(f"turn {turn}: {loaded:.0f} tokens, {answer['counters']}")
            if any(ids != said["plain"] for ids in said.values()):
                self._wrong.append(f"first token, turn {turn}: {said}")
        for name, values in seconds.items():
            self._report.result(f"first_token_{name}", values, "s")
        self._report.ratio(
            "first_token_second_replica_vs_recompute", "first_token_replica", "first_token_plain", at_most=0.25
        )
        self._report.ratio(
            "first_token_second_replica_vs_dict", "first_token_replica", "first_token_dictionary", at_most=1.2
        )

    async def _throughput(self) -> None:
        """Requests without anything to reuse: what the connector costs where it brings nothing."""
        rates: dict[str, list[float]] = {"plain": [], "replica": []}
        for turn in range(-1, self._rounds):
            fresh = [prompt(FRESH[0], 10_000 + 2 * turn + index) for index in range(2)]
            said = {}
            for name in rates:
                answer = await self._engines[name].run(fresh, FRESH[1])
                said[name] = answer["ids"]
                if turn >= 0:
                    rates[name].append(len(fresh) * sum(FRESH) / answer["seconds"])
            if said["plain"] != said["replica"]:
                self._wrong.append(f"throughput, turn {turn}: {said}")
        for name, values in rates.items():
            self._report.result(f"throughput_{name}", values, "tokens/s")
        self._report.ratio(
            "throughput_no_reuse_vs_no_connector", "throughput_replica", "throughput_plain", at_least=0.97
        )

    async def _lookups(self, asked: list[list[int]]) -> None:
        """Half of them find everything, half of them nothing."""
        mixed = [asked[i % PROMPTS] if i % 2 else prompt(PROMPT_TOKENS, 20_000 + i) for i in range(LOOKUPS)]
        seconds = (await self._engines["replica"].ask({"do": "lookups", "prompts": mixed}))["seconds"]
        self._report.result("scheduler_lookup_p50", [1e3 * value for value in seconds], "ms")
        self._report.result("scheduler_lookup_p99", [1e3 * quantiles(seconds, n=100)[98]], "ms")
        self._report.results["scheduler_lookup_p99"]["n"] = len(seconds)
        self._report.target("scheduler_lookup_p99", at_most=5.0)
        for name, rounds in (("rounds_wrong", self._wrong), ("rounds_not_loaded", self._missed)):
            self._report.result(name, [float(len(rounds))], "rounds")
            self._report.target(name, at_most=0)
            self._report.notes += [f"{name}: {what}" for what in rounds]


def find_python(given: str) -> str:
    """An interpreter with vllm: the given one, this one, or that of `make test-engines`. SetupError without one."""
    if given:
        return given
    if importlib.util.find_spec("vllm") is not None:
        return sys.executable
    root = Path(__file__).resolve().parents[2]
    for place in PLACES:
        if (root / place).exists():
            return str(root / place)
    raise SetupError("no Python with vllm is known: make test-engines makes one, or pass --python PATH")


def measure(python: str = "", *, quick: bool = False, folder: str = "") -> Report:
    """Run the bench. Takes minutes: four engines start, each prefill takes seconds."""
    report = Report("engine")
    found = find_python(python)
    with tempfile.TemporaryDirectory(prefix="kvstore-bench-engine-") as made:
        contest = Contest(found, Path(folder or made), report, ROUNDS_QUICK if quick else ROUNDS)
        asyncio.run(contest.run())
    size = VISIBLE["hidden_size"]
    report.notes.append(f"llama of {size} x {VISIBLE['num_hidden_layers']}, float32, 1 thread, one host, one worker")
    return report


def main(argv: Sequence[str]) -> Report:
    """`kvstore bench engine`'s own flags."""
    parser = argparse.ArgumentParser(prog="kvstore bench engine", allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help=f"{ROUNDS_QUICK} rounds instead of {ROUNDS}")
    parser.add_argument("--python", default="", metavar="PATH", help="interpreter that has vllm")
    parser.add_argument("--folder", default="", metavar="FOLDER", help="keep the model and the engines' logs here")
    arguments = parser.parse_args(argv)
    return measure(arguments.python, quick=arguments.quick, folder=arguments.folder)
