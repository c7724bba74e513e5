"""What a benchmark prints, and how two things are measured in turns.

A ratio compares A and B measured A B A B ... in one run, by their medians; both absolutes are in `results`.
What could not be measured is None with a reason, and `ok` is false.
"""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Target:
    """A bar for a ratio, or for a result where no ratio has that name."""

    name: str
    at_least: float | None = None
    at_most: float | None = None

    def holds(self, value: float | None) -> bool:
        if value is None:
            return False
        return (self.at_least is None or value >= self.at_least) and (self.at_most is None or value <= self.at_most)

    def as_json(self) -> dict[str, float]:
        bars = {"at_least": self.at_least, "at_most": self.at_most}
        return {name: bar for name, bar in bars.items() if bar is not None}


@dataclass(slots=True)
class Report:
    """Collects one benchmark's figures. Methods mutate it."""

    bench: str
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    ratios: dict[str, float | None] = field(default_factory=dict)
    targets: list[Target] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def result(self, metric: str, values: Sequence[float], unit: str) -> float:
        """Median of `values`; returns it."""
        value = statistics.median(values)
        self.results[metric] = {"value": value, "unit": unit, "n": len(values)}
        return value

    def series(self, metric: str, points: Sequence[tuple[float, float]], unit: str) -> None:
        """Values over time, (when, value) each; the result is the last one."""
        self.results[metric] = {
            "value": points[-1][1],
            "unit": unit,
            "n": len(points),
            "series": [list(p) for p in points],
        }

    def missing(self, metric: str, unit: str, reason: str) -> None:
        self.results[metric] = {"value": None, "unit": unit, "n": 0, "reason": reason}

    def ratio(self, name: str, numerator: str, denominator: str, **bars: float) -> None:
        """The ratio of two results; with `at_least` or `at_most` it becomes a target."""
        a, b = (self.results[metric]["value"] for metric in (numerator, denominator))
        self.ratios[name] = a / b if a is not None and b else None
        if bars:
            self.targets.append(Target(name, **bars))

    def target(self, metric: str, **bars: float) -> None:
        self.targets.append(Target(metric, **bars))

    @property
    def ok(self) -> bool:
        return all(target.holds(self._value(target.name)) for target in self.targets)

    def _value(self, name: str) -> float | None:
        if name in self.ratios:
            return self.ratios[name]
        result = self.results.get(name)
        return None if result is None else result["value"]

    def as_json(self) -> dict[str, Any]:
        return {
            "bench": self.bench,
            "machine": machine(),
            "results": self.results,
            "ratios": self.ratios,
            "targets": {target.name: target.as_json() for target in self.targets},
            "notes": self.notes,
            "ok": self.ok,
        }

    def rows(self) -> list[tuple[str, str, str, str]]:
        """(name, value, bar, verdict), for a table."""
        out = []
        bars = {target.name: target for target in self.targets}
        for name, value in [*self.ratios.items(), *((n, r["value"]) for n, r in self.results.items())]:
            target = bars.get(name)
            unit = "" if name in self.ratios else self.results[name]["unit"]
            bar = (
                "" if target is None else " ".join(f"{k.replace('_', ' ')} {v:g}" for k, v in target.as_json().items())
            )
            verdict = "" if target is None else ("ok" if target.holds(value) else "MISSED")
            out.append((name, "not measured" if value is None else f"{value:.4g} {unit}".strip(), bar, verdict))
        return out


def machine() -> dict[str, Any]:
    return {"cpus": os.cpu_count(), "arch": platform.machine(), "python": platform.python_version()}


def in_turns(
    clock: Callable[[], float],
    contestants: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    between: Callable[[str], object] | None = None,
    warmup: int = 1,
) -> dict[str, list[float]]:
    """Seconds of every contestant, each measured once a round, in order. `between` runs outside the timing after each
    measurement (verification, preparation)."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(-warmup, rounds):
        for name, contestant in contestants.items():
            begin = clock()
            contestant()
            took = clock() - begin
            if turn >= 0:
                seconds[name].append(took)
            if between is not None:
                between(name)
    return seconds
