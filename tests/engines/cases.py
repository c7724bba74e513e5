"""The steps the cases share: what a run without connector says, what replica one saves, what replica two loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvstore.bench.engine_models import prompt
from kvstore.fleet.local_cluster import LocalCluster
from tests.engines.conftest import TABLE
from tests.engines.harness import Engine, addresses, found_by_all, stored_under

LOGPROB_TOLERANCE = {"float32": 1e-4}
"""bf16 has exact ties: only ids are compared there."""


def prompts(seed: int, lengths: tuple[int, ...] = (438, 558)) -> list[list[int]]:
    return [prompt(length, 1000 * seed + index) for index, length in enumerate(lengths)]


def whole_blocks(asked: list[list[int]], block: int = 64) -> int:
    """Tokens a second replica can load: full blocks, the last token never."""
    return sum((len(ids) - 1) // block * block for ids in asked)


def same(answer: dict[str, Any], reference: dict[str, Any], dtype: str = "float32") -> None:
    assert answer["ids"] == reference["ids"]
    assert set(answer["reasons"]) == {"length"}, "the engine failed a request"
    if dtype in LOGPROB_TOLERANCE and "logprobs" in answer and "logprobs" in reference:
        for mine, its in zip(answer["logprobs"], reference["logprobs"], strict=True):
            assert mine == pytest.approx(its, abs=LOGPROB_TOLERANCE[dtype])


def seed_store(
    engine: Engine,
    model: Path,
    cluster: LocalCluster,
    asked: list[list[int]],
    tokens: int = 12,
    extra: dict[str, Any] | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """The reference of an engine without connector. Then one with it computes the same, its blocks are saved, and
    everybody finds them."""
    reference = engine.build(model, **settings).run(asked, tokens, 1)
    engine.build(model, addresses(cluster, **(extra or {})), **settings)
    same(engine.run(asked, tokens, 1), reference, settings.get("dtype", "float32"))
    blocks = sum(len(ids) // 64 for ids in asked)
    ranks = settings.get("tensor_parallel_size", 1)
    engine.settled(blocks_saved=blocks * ranks)
    found_by_all(cluster, *stored_under(engine), asked)
    return reference


def note(case: str, asked: list[list[int]], counters: dict[str, float]) -> None:
    TABLE.append(
        (case, sum(map(len, asked)), counters.get("tokens_loaded", 0), counters.get("tokens_failed", 0)),
    )
