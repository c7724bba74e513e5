"""What the demo claims, counted request by request."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kvstore.demo.peers import Answer

LOGITS_TOLERANCE = 1e-4
CONTROL_AT_LEAST = 1e-2
"""Zeroed blocks must move the logits by this much: a hundred times what is tolerated above."""


@dataclass(slots=True)
class Check:
    """One claim. It holds when something was tried and nothing failed."""

    name: str
    tried: int = 0
    failed: list[str] = field(default_factory=list)
    detail: str = ""

    @property
    def ok(self) -> bool:
        return self.tried > 0 and not self.failed

    def note(self, holds: bool, problem: str) -> None:
        """Count one case. Mutates."""
        self.tried += 1
        if not holds:
            self.failed.append(problem)

    def as_json(self) -> dict[str, Any]:
        return {"name": self.name, "ok": self.ok, "tried": self.tried, "failed": self.failed, "detail": self.detail}


class Checks:
    """All claims of one run, and the digests of every block that was given to the store."""

    def __init__(self) -> None:
        self.tokens = Check("greedy tokens equal a run without the cache")
        self.logits = Check(f"logits within {LOGITS_TOLERANCE:g} of a run without the cache")
        self.bytes = Check("loaded KV bytes equal the stored ones")
        self.control = Check("zeroed blocks change the output")
        self.tiers = Check("hits from every tier")
        self.filled = Check("blocks lie in every tier")
        self.outage = Check("requests go on while a worker is dead")
        self.recovery = Check("the worker comes back and its blocks are found again on SSD and in Redis")
        self.clean = Check("no process had to be killed at the end")
        self.logits_difference = 0.0
        self.control_difference = float("inf")
        self._stored: dict[str, dict[str, None]] = {}

    def all(self) -> list[Check]:
        return [
            self.tokens, self.logits, self.bytes, self.control, self.tiers, self.filled, self.outage, self.recovery,
            self.clean,
        ]  # fmt: skip

    @property
    def ok(self) -> bool:
        return all(check.ok for check in self.all())

    def stored(self, answer: Answer) -> None:
        """Remember what was given to the store. A block computed twice may have two copies: either may come back."""
        for key, digest in answer.stored.items():
            self._stored.setdefault(key, {})[digest] = None

    def compare(self, name: str, cached: Answer, plain: Answer) -> None:
        """One request, with the cache and without."""
        self.tokens.note(cached.tokens == plain.tokens, f"{name}: {cached.tokens} instead of {plain.tokens}")
        difference = float(np.abs(cached.logits - plain.logits).max())
        self.logits_difference = max(self.logits_difference, difference)
        self.logits.detail = f"largest difference {self.logits_difference:.1e}"
        self.logits.note(difference <= LOGITS_TOLERANCE, f"{name}: {difference:.1e}")
        for key, digest in cached.loaded.items():
            self.bytes.note(digest in self._stored.get(key, {}), f"{name}: block {key}")
        self.bytes.detail = f"{self.bytes.tried} blocks compared by SHA-256"

    def spoilt(self, name: str, zeroed: Answer, plain: Answer) -> None:
        """One request whose loaded blocks were zeroed: its output must differ, or equality proves nothing."""
        difference = float(np.abs(zeroed.logits[0] - plain.logits[0]).max())
        self.control_difference = min(self.control_difference, difference)
        differs = zeroed.loaded_tokens > 0 and difference >= CONTROL_AT_LEAST and zeroed.tokens != plain.tokens
        self.control.note(differs, f"{name}: logits differ by {difference:.1e} only")
        self.control.detail = f"logits differ by {self.control_difference:.2g}, tokens too"
