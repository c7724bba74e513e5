"""What `kvstore top` shows: figures of two moments as rates, and a screen of plain text. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kvstore.histogram import quantile
from kvstore.operations.metrics import DROPPED, error_kind
from kvstore.operations.observe import View
from kvstore.types import Tier
from kvstore.wire import common_pb2, coordinator_pb2

Latencies = Sequence[common_pb2.Latency]


def top_object(now: View, before: View | None, seconds: float, coordinators: Sequence[str]) -> dict[str, Any]:
    """Everything a screen shows. Rates are a second, over `seconds` since `before`; null without one, or where a
    process has started since."""
    old_workers = before.workers() if before is not None else {}
    old = before.statuses if before is not None else {}
    return {
        "seconds": round(seconds, 3) if before is not None else None,
        "coordinators": [
            _coordinator(address, now, old.get(address), seconds)
            for address in dict.fromkeys([*coordinators, *now.statuses])
        ],
        "workers": [_worker(w, _same(w, old_workers.get(w.member.id)), seconds) for w in now.workers().values()],
    }


def _same(now: common_pb2.WorkerStatus, before: common_pb2.WorkerStatus | None) -> common_pb2.WorkerStatus | None:
    """The status before, if it is of the same life."""
    return before if before is not None and before.member.epoch == now.member.epoch else None


def _rate(now: float, before: float | None, seconds: float) -> float | None:
    return None if before is None or seconds <= 0 else round(max(0.0, now - before) / seconds, 2)


def _counter_rate(names: Sequence[str], now: Mapping[str, int], before: Mapping[str, int] | None, s: float) -> Any:
    total = sum(now.get(name, 0) for name in names)
    return _rate(total, None if before is None else sum(before.get(name, 0) for name in names), s)


def _latency(what: str, now: Latencies, before: Latencies | None) -> dict[str, float | None]:
    """p50 and p99 in milliseconds, of what happened since `before`; of all, where there was nothing before."""
    mine = [latency for latency in now if latency.what == what]
    counts = [sum(column) for column in zip(*(latency.counts for latency in mine), strict=False)]
    earlier = [latency for latency in before or () if latency.what == what]
    past = [sum(column) for column in zip(*(latency.counts for latency in earlier), strict=False)]
    if past:
        counts = [max(0, count - gone) for count, gone in zip(counts, past, strict=False)]
    bounds = mine[0].bounds_s if mine else ()
    found = {name: quantile(bounds, counts, share) if counts else None for name, share in (("p50", 0.5), ("p99", 0.99))}
    return {f"{name}_ms": None if value is None else round(1e3 * value, 3) for name, value in found.items()}


def _coordinator(
    address: str, view: View, before: coordinator_pb2.CoordinatorStatus | None, seconds: float
) -> dict[str, Any]:
    status = view.statuses.get(address)
    if status is None:
        return {"address": address, "state": "unreachable"}
    if before is not None and before.self.boot_id != status.self.boot_id:
        before = None
    return {
        "address": address,
        "state": "complete" if status.complete else "filling",
        "blocks": status.directory_blocks,
        "matches_s": _counter_rate(
            ["matches"], status.counters, before.counters if before is not None else None, seconds
        ),
        **_latency("match", status.latencies, before.latencies if before is not None else None),
        "lag": status.lag,
        "gaps": status.counters.get("gaps", 0),
    }


def _worker(now: common_pb2.WorkerStatus, before: common_pb2.WorkerStatus | None, seconds: float) -> dict[str, Any]:
    old_tiers = {tier.tier: tier for tier in before.tiers} if before is not None else {}
    counters = before.counters if before is not None else None
    errors = [name for name in now.counters if error_kind(name)]
    return {
        "id": now.member.id,
        "node": now.member.node,
        "state": now.member.state,
        "tiers": {Tier(tier.tier).name.lower(): _tier(tier, old_tiers.get(tier.tier), seconds) for tier in now.tiers},
        "misses_s": _counter_rate(["misses"], now.counters, counters, seconds),
        "loads_s": _counter_rate(["loads"], now.counters, counters, seconds),
        "spills_s": _counter_rate(["spilled", "left_to_redis"], now.counters, counters, seconds),
        "dropped_s": _counter_rate(DROPPED, now.counters, counters, seconds),
        "saved_tokens_s": _rate(now.saved_tokens, before.saved_tokens if before is not None else None, seconds),
        **_latency("get", now.latencies, before.latencies if before is not None else None),
        "lag": now.lag,
        "errors": sum(now.counters[name] for name in errors) + sum(tier.errors for tier in now.tiers),
    }


def _tier(now: common_pb2.TierStatus, before: common_pb2.TierStatus | None, seconds: float) -> dict[str, Any]:
    return {
        "state": now.state,
        "used": now.used,
        "capacity": now.capacity,
        "hits_s": _rate(now.hits, before.hits if before is not None else None, seconds),
    }


# --- the screen ------------------------------------------------------------------------------------------------------

COORDINATOR = ("coordinator", "state", "blocks", "match/s", "p50 ms", "p99 ms", "lag", "gaps")
WORKER = ("worker", "node", "state", "hit/s by tier", "miss/s", "load/s", "spill/s", "drop/s", "saved tok/s", "p50 ms",
          "p99 ms", "lag", "errors", "used by tier")  # fmt: skip


def screen(top: Mapping[str, Any], columns: int, lines: int) -> str:
    """Two tables, cut to a terminal of that size: what does not fit is left out, and the last line says so. Pure."""
    rows = [_row(c, ("address", "state", "blocks", "matches_s", "p50_ms", "p99_ms", "lag", "gaps"))
            for c in top["coordinators"]]  # fmt: skip
    text = [*_table(COORDINATOR, rows), ""]
    workers = []
    for worker in top["workers"]:
        tiers = worker["tiers"]
        hits = " ".join(f"{name}:{_figure(tier['hits_s'])}" for name, tier in tiers.items() if tier["state"] != "off")
        used = " ".join(
            f"{name}:{_share(tier)}{'' if tier['state'] == 'ok' else '!' + tier['state']}"
            for name, tier in tiers.items()
            if tier["state"] != "off"
        )
        middle = _row(worker, ("misses_s", "loads_s", "spills_s", "dropped_s", "saved_tokens_s", "p50_ms", "p99_ms",
                               "lag", "errors"))  # fmt: skip
        workers.append([worker["id"], worker["node"], worker["state"], hits, *middle, used])
    text += _table(WORKER, workers)
    if len(text) > lines:
        text = [*text[: max(0, lines - 1)], f"... {len(text) - lines + 1} more lines: a taller terminal, or --json"]
    return "\n".join(line[:columns].rstrip() for line in text)


def _row(values: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    return [_figure(values.get(name)) for name in names]


def _figure(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.0f}" if value >= 100 else f"{value:.1f}"
    return str(value)


def _share(tier: Mapping[str, Any]) -> str:
    return f"{100 * tier['used'] / tier['capacity']:.0f}%" if tier["capacity"] else "0%"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (head, *rows)]
