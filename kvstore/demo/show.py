"""Progress while the demo runs, on stderr when stdout is for JSON."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from kvstore.demo.checks import Checks
from kvstore.demo.tables import Report, Row, checks_table, line, requests_table, tiers_table

MOMENTS = {
    "before": "Tiers after the first conversations",
    "loaded": "Tiers when every conversation was asked again",
    "returned": "Tiers after the killed worker came back",
}


class Show:
    """A progress bar on a terminal, lines elsewhere; then the tables."""

    def __init__(self, *, json: bool) -> None:
        self.console = Console(stderr=json, highlight=False)
        if not self.console.is_terminal:
            self.console.width = 140
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self._task = self._progress.add_task("setting up", total=None)

    def __enter__(self) -> Show:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def say(self, text: str) -> None:
        """One line for people."""
        self.console.print(text, markup=False)

    def begin(self, requests: int) -> None:
        self._progress.update(self._task, total=requests, description="requests")

    def done(self, row: Row) -> None:
        """A request has ended."""
        self.say(line(row))
        self._progress.advance(self._task)

    def tables(self, report: Report) -> None:
        if report.rows:
            self.console.print()
            self.console.print(requests_table(report.rows))
        for moment, rows in report.tiers.items():
            self.console.print(tiers_table(MOMENTS[moment], rows))

    def verdict(self, checks: Checks, seconds: float) -> None:
        self.console.print(checks_table(checks.all()))
        failed = [check.name for check in checks.all() if not check.ok]
        self.say(f"{'FAILED: ' + '; '.join(failed) if failed else 'all checks hold'} ({seconds:.0f} s)")
