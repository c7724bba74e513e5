"""The connector's parts by themselves, under virtual time: pins, own commits, deadlines, what is dropped first."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvstore.client.pinning import Pin
from kvstore.client.plan import HitPlan
from kvstore.integrations.vllm.counters import Counters
from kvstore.integrations.vllm.identity import Identity, Layout
from kvstore.integrations.vllm.jobs import SAVES_WAITING
from kvstore.integrations.vllm.keeping import TTL_S, Keeper
from kvstore.integrations.vllm.metadata import Load, Report, Save, Step
from kvstore.integrations.vllm.options import Options
from kvstore.integrations.vllm.requests import track
from kvstore.integrations.vllm.scheduler import SchedulerSide
from kvstore.integrations.vllm.worker import OVERDUE_S, WorkerSide
from kvstore.keys import chain
from kvstore.spec import Group, ModelSpec, Shard
from kvstore.types import CommitToken
from tests.sim.loop import run

pytestmark = pytest.mark.quick

PAGE = 512
SPEC = ModelSpec(
    model="tiny",
    layout="opaque:test",
    groups=(Group(kind="opaque", layers=2, kv_heads=1, page_tokens=32, page_bytes=PAGE),),
)
LAYOUT = Layout(("layer.0", "layer.1"), 32, PAGE, sliding=False)
IDENTITY = Identity(SPEC, (LAYOUT,), ((Shard.whole(SPEC),),))
PROMPT = list(range(3, 3 + 512))
ROW_BYTES = 2 * 2 * PAGE


class LoopClock:
    """The running loop's time."""

    def monotonic(self) -> float:
        return asyncio.get_running_loop().time()

    def wall_ns(self) -> int:
        return int(1e9 * self.monotonic())


class Client:
    """What the connector uses of a `KVClient`, in memory. Blocks take `get_s`, and nothing is ever missing."""

    def __init__(self, *, get_s: float = 0.0, pin_s: float = 0.0) -> None:
        self.get_s, self.pin_s = get_s, pin_s
        self.events: list[tuple[str, float]] = []
        self.shown: list[list[CommitToken]] = []
        self.held = 0  # leading blocks a match finds
        self.system = SimpleNamespace(pool=SimpleNamespace(run=self._run))

    async def _run(self, function: Callable[..., Any], *args: Any) -> Any:
        return function(*args)

    def _event(self, name: str) -> None:
        self.events.append((name, asyncio.get_running_loop().time()))

    def at(self, name: str) -> list[float]:
        return [when for event, when in self.events if event == name]

    async def pin(self, plan: HitPlan, *, ttl_s: float) -> Pin:
        await asyncio.sleep(self.pin_s)
        self._event("pin")
        return Pin((), plan.blocks, ttl_s)

    async def renew(self, pin: Pin, *, ttl_s: float) -> bool:
        self._event("renew")
        return True

    async def unpin(self, pin: Pin) -> None:
        self._event("unpin")

    async def hint(self, spec: ModelSpec, prefix: Any, hint: Any, **options: Any) -> int:
        self._event("hint")
        return 0

    async def match(self, spec: ModelSpec, prefix: Any, shards: Any, after: Any = (), *, timeout_s: float) -> HitPlan:
        self.shown.append(list(after))
        return HitPlan(spec, tuple(prefix.keys), tuple(shards)).shortened(self.held)

    async def get(self, plan: HitPlan, into: Any, *, first: int, timeout_s: float) -> Any:
        await asyncio.sleep(min(self.get_s, timeout_s))
        there = self.get_s <= timeout_s
        return SimpleNamespace(tiers=[[SimpleNamespace(name="HOT") if there else None] * plan.blocks])

    async def put(self, spec: ModelSpec, prefix: Any, blocks: Any, first: int, shard: Any, *, timeout_s: float) -> Any:
        self._event("put")
        return SimpleNamespace(states=["committed"] * len(blocks), tokens=[CommitToken("w", 1, len(self.events))])


class Face:
    """`EngineClient.submit_work` on the running loop. `stuck`: work is taken and never begun."""

    def __init__(self, client: Client, *, stuck: bool = False) -> None:
        self.client, self.stuck = client, stuck

    def submit_work(self, work: Callable[[Any], Awaitable[Any]]) -> Future[Any]:
        future: Future[Any] = Future()
        if self.stuck:
            return future
        task = asyncio.ensure_future(work(self.client))

        def ended(done: asyncio.Task[Any]) -> None:
            if not future.cancelled():
                future.set_exception(done.exception()) if done.exception() else future.set_result(done.result())

        task.add_done_callback(lambda done: done.cancelled() or ended(done))
        future.add_done_callback(lambda done: done.cancelled() and task.cancel())
        return future


def plan(blocks: int = 8) -> HitPlan:
    return HitPlan(SPEC, tuple(chain(SPEC, PROMPT).keys[:blocks]), (Shard.whole(SPEC),))


# --- pins ----------------------------------------------------------------------------------------------------------


def test_a_pin_is_renewed_before_it_expires_until_it_is_let_go() -> None:
    async def scenario() -> None:
        client = Client()
        keeper = Keeper(Options(), Face(client), LoopClock(), Counters())  # type: ignore[arg-type]
        keeper.keep("r", plan())
        for _ in range(100):
            await asyncio.sleep(1.0)
            keeper.keep("r", plan())  # the scheduler asks again, step by step
        moments = [*client.at("pin"), *client.at("renew")]
        assert len(client.at("pin")) == 1
        assert max(later - earlier for earlier, later in pairwise(moments)) < TTL_S / 2
        assert moments[-1] - moments[0] > 90
        keeper.let_go("r")
        await asyncio.sleep(60.0)
        assert len(client.at("unpin")) == 1 and client.events[-1][0] == "unpin" and not len(keeper)

    run(scenario())


def test_a_pin_that_is_let_go_while_it_is_made_ends_too() -> None:
    async def scenario() -> None:
        client = Client(pin_s=0.1)
        keeper = Keeper(Options(), Face(client), LoopClock(), Counters())  # type: ignore[arg-type]
        keeper.keep("r", plan())
        await asyncio.sleep(0.05)
        keeper.let_go("r")
        await asyncio.sleep(1.0)
        assert [event for event, _ in client.events] == ["pin", "unpin"]

    run(scenario())


def test_pins_are_bounded_in_time_and_number() -> None:
    async def scenario() -> None:
        client, counters = Client(), Counters()
        keeper = Keeper(Options(pin_max_s=40.0, pins_max=2), Face(client), LoopClock(), counters)  # type: ignore[arg-type]
        for name in "abc":
            keeper.keep(name, plan())
        assert len(keeper) == 2 and counters.data["pins_refused"] == 1
        await asyncio.sleep(100.0)
        assert len(client.at("unpin")) == 2, "nobody let them go, and yet they ended"
        assert 40.0 <= client.at("unpin")[0] - client.at("pin")[0] < 41.0

    run(scenario())


def test_another_plan_is_pinned_before_the_first_one_is_let_go() -> None:
    async def scenario() -> None:
        client = Client()
        keeper = Keeper(Options(), Face(client), LoopClock(), Counters())  # type: ignore[arg-type]
        keeper.keep("r", plan(4))
        await asyncio.sleep(1.0)
        keeper.keep("r", plan(8))
        await asyncio.sleep(1.0)
        assert [event for event, _ in client.events] == ["pin", "pin", "unpin"]
        assert len(keeper) == 1

    run(scenario())


# --- the scheduler's side ------------------------------------------------------------------------------------------


def request(name: str = "r", ids: Sequence[int] = PROMPT) -> Any:
    return SimpleNamespace(
        request_id=name,
        all_token_ids=list(ids),
        prompt_token_ids=list(ids),
        num_tokens=len(ids),
        num_prompt_tokens=len(ids),
        prompt_embeds=None,
        lora_request=None,
        cache_salt=None,
        mm_features=[],
    )


def computed(name: str, tokens: int) -> Any:
    """The engine's description of a step that computes a new request's first tokens."""
    ids = (list(range(1, 1 + -(-tokens // 32))),)
    return SimpleNamespace(
        scheduled_new_reqs=[SimpleNamespace(req_id=name, num_computed_tokens=0)],
        scheduled_cached_reqs=SimpleNamespace(req_ids=[], num_computed_tokens=[]),
        num_scheduled_tokens={name: tokens},
        total_num_scheduled_tokens=tokens,
        preempted_req_ids=None,
        kv_connector_block_state=SimpleNamespace(get_block_ids=lambda _: ids),
    )


def scheduler(client: Client, **options: Any) -> SchedulerSide:
    made = Options(**{"lookup_wait_ms": 0.001, **options})
    return SchedulerSide(IDENTITY, made, Face(client), LoopClock())  # type: ignore[arg-type]


async def answered(side: SchedulerSide, asked: Any) -> tuple[int | None, bool]:
    """What the connector says once its lookup, if it made one, has had time to end."""
    side.matched(asked, 0)
    await asyncio.sleep(0.001)
    return side.matched(asked, 0)


def test_the_next_turn_waits_for_what_the_last_one_stores_and_shows_its_commits() -> None:
    async def scenario() -> None:
        client = Client()
        side = scheduler(client)
        assert await answered(side, request("one")) == (0, False)
        [save] = side.saves(computed("one", 512))
        side.finished(request("one"))
        client.held = 7
        assert await answered(side, request("stranger", range(1000, 1512))) == (448, True)
        assert await answered(side, request("two", [*PROMPT, 5])) == (None, False), "its blocks are on their way"
        side.reported(Report(1, ended={save.number: 1}, commits={("w", 1): 41}))
        client.held = 8
        assert await answered(side, request("two", [*PROMPT, 5])) == (512, True)
        assert client.shown == [[], [], [CommitToken("w", 1, 41)]], "shown to who asks for these blocks, once"

    run(scenario())


def test_waiting_for_own_saves_is_bounded() -> None:
    async def scenario() -> None:
        client = Client()
        side = scheduler(client, own_saves_wait_ms=50.0)
        await answered(side, request("one"))
        assert side.saves(computed("one", 512))
        client.held = 2
        for _ in range(4):
            assert side.matched(request("two"), 0) == (None, False)
            await asyncio.sleep(0.010)
        await asyncio.sleep(0.020)
        assert await answered(side, request("two")) == (128, True)

    run(scenario())


def test_blocks_that_failed_are_not_asked_for_again_and_a_request_gives_up_after_two_failures() -> None:
    async def scenario() -> None:
        client = Client()
        client.held = 7
        side = scheduler(client)
        for expected in (448, 192):
            assert await answered(side, request()) == (expected, True)
            side.reported(Report(1, failed={"r": 3}))
        assert await answered(side, request()) == (0, False)

    run(scenario())


def test_tokens_are_hashed_once_however_often_the_scheduler_asks() -> None:
    followed = track(request(), SPEC, {})
    assert followed is not None
    hashed: list[int] = []
    extend = followed.builder.extend
    followed.builder.extend = lambda ids: (hashed.append(len(ids)), extend(ids))[1]  # type: ignore[method-assign,assign,func-returns-value]
    for end in (100, 100, 300, 512, 512):
        keys = followed.extend(end)
    assert sum(hashed) == 512 and keys == chain(SPEC, PROMPT).keys


def test_reports_of_ranks_add_up() -> None:
    one = Report(3, {1: 1}, {1: 1}, {("w", 1): 5, ("v", 2): 1}, {"r": 4}, 100.0, None)
    other = Report(2, {1: 1, 2: 1}, {2: 1}, {("w", 1): 7}, {"r": 2}, 50.0, 9.0)
    both = one.aggregate(other)
    assert both == Report(2, {1: 2, 2: 1}, {1: 1, 2: 1}, {("w", 1): 7, ("v", 2): 1}, {"r": 2}, 50.0, 9.0)


# --- the workers' side ---------------------------------------------------------------------------------------------


def worker(client: Client, *, stuck: bool = False, **options: Any) -> WorkerSide:
    side = WorkerSide(IDENTITY, 0, Options(**options), Face(client, stuck=stuck), LoopClock())  # type: ignore[arg-type]
    side.register({name: torch.zeros((64, PAGE), dtype=torch.uint8) for name in LAYOUT.layers}, 64)
    return side


def save(number: int, blocks: int = 4, name: str = "") -> Save:
    keys = tuple(chain(SPEC, PROMPT).keys[:blocks])
    return Save(number, name or f"r{number}", 0, blocks, 0, keys, (tuple(range(1, 1 + 2 * blocks)),))


def load(blocks: int = 8) -> Load:
    return Load(1, "r", plan(blocks), 0, 0, (tuple(range(1, 1 + 2 * blocks)),), synchronous=False)


def test_saves_are_dropped_first_under_pressure_and_their_pages_are_free_at_once() -> None:
    async def scenario() -> None:
        side = worker(Client(), stuck=True, save_bytes_max=4 * ROW_BYTES)
        count = SAVES_WAITING + 3
        side.end(Step(1, SPEC.root, 512, saves=[save(number) for number in range(count)]))
        side.finished()
        assert sorted(side.report().saved) == [SAVES_WAITING, SAVES_WAITING + 1, SAVES_WAITING + 2]
        assert side.counters.data["blocks_dropped"] == 3 * 4

    run(scenario())


def test_a_preempted_requests_pages_are_given_up_before_the_next_step() -> None:
    async def scenario() -> None:
        side = worker(Client(), stuck=True)
        side.end(Step(1, SPEC.root, 512, saves=[save(1, name="gone"), save(2, name="stays")]))
        side.step_begins(Step(2, SPEC.root, preempted=("gone",)))
        side.finished()
        assert list(side.report().saved) == [1]

    run(scenario())


def test_what_was_stored_is_reported_with_its_commits() -> None:
    async def scenario() -> None:
        side = worker(Client())
        side.end(Step(1, SPEC.root, 512, saves=[save(1)]))
        await asyncio.sleep(1.0)
        side.finished()
        report = side.report()
        assert report.ended == {1: 1} and report.commits == {("w", 1): 1}
        assert side.counters.data["blocks_saved"] == 4

    run(scenario())


@pytest.mark.parametrize(("get_s", "loaded"), [(0.2, 512), (3.0, 0)])
def test_a_load_ends_no_later_than_computing_would(get_s: float, loaded: int) -> None:
    """512 tokens at the measured 1,024 tokens a second: half a second."""

    async def scenario() -> None:
        side = worker(Client(get_s=get_s))
        loop = asyncio.get_running_loop()
        side.step_begins(Step(1, SPEC.root, 1024))
        await asyncio.sleep(1.0)
        side.end(Step(1, SPEC.root, 1024))
        began = loop.time()
        side.begin(Step(2, SPEC.root, 1, loads=[load()]))
        arrived: set[str] = set()
        while not arrived:
            await asyncio.sleep(0.001)
            arrived = side.finished()[1]
        assert loop.time() - began < 0.5 + OVERDUE_S
        assert side.counters.data["tokens_loaded"] == loaded
        assert side.counters.data.get("tokens_failed", 0) == 512 - loaded
        assert bool(side.load_errors()) == (not loaded)

    run(scenario())
