"""`KVStoreConnector`: the class the engine loads. It passes every call on; nothing it passes on raises into the engine.

Written against vLLM 0.32 (`KVConnectorBase_V1`); `identity.SUPPORTED` names the versions.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar, cast

import torch
import vllm
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorRole,
    KVConnectorTransferResults,
    SupportsHMA,
)
from vllm.platforms import current_platform

from kvstore.client.bulk import ready
from kvstore.client.engine_face import EngineClient
from kvstore.config import ClientConfig
from kvstore.directory.block_table import prepare
from kvstore.errors import SetupError
from kvstore.integrations.vllm.counters import Counters, Metrics
from kvstore.integrations.vllm.identity import Identity, identify
from kvstore.integrations.vllm.metadata import Report, Step
from kvstore.integrations.vllm.options import read_options
from kvstore.integrations.vllm.scheduler import SchedulerSide
from kvstore.integrations.vllm.worker import WorkerSide
from kvstore.machine.system import RealClock

logger = logging.getLogger("vllm.kvstore")

CLOSE_PATIENCE_S = 2.0
"""Saves that are under way when the engine stops get so long to end."""

F = TypeVar("F", bound=Callable[..., Any])


def contained(otherwise: Callable[[], Any]) -> Callable[[F], F]:
    """A fault of ours is logged and counted, and the engine gets `otherwise()`: it computes what we did not bring."""

    def wrap(method: F) -> F:
        @functools.wraps(method)
        def call(self: KVStoreConnector, *args: Any, **kwargs: Any) -> Any:
            try:
                return method(self, *args, **kwargs)
            except Exception:  # whatever is wrong here, the engine must go on
                logger.exception("kvstore: %s failed; the engine goes on without", method.__name__)
                self.counters.add("errors")
                return otherwise()

        return cast(F, call)

    return wrap


class KVStoreConnector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]
    """One side (`role`) of the connector. SetupError where engine and connector do not fit, before it serves."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        transfer = vllm_config.kv_transfer_config
        if transfer.kv_load_failure_policy != "recompute":
            raise SetupError(
                f"kv_load_failure_policy is {transfer.kv_load_failure_policy!r}: a block that vanished would fail its "
                "request; set it to 'recompute'"
            )
        options, client = read_options(transfer.kv_connector_extra_config)
        self.identity = self._identify(vllm_config, kv_cache_config, options)
        self._loads, self._saves = transfer.is_kv_consumer, transfer.is_kv_producer
        self._stopped = False
        self._page_count = kv_cache_config.num_blocks
        if role == KVConnectorRole.SCHEDULER and "watch" not in transfer.kv_connector_extra_config:
            client = replace(client, watch=True)  # the one process of an engine that looks up
        self._face = self._client(client)
        self.scheduler: SchedulerSide | None = None
        self.worker: WorkerSide | None = None
        if role == KVConnectorRole.SCHEDULER:
            self.scheduler = SchedulerSide(self.identity, options, self._face, RealClock())
        else:
            rank = vllm_config.parallel_config.rank % vllm_config.parallel_config.tensor_parallel_size
            self.worker = WorkerSide(self.identity, rank, options, self._face, RealClock())
        logger.info("kvstore: %s, spec %s", role.name.lower(), self.identity.spec.canonical_json())

    @staticmethod
    def _identify(vllm_config: Any, kv_cache_config: Any, options: Any) -> Identity:
        return identify(vllm_config, kv_cache_config, options, vllm.__version__, platform_name())

    @staticmethod
    def _client(config: ClientConfig) -> EngineClient:
        """Compiled loops are made, or loaded, first: the first request does not wait for them, nor does connecting."""
        ready()
        if config.watch:
            prepare()
        return EngineClient(config)

    @property
    def counters(self) -> Counters:
        side = self.scheduler or self.worker
        assert side is not None
        return side.counters

    @property
    def requires_kv_delivery(self) -> bool:
        return False  # a cache: a save that is dropped is a later miss

    # --- workers ---------------------------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        assert self.worker is not None
        self.worker.register(kv_caches, self._page_count)

    def _bound(self) -> Step:
        step = self._get_connector_metadata()
        assert isinstance(step, Step)
        return step

    @contained(lambda: None)
    def handle_preemptions(self, kv_connector_metadata: Any) -> None:
        assert self.worker is not None
        self.worker.step_begins(kv_connector_metadata)

    @contained(lambda: None)
    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        assert self.worker is not None
        self.worker.begin(self._bound())

    def wait_for_layer_load(self, layer_name: str) -> None:
        return  # loads are whole before a request is computed

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        return  # saved by page when the step is over

    @contained(lambda: None)
    def wait_for_save(self) -> None:
        assert self.worker is not None
        self.worker.end(self._bound())

    @contained(KVConnectorTransferResults)
    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        assert self.worker is not None
        sent, received, failed = self.worker.finished()
        return KVConnectorTransferResults(finished_sending=sent, finished_recving=received, failed_recving=failed)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        results = self.get_transfer_results(finished_req_ids)
        return results.finished_sending, results.finished_recving

    @contained(set)
    def get_block_ids_with_load_errors(self) -> set[int]:
        assert self.worker is not None
        return self.worker.load_errors()

    @contained(lambda: None)
    def build_connector_worker_meta(self) -> Report | None:
        assert self.worker is not None
        return self.worker.report()

    # --- scheduler -------------------------------------------------------------------------------------------------

    @contained(lambda: (0, False))
    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        assert self.scheduler is not None
        if self._stopped:
            return 0, False
        return self.scheduler.matched(request, num_computed_tokens, self._loads)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        assert self.scheduler is not None
        if num_external_tokens > 0:
            self.scheduler.allocated(request, blocks.get_block_ids(), num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> Step:
        assert self.scheduler is not None
        step = self.scheduler.step(scheduler_output)
        if self._saves and not self._stopped:
            self._add_saves(step, scheduler_output)
        return step

    @contained(lambda: None)
    def _add_saves(self, step: Step, scheduler_output: Any) -> None:
        assert self.scheduler is not None
        step.saves = self.scheduler.saves(scheduler_output)

    @contained(lambda: None)
    def update_connector_output(self, connector_output: Any) -> None:
        assert self.scheduler is not None
        if connector_output.kv_connector_worker_meta is not None:
            self.scheduler.reported(connector_output.kv_connector_worker_meta)
        self.scheduler.loaded(connector_output.finished_recving or ())
        if connector_output.kv_connector_stats is not None:
            self.scheduler.totals.aggregate(connector_output.kv_connector_stats)

    @contained(lambda: (False, None))
    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        assert self.scheduler is not None
        return self.scheduler.finished(request), None

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished_all_groups(request, (block_ids,))

    def reset_cache(self) -> bool:
        """The weights may have changed: the spec no longer says what is computed, so nothing is shared from now on."""
        logger.warning("kvstore: the cache was reset; nothing is loaded or saved until the engine starts again")
        self._stopped = True
        return True

    # --- both ------------------------------------------------------------------------------------------------------

    def get_kv_connector_stats(self) -> Counters | None:
        side = self.scheduler or self.worker
        assert side is not None
        taken = side.counters.take()
        if self.scheduler is not None and taken is not None:
            self.scheduler.totals.aggregate(taken)
        return taken

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> Counters:
        return Counters(data=data if data is not None else {})

    @classmethod
    def build_prom_metrics(
        cls, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: Any
    ) -> Metrics:
        return Metrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    @contained(lambda: None)
    def shutdown(self) -> None:
        if self.worker is not None:
            self.worker.close(CLOSE_PATIENCE_S)
        self._face.close()


def platform_name() -> str:
    """What decides the bytes of a page and the low bits of its values on this machine, beside the engine's version."""
    if current_platform.is_cpu():
        amx = "+amx" if torch.cpu._is_amx_tile_supported() else ""
        return f"cpu:{torch.backends.cpu.get_cpu_capability()}{amx}"
    return f"{current_platform.device_type}:{current_platform.get_device_capability()}"
