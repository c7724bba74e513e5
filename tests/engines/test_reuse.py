"""The second engine loads what the first computed, and says what an engine without connector says."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvstore.client.kv_client import KVClient
from kvstore.config import ClientConfig
from kvstore.fleet.local_cluster import LocalCluster
from kvstore.keys import chain
from kvstore.layout import block_bytes
from kvstore.spec import ModelSpec, Shard
from tests.engines.cases import note, prompts, same, seed_store, whole_blocks
from tests.engines.harness import (
    Engine,
    addresses,
    found_by_all,
    service,
    stored_under,
    wait_until,
    worker_counters,
)


@pytest.fixture(scope="module")
def store() -> Iterator[LocalCluster]:
    with service() as cluster:
        yield cluster


async def _poison(config: ClientConfig, spec: ModelSpec, shards: list[Shard], asked: list[list[int]]) -> None:
    """Somebody with the right to write puts zeros under the keys of these prompts."""
    async with await KVClient.connect(config) as client:
        for ids in asked:
            prefix = chain(spec, ids)
            for shard in shards:
                zeros = [np.zeros(block_bytes(spec, shard), np.uint8)] * len(prefix)
                assert set((await client.put(spec, prefix, zeros, shard=shard)).states) == {"committed"}


@pytest.mark.quick
def test_the_negative_control_zeroed_blocks_change_the_output(
    one: Engine, models: dict[str, Path], store: LocalCluster
) -> None:
    asked = prompts(1)
    reference = one.build(models["llama"]).run(asked)
    one.build(models["llama"], addresses(store))
    spec, shards = stored_under(one)
    asyncio.run(_poison(store.client_config(0), spec, shards, asked))
    found_by_all(store, spec, shards, asked)
    one.finds(asked)
    answer = one.run(asked)
    assert answer["counters"]["tokens_loaded"] == whole_blocks(asked)
    assert all(mine != its for mine, its in zip(answer["ids"], reference["ids"], strict=True))
    note("negative control: zeroed blocks", asked, answer["counters"])


def pins_left(store: LocalCluster) -> int:
    counted = worker_counters(store)
    assert counted["pins_made"] > 0, "nothing was pinned between match and load"
    return counted["pins_made"] - counted["pins_ended"]


CASES = [
    pytest.param("llama", "float32", "async", id="llama-fp32-async", marks=pytest.mark.quick),
    pytest.param("llama", "bfloat16", "sync", id="llama-bf16-sync"),
    pytest.param("qwen3", "float32", "sync", id="qwen3-fp32-sync"),
    pytest.param("qwen3", "bfloat16", "async", id="qwen3-bf16-async"),
    pytest.param("gemma3", "float32", "async", id="gemma3-sliding-fp32-async"),
]


@pytest.mark.parametrize(("family", "dtype", "load"), CASES)
def test_second_engine_loads_what_the_first_computed(
    one: Engine,
    two: Engine,
    models: dict[str, Path],
    store: LocalCluster,
    family: str,
    dtype: str,
    load: str,
    request: Any,
) -> None:
    asked = prompts(10 + [case.id for case in CASES].index(request.node.callspec.id))
    extra = addresses(store, load=load)
    reference = seed_store(one, models[family], store, asked, extra={"load": load}, dtype=dtype)
    answer = two.build(models[family], extra, dtype=dtype).run(asked, logprobs=1)
    same(answer, reference, dtype)
    assert answer["counters"]["tokens_loaded"] == whole_blocks(asked)
    assert "loads_failed" not in answer["counters"] and "errors" not in answer["counters"]
    two.run([[3, 4, 5]], 1)
    wait_until(lambda: pins_left(store) == 0, what="letting pins go")
    note(request.node.callspec.id, asked, answer["counters"])


@pytest.mark.parametrize("load", ["async", "sync"])
def test_batch_of_four_with_chunked_prefill_and_preemption(
    one: Engine, two: Engine, models: dict[str, Path], store: LocalCluster, load: str
) -> None:
    asked = prompts(30 if load == "async" else 31, (300, 340, 380, 420))
    tight = {"max_num_batched_tokens": 256, "num_gpu_blocks_override": 34, "max_model_len": 1024, "max_num_seqs": 4}
    extra = addresses(store, load=load)
    reference = seed_store(
        one, models["llama"], store, asked, tokens=96, extra={"load": load}, max_num_batched_tokens=256
    )
    answer = two.build(models["llama"], extra, **tight).run(asked, 96, 1)
    same(answer, reference)
    assert answer["preemptions"] > 0, "nothing was preempted: the case shows nothing"
    assert answer["counters"]["tokens_loaded"] >= whole_blocks(asked)
    assert "errors" not in answer["counters"]
    note(f"batch of 4, chunked, preempted, {load}", asked, answer["counters"])


def test_saving_under_preemption_stores_no_wrong_bytes(
    one: Engine, two: Engine, models: dict[str, Path], store: LocalCluster
) -> None:
    """The engine that saves is the one that is preempted; what it stored serves another one."""
    asked = prompts(40, (300, 340, 380, 420))
    tight = {"max_num_batched_tokens": 256, "num_gpu_blocks_override": 34, "max_model_len": 1024, "max_num_seqs": 4}
    reference = one.build(models["llama"]).run(asked, 96, 1)
    extra = addresses(store, save_decode=True)
    saving = one.build(models["llama"], extra, **tight).run(asked, 96, 1)
    same(saving, reference)
    assert saving["preemptions"] > 0
    longer = [ids + out for ids, out in zip(asked, reference["ids"], strict=True)]
    found_by_all(store, *stored_under(one), asked, share=0.6)
    further = one.build(models["llama"]).run(longer, 12, 1)
    answer = two.build(models["llama"], extra).run(longer, 12, 1)
    same(answer, further)
    assert answer["counters"]["tokens_loaded"] > whole_blocks(asked) / 2
    note("saved while preempted, with decode tokens", longer, answer["counters"])


def test_prefix_cached_in_the_engine_is_not_loaded_again(
    one: Engine, two: Engine, models: dict[str, Path], store: LocalCluster
) -> None:
    asked = prompts(50, (700,))
    extra = addresses(store)
    reference = seed_store(one, models["llama"], store, asked)
    two.build(models["llama"], extra, enable_prefix_caching=True)
    two.run([asked[0][:225]])  # 3 blocks of the store and a page more, in the engine's own cache now
    before = two.settled()["tokens_loaded"]
    answer = two.run(asked, logprobs=1)
    same(answer, reference)
    assert before == 192
    assert answer["counters"]["tokens_loaded"] - before == 640 - 224
    note("with the engine's own prefix cache", asked, answer["counters"])


def test_the_next_turn_finds_what_the_last_one_stored(
    one: Engine, models: dict[str, Path], store: LocalCluster
) -> None:
    """Nothing waits between the turns: saving ends after the request, announcing after that."""
    turns = [prompts(70 + conversation, (300, 420, 540)) for conversation in range(3)]
    one.build(models["llama"])
    reference = [[one.run([told(turn, upto)]) for upto in (1, 2, 3)] for turn in turns]
    one.build(models["llama"], addresses(store, own_saves_wait_ms=20_000))
    expected = loaded = 0
    for turn, said in zip(turns, reference, strict=True):
        for upto in (1, 2, 3):
            answer = one.run([told(turn, upto)])
            same(answer, said[upto - 1])
            expected += whole_blocks([told(turn, upto - 1)]) if upto > 1 else 0
            loaded = answer["counters"].get("tokens_loaded", 0)
            assert loaded == expected
    note("every turn finds the last one's blocks", [told(turn, upto) for turn in turns for upto in (1, 2, 3)], {
        "tokens_loaded": loaded
    })  # fmt: skip


def told(turn: list[list[int]], upto: int) -> list[int]:
    """The prompt of a conversation's turn: everything said before, and a word more, so that no block ends with it."""
    return [token for part in turn[:upto] for token in part] + [3]


def test_tensor_parallel_two(models: dict[str, Path], store: LocalCluster) -> None:
    asked = prompts(60)
    extra = addresses(store)
    env = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    with Engine(env=env) as first:
        reference = seed_store(first, models["llama"], store, asked, tensor_parallel_size=2)
    with Engine(env=env) as second:
        answer = second.build(models["llama"], extra, tensor_parallel_size=2).run(asked, logprobs=1)
    same(answer, reference)
    assert answer["counters"]["tokens_loaded"] == 2 * whole_blocks(asked), "every rank loads its own shard"
    note("llama TP=2 (tokens x ranks)", asked, answer["counters"])
