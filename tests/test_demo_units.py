"""The parts of the demo: its load, its checks, its replicas, its scenario, and that it leaves nothing behind."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from kvstore.demo.checks import Checks  # noqa: E402
from kvstore.demo.load import FULL, QUICK, Load, Script  # noqa: E402
from kvstore.demo.main import as_json, main  # noqa: E402
from kvstore.demo.model import END, TINY, USER, VOCABULARY  # noqa: E402
from kvstore.demo.peers import Answer, Replica, Replicas  # noqa: E402
from kvstore.demo.replica import Server  # noqa: E402
from kvstore.demo.scenario import Scenario  # noqa: E402
from kvstore.demo.show import Show  # noqa: E402
from kvstore.demo.tables import TIERS, Report, Row, TierRow, line  # noqa: E402
from kvstore.errors import SetupError, Unavailable  # noqa: E402
from kvstore.machine.spawn import LocalSpawner  # noqa: E402
from tests.test_transformers_integration import DictClient  # noqa: E402

SMALL = Script(
    share="document:A document:B chat-1:A chat-1:B",
    again="document:A",
    outage="chat-1:A",
    after="document:B",
    first_bytes=300,
    new_tokens=3,
)


# --- load ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", [FULL, QUICK])
def test_every_turn_begins_with_what_the_other_replica_computed(script: Script) -> None:
    load, last, at = Load(script), dict[str, list[int]](), dict[str, str]()
    count = 0
    for steps in script.phases().values():
        for name, replica in steps:
            _, ids = load.next(name)
            load.answered(name, [VOCABULARY - 1] * script.new_tokens)
            before = last.get(name)
            if before is not None:
                assert ids[: len(before)] == before
                assert at[name] != replica
            last[name], at[name] = ids, replica
            count += 1
    assert count == script.requests()
    assert {len(set(row)) for row in last.values()} != {1}


def test_the_text_is_english_and_the_same_every_time() -> None:
    _, ids = Load(FULL).next("chat-1")
    text = bytes(token for token in ids if token < 256).decode()
    assert text.count(" the ") > 5
    assert "Python program" in text
    assert ids[-2] == END
    assert USER in ids
    assert Load(FULL).next("chat-1")[1] == ids


# --- checks --------------------------------------------------------------------------------------------------------


def answer(**changes: Any) -> Answer:
    made = Answer([1, 2], np.zeros((2, 4), np.float32), 10, 8, 8, {"hot": 8}, 0.1, 0.1, 0.3, 0.2, {})
    return replace(made, **changes)


def test_checks_hold_only_when_something_was_tried() -> None:
    checks = Checks()
    assert not checks.ok
    assert not any(check.ok for check in checks.all())


def test_what_differs_is_found() -> None:
    checks = Checks()
    checks.stored(answer(stored={"aa": "1"}))
    checks.stored(answer(stored={"aa": "2"}))
    checks.compare("same", answer(loaded={"aa": "2"}), answer())
    assert checks.tokens.ok and checks.logits.ok and checks.bytes.ok
    checks.compare("tokens", answer(tokens=[1, 3]), answer())
    checks.compare("logits", answer(logits=np.full((2, 4), 2e-4, np.float32)), answer())
    checks.compare("bytes", answer(loaded={"aa": "3", "bb": "1"}), answer())
    assert [len(c.failed) for c in (checks.tokens, checks.logits, checks.bytes)] == [1, 1, 2]
    assert not checks.ok


def test_the_control_fails_when_zeroed_blocks_change_nothing() -> None:
    checks = Checks()
    checks.spoilt("same output", answer(), answer())
    checks.spoilt(
        "nothing loaded", answer(loaded_tokens=0, tokens=[9, 9], logits=np.ones((2, 4), np.float32)), answer()
    )
    assert len(checks.control.failed) == 2
    checks = Checks()
    checks.spoilt("other", answer(tokens=[9, 9], logits=np.ones((2, 4), np.float32)), answer())
    assert checks.control.ok


# --- replicas ------------------------------------------------------------------------------------------------------


async def test_a_replica_process_answers_and_ends(tmp_path: Path) -> None:
    replicas = Replicas(tmp_path, LocalSpawner(), 1)
    try:
        await replicas.start(["A"], extra=["--tiny"])
        await replicas.ready(60.0)
        replica = replicas.named["A"]
        assert '"layers":2' in replica.spec_json
        ids = list(range(100))
        first = await replica.answer(ids, "plain", 4)
        again = await replica.answer(ids, "plain", 4)
        assert first.tokens == again.tokens
        assert first.logits.shape == (4, VOCABULARY)
        assert (first.prompt_tokens, first.loaded_tokens, first.stored) == (100, 0, {})
        with pytest.raises(Unavailable, match="KeyError"):
            await replica.call("nonsense", 10.0)
        assert (await replica.answer(ids, "plain", 4)).tokens == first.tokens
    finally:
        await replicas.close()
    assert not replicas.named["A"].process.alive()
    with pytest.raises(Unavailable, match="replica A"):
        await replica.answer(ids, "plain", 4)


async def test_a_replica_that_cannot_start_says_why(tmp_path: Path) -> None:
    replicas = Replicas(tmp_path, LocalSpawner(), 1)
    try:
        await replicas.start(["A"], extra=["--no-such-flag"])
        with pytest.raises(SetupError, match="no-such-flag"):
            await replicas.ready(60.0)
    finally:
        await replicas.close()


# --- scenario ------------------------------------------------------------------------------------------------------


class InProcess(Replica):
    """A replica without a process: the same server, asked directly."""

    def __init__(self, name: str, client: Any) -> None:
        self.name = name
        self.server = Server(TINY, 1)
        self.server.client = client

    async def call(self, op: str, timeout_s: float, **arguments: Any) -> dict[str, Any]:
        return await self.server.handle({"op": op, **arguments})


class StillCluster:
    """Nothing moves and nobody dies; what was asked for is noted."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    async def tiers(self) -> list[TierRow]:
        self.asked.append("tiers")
        return [TierRow("worker-0", tier, 3, 100, 200, 130, "ok") for tier in TIERS]

    async def counters(self) -> dict[str, dict[str, int]]:
        return {"worker-0": {"puts_committed": 3}}

    async def settled(self) -> None:
        self.asked.append("settled")

    async def kill(self) -> str:
        self.asked.append("kill")
        return "killed"

    async def returned(self) -> str:
        self.asked.append("returned")
        return "returned"


async def played(*clients: Any) -> tuple[Scenario, StillCluster, list[Row]]:
    rows: list[Row] = []
    replicas: dict[str, Replica] = {name: InProcess(name, client) for name, client in zip("AB", clients, strict=True)}
    cluster = StillCluster()
    scenario = Scenario(SMALL, replicas, cluster, Checks(), Report(), lambda _text: None, rows.append)
    await scenario.run()
    return scenario, cluster, rows


async def test_the_scenario_in_one_process() -> None:
    shared = DictClient()
    scenario, cluster, rows = await played(shared, shared)
    checks = scenario.checks
    assert [
        c.name for c in (checks.tokens, checks.logits, checks.bytes, checks.control, checks.outage) if not c.ok
    ] == []
    assert cluster.asked == ["settled", "tiers", "settled", "tiers", "kill", "returned", "tiers"]
    assert scenario.checks.outage.tried == 1
    assert [row.name for row in rows] == [
        "document 1", "document 2", "chat-1 1", "chat-1 2", "document 3", "chat-1 3", "document 4",
    ]  # fmt: skip
    assert rows[0].computed_tokens == rows[0].prompt_tokens
    assert rows[2].computed_tokens == rows[2].prompt_tokens - 64, "every conversation begins with the same instruction"
    for row in (rows[1], *rows[3:]):
        assert row.computed_tokens < row.prompt_tokens / 2
    assert len(shared.after) > 0, "a replica is told what the other one stored"
    assert scenario.report.clients == {"A": {}, "B": {}}
    assert not checks.tiers.ok, "a dictionary has no host memory and no Redis"
    assert not checks.ok


async def test_the_scenario_sees_bytes_that_changed() -> None:
    class Flipped(DictClient):
        async def get(self, plan: Any) -> Any:
            got = await super().get(plan)
            got.buffers[0][0][:64] ^= 0xFF
            return got

    flipped = Flipped()
    scenario, _, _ = await played(flipped, flipped)
    assert len(scenario.checks.bytes.failed) == 6


async def test_the_scenario_fails_without_any_hit() -> None:
    scenario, _, rows = await played(DictClient(serve=0), DictClient(serve=0))
    assert all(row.computed_tokens == row.prompt_tokens for row in rows)
    assert scenario.checks.tokens.ok
    assert not scenario.checks.bytes.ok
    assert not scenario.checks.control.ok


# --- what is printed -----------------------------------------------------------------------------------------------


def test_tables_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    row = Row.of("share", "chat-1 2", "B", answer(tokens_by_tier={"ssd": 8}), answer(tokens=[1, 3], loaded_tokens=0))
    report = Report(rows=[row], tiers={"loaded": [TierRow("worker-0", "ssd", 3, 100, 200, 130, "ok")]})
    show = Show(json=False)
    show.tables(report)
    show.verdict(Checks(), 12.0)
    printed = capsys.readouterr().out
    for word in ("chat-1 2", "NO", "1.30x", "FAILED", "zeroed blocks"):
        assert word in printed
    assert "ssd 8" in line(row)
    made = as_json(Checks(), report, 12.0)
    assert made["ok"] is False
    assert made["hit_tokens"] == {"hot": 0, "host": 0, "ssd": 8, "redis": 0}
    assert made["tiers"]["loaded"][0]["ratio"] == 1.3


@pytest.mark.parametrize("threads", ["0", "1000"])
def test_a_bad_thread_count_is_refused(threads: str) -> None:
    with pytest.raises(SetupError, match="--threads"):
        main(["--threads", threads])


# --- nothing stays -------------------------------------------------------------------------------------------------

DAEMON = """
import os, signal, sys
from kvstore.demo.guard import Guard
from kvstore.machine.system import RealClock

before = dict(os.environ)
guard = Guard(RealClock())
(guard.folder / "r" / "file").write_text("x")
assert os.environ["TMPDIR"] == str(guard.folder)
read, write = os.pipe()
if os.fork() == 0:
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if os.fork() == 0:  # a daemon: its parent ends at once
        os.write(write, str(os.getpid()).encode())
        signal.pause()
    os._exit(0)
os.wait()
daemon = int(os.read(read, 20))
ended = guard.close(0.2)
assert len(ended) == 1 and str(daemon) in ended[0], ended
assert guard.left() == [], guard.left()
assert not guard.folder.exists()
assert dict(os.environ) == before
guard.close(0.0)
try:
    os.kill(daemon, 0)
except ProcessLookupError:
    print("gone")
else:  # killed and not yet reaped by us: reap it
    os.waitpid(daemon, 0)
    print("gone")
"""


def test_the_guard_ends_daemons_and_removes_its_folder() -> None:
    done = subprocess.run(
        [sys.executable, "-c", DAEMON], capture_output=True, text=True, timeout=60, env=dict(os.environ)
    )
    assert done.stdout == "gone\n", done.stderr


STOPPED = """
import os, signal
from kvstore.demo.guard import Stop

signal.signal(signal.SIGINT, signal.default_int_handler)  # who runs the tests in the background ignores it
said = []
stop = Stop(said.append)
cancelled = []
stop.cancel = lambda: cancelled.append(1)
os.kill(os.getpid(), signal.SIGTERM)
assert stop.asked and cancelled == [1] and len(said) == 1
try:
    os.kill(os.getpid(), signal.SIGINT)
    signal.pause()
except KeyboardInterrupt:
    pass
stop.closing = True
os.kill(os.getpid(), signal.SIGINT)
stop.restore()
assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
print("fine")
"""


def test_signals_cancel_then_interrupt_and_never_disturb_the_end() -> None:
    done = subprocess.run([sys.executable, "-c", STOPPED], capture_output=True, text=True, timeout=60)
    assert done.stdout == "fine\n", done.stderr
