"""`bench directory --fleet TRACE`: a fleet of workers with the real directory and eviction policy, driven by a trace.

Each worker is a policy object and a count of blocks; the directory is one. A request goes to the worker that has most
of its prompt, unless that one has had more than its share of requests ("bounded loads": Mirrokni, Thorup and
Zadimoghaddam, 2018); what is missing is put there. The trace is asked by so many independent populations that what they
ask for is more than the fleet holds. Beside it runs one cache of the summed size. Time is the trace's.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kvstore.bench.plot import Panel, svg
from kvstore.bench.report import Report
from kvstore.directory.directory import Directory
from kvstore.directory.runs import RemovedRun, Run, RunChange
from kvstore.machine.system import thread_cpu_s
from kvstore.operations.trace import TRACE_BLOCK_TOKENS, Request, read_trace
from kvstore.policies.base import make_policy
from kvstore.spec import Group, ModelSpec, Shard
from kvstore.types import KEY_BYTES, Fidelity, Keys, Tier

SPEC = ModelSpec(model="bench/fleet", groups=(Group(layers=32, kv_heads=8, k_dim=128, v_dim=128),), block_tokens=64)
WHOLE = Shard.whole(SPEC)
UNIT = TRACE_BLOCK_TOKENS // SPEC.block_tokens  # blocks of one block of the trace: evicted together
GROUP_UNITS = SPEC.group_blocks // UNIT
BLOCK_BYTES = 4 << 20
POLICY = "s3fifo"
LOAD_SLACK = 1.25  # of the mean number of requests, before a worker is passed over
TURNOVER = 1.5  # distinct blocks asked for, in fleets
COORDINATORS = 3
STEPS = 4  # sizes of the fleet, each twice the one before
NONE = -1


class Cache:
    """A capacity in units, evicted by the policy, children before their parents."""

    def __init__(self, units: int) -> None:
        self.capacity = units
        self.rows: dict[int, int] = {}
        self.policy = make_policy(POLICY)
        self._ids = array("Q")
        self._parents = array("q")
        self._children = array("i")
        self._free: list[int] = []

    def touch(self, unit: int) -> None:
        row = self.rows.get(unit)
        if row is not None:
            self.policy.touch(row)

    def put(self, unit: int, parent: int) -> list[int]:
        """Mutates; the units that had to go. One that is there already, behind a gap, stays where it is."""
        gone: list[int] = []
        if unit in self.rows:
            self.touch(unit)
            return gone
        while len(self.rows) >= self.capacity:
            row = self.policy.victim(lambda row: not self._children[row])
            if row is None:
                return gone
            gone.append(self._evict(row))
        row = self._row()
        above = self.rows.get(parent, NONE)
        self._ids[row], self._parents[row], self._children[row] = unit, above, 0
        if above != NONE:
            self._children[above] += 1
        self.rows[unit] = row
        self.policy.admit(row, unit, 1)
        return gone

    def _row(self) -> int:
        if self._free:
            return self._free.pop()
        self._ids.append(0)
        self._parents.append(NONE)
        self._children.append(0)
        return len(self._ids) - 1

    def _evict(self, row: int) -> int:
        self.policy.remove(row, evicted=True)
        above = self._parents[row]
        if above != NONE:
            self._children[above] -= 1
            if not self._children[above]:
                self.policy.ready(above)
        self._free.append(row)
        unit = self._ids[row]
        del self.rows[unit]
        return unit


@dataclass(slots=True)
class Outcome:
    """One run's counts."""

    workers: int
    requests: int = 0
    accesses: int = 0  # units
    hits: int = 0
    one_hits: int = 0
    announced: int = 0  # blocks
    runs: int = 0  # named in replies
    span_s: float = 0.0
    lookup_s: float = 0.0
    apply_s: float = 0.0
    stored: int = 0  # blocks
    unique: int = 0
    nbytes: int = 0
    loads: list[int] = field(default_factory=list)  # requests of each worker


def unit_keys(units: Sequence[int]) -> bytes:
    """The keys of `UNIT` blocks a unit, as good as hashes, packed."""
    numbers = (np.array(units, np.uint64)[:, None] * np.uint64(UNIT) + np.arange(UNIT, dtype=np.uint64)).ravel()
    halves = np.stack((_mixed(numbers), _mixed(np.invert(numbers))), axis=1)
    return halves.tobytes()


def _mixed(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """SplitMix64's finaliser."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: npt.NDArray[Any] = values ^ (values >> np.uint64(31))
    return mixed


class FleetRun:
    """A fleet and its directory."""

    def __init__(self, workers: int, units: int) -> None:
        self.directory = Directory(blocks_max=2 * units * UNIT)
        self.directory.learn_spec(SPEC)
        self.directory.learn_shard(WHOLE)
        self.names = [f"w{number}" for number in range(workers)]
        self.number = {name: number for number, name in enumerate(self.names)}
        self.caches = [Cache(units // workers) for _ in self.names]
        self.one = Cache(units)
        self.outcome = Outcome(workers, loads=[0] * workers)

    def ask(self, units: list[int]) -> None:
        """One request: looked up, its hits touched, the rest computed and put by one worker."""
        outcome, packed = self.outcome, unit_keys(units)
        begin = thread_cpu_s()
        match = self.directory.match(SPEC.root, Keys(packed), [WHOLE], Fidelity.EXACT)
        outcome.lookup_s += thread_cpu_s() - begin
        held = match.blocks // UNIT
        outcome.requests += 1
        outcome.accesses += len(units)
        outcome.hits += held
        outcome.runs += len(match.runs)
        has: dict[int, int] = {}
        for run in match.runs:
            number = self.number[run.holder]
            has[number] = has.get(number, 0) + run.count
            for unit in units[run.first_depth // UNIT : (run.first_depth + run.count) // UNIT]:
                self.caches[number].touch(unit)
        self._put(self._route(has), units, held, packed)
        self._one(units)

    def _route(self, has: dict[int, int]) -> int:
        loads = self.outcome.loads
        most = LOAD_SLACK * (self.outcome.requests / len(loads)) + 1
        fit = [number for number in has if loads[number] <= most]
        chosen = max(fit, key=has.__getitem__) if fit else loads.index(min(loads))
        loads[chosen] += 1
        return chosen

    def _put(self, number: int, units: list[int], held: int, packed: bytes) -> None:
        cache = self.caches[number]
        changes: list[RunChange] = []
        gone: list[int] = []
        if held == len(units):
            return
        for at in range(held, len(units)):
            gone += cache.put(units[at], units[at - 1] if at else NONE)
        mine = [at for at in range(held, len(units)) if units[at] in cache.rows]
        for at in mine:  # a unit a run: what a prefill in pieces announces; four make a placement group
            first = at - at % GROUP_UNITS
            before = packed[(at * UNIT - 1) * KEY_BYTES : at * UNIT * KEY_BYTES] if at else SPEC.root
            keys = Keys(packed[at * UNIT * KEY_BYTES : (at + 1) * UNIT * KEY_BYTES])
            group = packed[first * UNIT * KEY_BYTES :][:KEY_BYTES]
            changes.append(
                Run(SPEC.root, WHOLE.digest, Tier.HOST, Fidelity.EXACT, before, at * UNIT, keys, group, BLOCK_BYTES)
            )
        known = [unit for unit in gone if unit not in cache.rows]
        if known:
            changes.append(RemovedRun(WHOLE.digest, Keys(unit_keys(known))))
        begin = thread_cpu_s()
        self.directory.apply(self.names[number], changes)
        self.outcome.apply_s += thread_cpu_s() - begin
        self.outcome.announced += (len(mine) + len(known)) * UNIT

    def _one(self, units: list[int]) -> None:
        """The same request of one cache of the summed size."""
        one = self.one
        held = 0
        while held < len(units) and units[held] in one.rows:
            one.touch(units[held])
            held += 1
        self.outcome.one_hits += held
        for at in range(held, len(units)):
            one.put(units[at], units[at - 1] if at else NONE)

    def close(self) -> Outcome:
        """Counts at the end; the directory is what the workers have."""
        self.directory.validate()
        outcome = self.outcome
        outcome.stored = UNIT * sum(len(cache.rows) for cache in self.caches)
        outcome.unique = UNIT * len({unit for cache in self.caches for unit in cache.rows})
        assert self.directory.blocks == outcome.stored, "the directory is not what the workers have"
        outcome.nbytes = self.directory.nbytes
        return outcome


def run_fleet(requests: Sequence[Request], workers: int, blocks: int, turnover: float = TURNOVER) -> Outcome:
    """Populations of the trace in turns, request by request; `turnover`: distinct blocks asked for, in fleets."""
    units = max(workers, blocks // UNIT)
    distinct = len({unit for request in requests for unit in request.hash_ids})
    populations = max(1, round(turnover * units / max(1, distinct)))
    fleet = FleetRun(workers, units)
    for request in requests:
        for population in range(populations):
            ids = [unit * populations + population for unit in request.hash_ids]
            if ids:
                fleet.ask(ids)
    span = requests[-1].timestamp_ms - requests[0].timestamp_ms
    fleet.outcome.span_s = max(span / 1000, 1.0)
    return fleet.close()


def measure_fleet(report: Report, path: str, workers: int, blocks: int, plot: str) -> None:
    """Fleets of up to `workers` with `blocks` in all, and of halves; a worker's blocks and load are the same."""
    requests = list(read_trace(path))
    outcomes: list[Outcome] = []
    for step in reversed(range(STEPS)):
        size = workers >> step
        if size:
            outcomes.append(run_fleet(requests, size, blocks * size // workers))
            _say(report, outcomes[-1])
    last = outcomes[-1]
    report.result("fleet_hits", [100 * last.hits / last.accesses], "%")
    report.result("one_cache_hits", [100 * last.one_hits / last.accesses], "%")
    report.ratio("fleet_hits_vs_one_cache", "fleet_hits", "one_cache_hits")
    report.result("unique_share_of_stored", [100 * last.unique / last.stored], "%")
    report.notes.append(
        f"{Path(path).name}: {len(requests)} requests, of as many populations as fill the fleet {TURNOVER:g} times, "
        f"policy {POLICY}; announcements go to every coordinator, lookups to one of {COORDINATORS}"
    )
    if plot:
        Path(plot).write_text(_plot(outcomes))


def _say(report: Report, outcome: Outcome) -> None:
    name = f"workers_{outcome.workers}"
    for metric, value, unit in (
        ("blocks", outcome.stored, "blocks"),
        ("unique", 100 * outcome.unique / outcome.stored, "%"),
        ("hits", 100 * outcome.hits / outcome.accesses, "%"),
        ("one_cache_hits", 100 * outcome.one_hits / outcome.accesses, "%"),
        ("announced_a_s", outcome.announced / outcome.span_s, "blocks/s"),
        ("lookups_a_s", outcome.requests / outcome.span_s / COORDINATORS, "1/s"),
        ("lookup", 1e6 * outcome.lookup_s / outcome.requests, "us"),
        ("applied_a_s", outcome.announced / max(outcome.apply_s, 1e-9), "blocks/s"),
        ("core", 100 * _core(outcome), "%"),
        ("runs_a_reply", outcome.runs / outcome.requests, ""),
        ("busiest_worker", max(outcome.loads) / (outcome.requests / outcome.workers), "x mean"),
        ("directory_bytes_a_block", outcome.nbytes / outcome.stored, "bytes"),
    ):
        report.result(f"{name}_{metric}", [value], unit)


def _core(outcome: Outcome) -> float:
    """Of one core, what the directory of one coordinator takes in the trace's own time."""
    return (outcome.apply_s + outcome.lookup_s / COORDINATORS) / outcome.span_s


def _plot(outcomes: Sequence[Outcome]) -> str:
    hits = {
        "fleet": [100 * o.hits / o.accesses for o in outcomes],
        "one cache of the summed size": [100 * o.one_hits / o.accesses for o in outcomes],
        "unique bytes / stored bytes": [100 * o.unique / o.stored for o in outcomes],
    }
    load = {
        "blocks announced": [o.announced / o.span_s / 1000 for o in outcomes],
        "lookups": [o.requests / o.span_s / COORDINATORS / 1000 for o in outcomes],
    }
    cost = {"lookup": [1e6 * o.lookup_s / o.requests for o in outcomes]}
    share = {"directory": [100 * _core(o) for o in outcomes]}
    return svg(
        "A simulated fleet, blocks and load a worker the same",
        [o.workers for o in outcomes],
        "workers",
        [
            Panel("Hits", "%", hits),
            Panel("Load of a coordinator", "1000/s", load),
            Panel("Lookup", "us", cost),
            Panel("Directory", "% of a core", share),
        ],
    )
