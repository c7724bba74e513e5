"""What the connector counts: in the engine's log, at its metrics endpoint, and summed at the scheduler."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prometheus_client import Counter as PrometheusCounter
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

COUNTERS: Mapping[str, str] = {
    "lookups": "lookups made for requests",
    "lookups_late": "lookups that did not end within lookup_timeout_ms: counted as misses",
    "lookups_after_own_saves": "lookups put off for a moment, until this engine's own blocks were stored",
    "seconds_waiting": "seconds the scheduler stood still for lookups, summed",
    "pins_refused": "matched requests whose blocks were not kept while they waited: too many at a time",
    "tokens_matched": "prompt tokens found in the store and not in the engine's own cache",
    "tokens_loaded": "tokens whose KV was loaded from the store, per rank",
    "tokens_failed": "tokens matched and then not loaded: computed instead, per rank",
    "tokens_not_worth": "tokens found but predicted to load slower than they are computed",
    "loads": "loads begun, per rank",
    "loads_failed": "loads of which a block was missing at the end, per rank",
    "bytes_loaded": "bytes copied into the engine's pages",
    "bytes_saved": "bytes handed to the store",
    "blocks_saved": "blocks the store took, per rank",
    "blocks_held": "blocks the store had already, per rank",
    "blocks_dropped": "blocks not saved: no room, nobody there, or their pages were needed, per rank",
    "hits_hot": "blocks loaded from the hot tier, per rank",
    "hits_host": "blocks loaded from host memory, per rank",
    "hits_ssd": "blocks loaded from SSD, per rank",
    "hits_redis": "blocks loaded from Redis, per rank",
    "seconds_loading": "seconds that loads took, summed",
    "hints": "begins and ends of requests that were told to the store",
    "hints_dropped": "begins and ends that were not told: too much was in flight",
    "hints_refused": "things a request said of itself that are not of their kind",
    "errors": "faults inside the connector: each is logged, none reaches the engine",
}


class Counters(KVConnectorStats):  # type: ignore[misc]
    """Sums since the last report. `data` maps the names of COUNTERS to numbers."""

    data: dict[str, Any]

    def add(self, name: str, value: float = 1) -> None:
        """Mutates."""
        self.data[name] = self.data.get(name, 0) + value

    def reset(self) -> None:
        self.data = {}

    def aggregate(self, other: KVConnectorStats) -> Counters:
        """Mutates, as the engine expects."""
        for name, value in other.data.items():
            self.add(name, value)
        return self

    def reduce(self) -> dict[str, int | float]:
        return {name: round(value, 3) for name, value in sorted(self.data.items())}

    def is_empty(self) -> bool:
        return not self.data

    def take(self) -> Counters | None:
        """What was counted, and begin anew. None for nothing. Mutates."""
        if not self.data:
            return None
        taken = Counters(data=self.data)
        self.data = {}
        return taken


class Metrics(KVConnectorPromMetrics):  # type: ignore[misc]
    """`vllm:kvstore_*` counters of the engine's metrics endpoint."""

    def __init__(self, vllm_config: Any, metric_types: Any, labelnames: Any, per_engine_labelvalues: Any) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        kind = metric_types[PrometheusCounter]
        self._by_engine: dict[str, dict[int, Any]] = {}
        for name, help_text in COUNTERS.items():
            metric = kind(name=f"vllm:kvstore_{name}", documentation=help_text, labelnames=labelnames)
            self._by_engine[name] = {
                engine: metric.labels(*values) for engine, values in per_engine_labelvalues.items()
            }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        for name, value in transfer_stats_data.items():
            if name in self._by_engine:
                self._by_engine[name][engine_idx].inc(value)
