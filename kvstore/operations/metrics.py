"""A process's figures in Prometheus's text format, from what `status` says. Of the whole process: names no namespace.

Pure. docs/OPERATIONS.md says what each figure means.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from kvstore.types import Tier
from kvstore.wire import common_pb2, coordinator_pb2

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
STATES = ("ok", "full", "degraded", "down", "off")
MEMBERS = ("alive", "suspect", "draining")
ERRORS = ("errors_", "refused_", "pull_errors_", "drain_errors_")
"""Beginnings of the names of counters that count errors; the kind is the rest."""

FAULTS = (
    "blocks_lost_in_flight",
    "corrupt",
    "loads_down",
    "moves_crashed",
    "moves_down",
    "pulled_bad",
    "redis_hints_failed",
    "ticks_failed",
)
"""Counters that count errors by another name."""

DROPPED = ("puts_dropped", "puts_draining")
"""Counters of blocks that were put and not kept."""

Sample = tuple[Mapping[str, str], float]


class Page:
    """Families in the order they are added. Mutates by `add`."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def add(self, name: str, kind: str, help_text: str, samples: Iterable[Sample]) -> None:
        """One family, `kvstore_` before its name. `kind`: gauge or counter."""
        self._lines += [f"# HELP kvstore_{name} {help_text}", f"# TYPE kvstore_{name} {kind}"]
        for labels, value in samples:
            inner = ",".join(f'{label}="{_escaped(text)}"' for label, text in labels.items())
            self._lines.append(f"kvstore_{name}{{{inner}}} {value:.17g}" if inner else f"kvstore_{name} {value:.17g}")

    def histograms(self, name: str, help_text: str, latencies: Iterable[common_pb2.Latency]) -> None:
        """One family of histograms, by tier where they have one."""
        self._lines += [f"# HELP kvstore_{name} {help_text}", f"# TYPE kvstore_{name} histogram"]
        for latency in latencies:
            tier = f'tier="{Tier(latency.tier).name.lower()}"' if latency.tier else ""
            total, comma = 0, "," if tier else ""
            for bound, count in zip([*map(repr, latency.bounds_s), "+Inf"], latency.counts, strict=True):
                total += count
                self._lines.append(f'kvstore_{name}_bucket{{{tier}{comma}le="{bound}"}} {total}')
            labels = f"{{{tier}}}" if tier else ""
            self._lines += [f"kvstore_{name}_sum{labels} {latency.sum_s:.17g}", f"kvstore_{name}_count{labels} {total}"]

    def text(self) -> str:
        return "\n".join(self._lines) + "\n"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def worker_page(status: common_pb2.WorkerStatus) -> str:
    """Everything a worker counts."""
    page = Page()
    member = status.member
    labels = {"role": "worker", "id": member.id, "node": member.node}
    page.add("info", "gauge", "Which process this is.", [(labels, 1)])
    page.add("epoch", "gauge", "Start number of this worker.", [({}, member.epoch)])
    _tiers(page, status)
    counters = status.counters
    page.add("misses_total", "counter", "Blocks asked for that are not held.", [({}, counters["misses"])])
    spills = counters["spilled"] + counters["left_to_redis"]
    page.add("spills_total", "counter", "Blocks that moved to a lower tier.", [({}, spills)])
    page.add("evicted_total", "counter", "Blocks given up to make room.", [({}, counters["evicted"])])
    dropped = sum(counters[name] for name in DROPPED)
    page.add("stores_dropped_total", "counter", "Blocks put and not kept: no room, or over a bound.", [({}, dropped)])
    text = "Tokens whose KV was served: prefill that nobody had to compute."
    page.add("saved_prefill_tokens_total", "counter", text, [({}, status.saved_tokens)])
    text = "Changes that the slowest connected coordinator has not acknowledged."
    page.add("announce_lag", "gauge", text, [({}, status.lag)])
    page.add("coordinators", "gauge", "Coordinators connected.", [({}, status.coordinators)])
    _latencies(page, status.latencies, load="Seconds until a block of a slower tier is in memory, by that tier.",
               get="Seconds of a call for blocks, to its last byte.")  # fmt: skip
    _events(page, status.counters)
    return page.text()


def _tiers(page: Page, status: common_pb2.WorkerStatus) -> None:
    tiers = [({"tier": Tier(tier.tier).name.lower()}, tier) for tier in status.tiers]
    gauges = {
        "tier_used_bytes": ("Bytes used in a tier.", "used"),
        "tier_capacity_bytes": ("Bytes a tier may use.", "capacity"),
        "tier_raw_bytes": ("Bytes of a tier's blocks before they were encoded.", "raw_bytes"),
        "tier_blocks": ("Blocks in a tier.", "blocks"),
    }
    for name, (text, field) in gauges.items():
        page.add(name, "gauge", text, [(labels, getattr(tier, field)) for labels, tier in tiers])
    counters = {
        "tier_hits_total": ("Blocks served from a tier.", "hits"),
        "tier_writes_total": ("Blocks written to a tier.", "writes"),
        "tier_errors_total": ("Operations of a tier that failed.", "errors"),
    }
    for name, (text, field) in counters.items():
        page.add(name, "counter", text, [(labels, getattr(tier, field)) for labels, tier in tiers])
    states = [({**labels, "state": state}, float(tier.state == state)) for labels, tier in tiers for state in STATES]
    page.add("tier_state", "gauge", "1 for the state a tier is in.", states)
    codecs = [({**labels, "codec": use.codec}, use) for labels, tier in tiers for use in tier.codecs]
    seconds = [
        ({**labels, "what": what}, value)
        for labels, use in codecs
        for what, value in (("encode", use.encode_s), ("decode", use.decode_s))
    ]
    page.add("codec_seconds_total", "counter", "Seconds a codec worked.", seconds)


def coordinator_page(status: coordinator_pb2.CoordinatorStatus) -> str:
    """Everything a coordinator counts."""
    page = Page()
    page.add("info", "gauge", "Which process this is.", [({"role": "coordinator", "id": status.self.id}, 1)])
    page.add("directory_blocks", "gauge", "Entries of the directory.", [({}, status.directory_blocks)])
    page.add("directory_complete", "gauge", "1 once every live worker's snapshot is in.", [({}, status.complete)])
    states = [worker.member.state for worker in status.workers]
    named = [*MEMBERS, *sorted({*states} - {*MEMBERS})]
    page.add("workers", "gauge", "Workers by state.", [({"state": name}, states.count(name)) for name in named])
    page.add("directory_lag", "gauge", "Changes that workers have told of and that are not in yet.", [({}, status.lag)])
    page.add("matched_blocks_total", "counter", "Blocks found by lookups.", [({}, status.counters["matched_blocks"])])
    _latencies(page, status.latencies, match="Seconds of a lookup, request to answer.")
    _events(page, status.counters)
    return page.text()


def _latencies(page: Page, latencies: Sequence[common_pb2.Latency], **help_texts: str) -> None:
    for what, text in help_texts.items():
        page.histograms(f"{what}_seconds", text, [latency for latency in latencies if latency.what == what])


def error_kind(counter: str) -> str:
    """What kind of error a counter counts; empty where it counts none. Pure."""
    if counter in FAULTS:
        return counter
    return next((counter.removeprefix(start) for start in ERRORS if counter.startswith(start)), "")


def _events(page: Page, counters: Mapping[str, int]) -> None:
    """Errors by kind, and everything else that is counted by its name."""
    named = sorted(counters.items())
    errors = [({"kind": kind}, value) for name, value in named if (kind := error_kind(name))]
    events = [({"event": name}, value) for name, value in named if not error_kind(name)]
    page.add("errors_total", "counter", "Errors by kind.", errors)
    page.add("events_total", "counter", "Everything else that is counted.", events)
