"""`bench transfer` measures whole slices, or says why it could not."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from kvstore.bench.transfer_blocks import SMALL, Memory, plan_of, prompts, put_slice
from kvstore.client.plan import HitPlan
from kvstore.client.put_blocks import PutResult
from kvstore.errors import Unavailable

SHAPE = replace(SMALL, nbytes=64 << 10, together=2, cold=128 << 10)


class Client:
    """Answers as it is told."""

    def __init__(self, states: list[str]) -> None:
        self.states = states
        self.counters = Counter(errors_DeadlineExceeded=1, put_dropped=1)

    async def put(self, *_: Any) -> PutResult:
        return PutResult([], self.states)

    async def match(self, *_: Any) -> HitPlan:
        return HitPlan(SHAPE.spec("x"), (), ())


async def put(states: list[str], *, again: bool = False) -> None:
    memory = Memory(SHAPE)
    try:
        [prompt] = prompts(SHAPE.spec("x"), SHAPE)
        await put_slice(Client(states), memory, prompt, 0, again=again)  # type: ignore[arg-type]
    finally:
        memory.close()


async def test_a_slice_that_is_not_put_whole_is_an_error_of_one_line() -> None:
    await put(["committed", "committed"])
    await put(["committed", "held"], again=True)
    for states in (["committed", "dropped"], ["committed", "held"]):
        with pytest.raises(Unavailable, match=r"errors_DeadlineExceeded 1\): measure again") as caught:
            await put(states)
        assert "\n" not in str(caught.value) and states[1] in str(caught.value)


async def test_blocks_that_nobody_knows_are_an_error_of_one_line() -> None:
    [prompt] = prompts(SHAPE.spec("x"), SHAPE)
    with pytest.raises(Unavailable, match="0 of 2 blocks are known"):
        await plan_of(Client([]), prompt)  # type: ignore[arg-type]
