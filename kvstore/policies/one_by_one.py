"""What policies that look at every row by itself say of many."""

from __future__ import annotations

from abc import ABC, abstractmethod

from kvstore.policies.usage import Rows


class OneByOne(ABC):
    """`touch_all` and `ready_all` of a `kvstore.policies.base.Policy`, from its `touch` and `ready`."""

    @abstractmethod
    def touch(self, row: int) -> None: ...

    @abstractmethod
    def ready(self, row: int) -> None: ...

    def touch_all(self, rows: Rows) -> None:
        """`touch` of each, in that order. Mutates."""
        for row in rows.tolist():
            self.touch(row)

    def ready_all(self, rows: Rows) -> None:
        """`ready` of each. Mutates."""
        for row in rows.tolist():
            self.ready(row)
