"""What the demo prints: a table of requests, a table of tiers, a list of checks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich import box
from rich.table import Table

from kvstore.demo.checks import Check
from kvstore.demo.peers import Answer

TIERS = ("hot", "host", "ssd", "redis")
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Row:
    """One request, with the cache and without. Seconds and tokens."""

    phase: str
    name: str
    replica: str
    prompt_tokens: int
    tokens_by_tier: dict[str, int]
    matched_tokens: int
    computed_tokens: int
    with_s: float
    without_s: float
    store_s: float
    put_states: dict[str, int]
    equal: bool

    @classmethod
    def of(cls, phase: str, name: str, replica: str, cached: Answer, plain: Answer) -> Row:
        return cls(
            phase=phase,
            name=name,
            replica=replica,
            prompt_tokens=cached.prompt_tokens,
            tokens_by_tier={tier: cached.tokens_by_tier.get(tier, 0) for tier in TIERS},
            matched_tokens=cached.matched_tokens,
            computed_tokens=cached.prompt_tokens - cached.loaded_tokens,
            with_s=cached.prefill_s,
            without_s=plain.prefill_s,
            store_s=cached.store_s,
            put_states=cached.put_states,
            equal=cached.tokens == plain.tokens,
        )

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(slots=True)
class TierRow:
    """One tier of one worker. Bytes; `raw` is what its blocks have uncompressed."""

    worker: str
    tier: str
    blocks: int
    used: int
    capacity: int
    raw: int
    state: str

    @property
    def ratio(self) -> float:
        """Raw bytes over bytes used, 0 where nothing lies."""
        return self.raw / self.used if self.used and self.blocks else 0.0

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "ratio": round(self.ratio, 3)}


@dataclass(slots=True)
class Report:
    """Everything one run found."""

    rows: list[Row] = field(default_factory=list)
    tiers: dict[str, list[TierRow]] = field(default_factory=dict)  # by the moment they were read
    workers: dict[str, dict[str, dict[str, int]]] = field(default_factory=dict)  # moment -> node -> its counters
    clients: dict[str, dict[str, int]] = field(default_factory=dict)  # replica -> what its client counted

    def hits(self, phase: str = "") -> dict[str, int]:
        """Tokens by tier over the rows of one phase, or all."""
        chosen = [row for row in self.rows if not phase or row.phase == phase]
        return {tier: sum(row.tokens_by_tier[tier] for row in chosen) for tier in TIERS}


def line(row: Row) -> str:
    """One request as a line, for terminals that do not redraw."""
    tiers = " ".join(f"{tier} {row.tokens_by_tier[tier]}" for tier in TIERS if row.tokens_by_tier[tier]) or "-"
    return (
        f"{row.phase:<8} {row.name:<12} {row.replica}  {row.prompt_tokens:>5} tokens, from {tiers:<28} "
        f"{row.with_s:6.2f} s with, {row.without_s:6.2f} s without"
    )


def requests_table(rows: Sequence[Row]) -> Table:
    table = Table(title="Requests: where each prompt's tokens came from", box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("phase")
    table.add_column("request")
    table.add_column("replica")
    for name in ("prompt", *TIERS, "computed", "with", "without", "faster"):
        table.add_column(name, justify="right")
    table.add_column("equal")
    for row in rows:
        table.add_row(
            row.phase,
            row.name,
            row.replica,
            str(row.prompt_tokens),
            *(str(row.tokens_by_tier[tier] or "") for tier in TIERS),
            str(row.computed_tokens),
            f"{row.with_s:.2f} s",
            f"{row.without_s:.2f} s",
            f"{row.without_s / row.with_s:.1f}x" if row.with_s else "",
            "yes" if row.equal else "NO",
        )
    return table


def tiers_table(title: str, rows: Sequence[TierRow]) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("worker")
    table.add_column("tier")
    for name in ("blocks", "used", "capacity", "raw", "ratio"):
        table.add_column(name, justify="right")
    table.add_column("state")
    for row in rows:
        table.add_row(
            row.worker,
            row.tier,
            str(row.blocks),
            f"{row.used / MIB:.1f} MiB",
            f"{row.capacity / MIB:.0f} MiB",
            f"{row.raw / MIB:.1f} MiB",
            f"{row.ratio:.2f}x" if row.ratio else "",
            row.state,
        )
    return table


def checks_table(checks: Sequence[Check]) -> Table:
    table = Table(title="Checks", box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("")
    table.add_column("claim")
    table.add_column("tried", justify="right")
    table.add_column("detail")
    for check in checks:
        detail = check.detail if check.ok else "; ".join(check.failed[:3]) or check.detail or "nothing was tried"
        table.add_row("ok" if check.ok else "FAILED", check.name, str(check.tried), detail)
    return table
