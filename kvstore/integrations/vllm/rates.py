"""How fast this engine computes and how fast the store loads: what decides whether loading pays, and for how long."""

from __future__ import annotations

from kvstore.seams import Clock

STEP_TOKENS_MIN = 32
"""A step of fewer tokens says nothing about prefill."""

NEWEST = 0.3
"""Weight of the newest measurement."""


class Rates:
    """Moving averages. None while nothing was measured."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._began: float | None = None
        self.prefill_tokens_s: float | None = None
        self.load_bytes_s: float | None = None

    def step_begins(self) -> None:
        """Mutates."""
        self._began = self._clock.monotonic()

    def step_ends(self, tokens: int) -> None:
        """The forward pass of `tokens` is done. Mutates."""
        began, self._began = self._began, None
        if began is not None and tokens >= STEP_TOKENS_MIN:
            self.prefill_tokens_s = _mean(self.prefill_tokens_s, tokens / max(1e-6, self._clock.monotonic() - began))

    def loaded(self, nbytes: int, seconds: float) -> None:
        """A load that ended well. Mutates."""
        if nbytes and seconds > 0:
            self.load_bytes_s = _mean(self.load_bytes_s, nbytes / seconds)

    def deadline_s(self, tokens: int, *, least_s: float, most_s: float) -> float:
        """As long as computing so many tokens would take, where that is known, within the bounds."""
        if self.prefill_tokens_s is None:
            return most_s
        return min(most_s, max(least_s, tokens / self.prefill_tokens_s))


def _mean(known: float | None, newest: float) -> float:
    return newest if known is None else known + NEWEST * (newest - known)
