"""These tests need vLLM: an environment of their own, `make test-engines`. Elsewhere they are not collected."""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstore.bench.engine_models import make_model
from tests.engines.harness import Engine

REQUIRED = bool(os.environ.get("TEST_ENGINES"))
"""Set by `make test-engines`: a missing vLLM is an error then."""

if not REQUIRED and importlib.util.find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    with warnings.catch_warnings():  # ours are errors; those of the engine's imports are not ours
        warnings.simplefilter("ignore")
        importlib.import_module("vllm.distributed.kv_transfer.kv_connector.v1.base")

Row = tuple[str, float, float, float]

TABLE: list[Row] = []
"""(case, prompt tokens, tokens served from the store, tokens that failed to load), printed at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.timeout(900))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if TABLE:
        terminalreporter.section("tokens served from the store")
        for case, prompt_tokens, loaded, failed in TABLE:
            terminalreporter.write_line(f"{case:<48} {prompt_tokens:6.0f} {loaded:6.0f} {failed:6.0f}")


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {family: make_model(folder / family, family) for family in ("llama", "qwen3", "gemma3")}


@pytest.fixture(scope="session")
def one() -> Iterator[Engine]:
    """The first replica's process."""
    with Engine() as engine:
        yield engine


@pytest.fixture(scope="session")
def two(one: Engine) -> Iterator[Engine]:
    """The second replica's process."""
    with Engine() as engine:
        yield engine
