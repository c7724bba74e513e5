"""Tables for people."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table


def size(nbytes: float) -> str:
    """1536 -> "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(nbytes) < 1024:
            return f"{nbytes:.0f} {unit}" if unit == "B" or nbytes >= 100 else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.1f} TiB"


def print_status(status: dict[str, Any], title: str = "") -> None:
    """The object of `kvstore status` as two tables."""
    console = Console()
    coordinators = Table(title=title or None, title_justify="left")
    for name in ("coordinator", "state", "blocks"):
        coordinators.add_column(name, justify="right" if name == "blocks" else "left")
    for coordinator in status["coordinators"]:
        coordinators.add_row(coordinator["address"], coordinator["state"], str(coordinator.get("blocks", "")))
    console.print(coordinators)
    workers = Table()
    for name in ("worker", "node", "epoch", "state", "tier", "tier state", "used", "of", "blocks", "ratio"):
        workers.add_column(name, justify="right" if name in ("epoch", "used", "of", "blocks", "ratio") else "left")
    for worker in status["workers"]:
        head = [worker["id"], worker["node"], str(worker["epoch"]), worker["state"]]
        for tier, row in worker["tiers"].items() or {"-": None}.items():
            if row is None:
                workers.add_row(*head, tier, "", "", "", "", "")
                continue
            ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
            cells = [tier, row["state"], size(row["used"]), size(row["capacity"]), str(row["blocks"]), ratio]
            workers.add_row(*head, *cells)
            head = ["", "", "", ""]
        workers.add_section()
    console.print(workers)


def print_checks(report: dict[str, Any]) -> None:
    """The object of `kvstore doctor`: one line a check, the fix below what failed."""
    console = Console(soft_wrap=True, highlight=False)
    for check in report["checks"]:
        mark = "[green]ok   [/green]" if check["ok"] else "[red]FAULT[/red]"
        console.print(f"{mark} {check['name']}: ", end="")
        console.print(check["detail"], markup=False)
        if not check["ok"] and check["fix"]:
            console.print(f"      -> {check['fix']}", markup=False)
    faults = sum(not check["ok"] for check in report["checks"])
    console.print(f"{len(report['checks'])} checks, " + (f"[red]{faults} faults[/red]" if faults else "all well"))


def print_inspection(report: dict[str, Any]) -> None:
    """The object of `kvstore inspect`."""
    console = Console(soft_wrap=True, highlight=False)
    ratio = report["raw_bytes"] / report["stored_bytes"] if report["stored_bytes"] else 1.0
    sizes = f"{size(report['stored_bytes'])} stored, {size(report['raw_bytes'])} raw, ratio {ratio:.2f}"
    console.print(f"{report['folder']}: {report['segments']} segments, {report['records']} records, {sizes}")
    for title in ("models", "namespaces", "skipped"):
        for name, count in report[title].items():
            console.print(f"  {title.removesuffix('s')} {name}: {count}", markup=False)
    for damage in report["damage"]:
        console.print(
            f"  damaged: segment {damage['segment']} offset {damage['offset']}: {damage['why']}", markup=False
        )
    for block in report.get("blocks", ()):
        table = Table(title=f"{block['key']} depth {block['depth']}", title_justify="left")
        for name in ("field", "value"):
            table.add_column(name)
        for name, value in block.items():
            if name != "chunks":
                table.add_row(name, str(value))
        console.print(table)
        chunks = Table()
        for name in block["chunks"][0] if block["chunks"] else ():
            chunks.add_column(name, justify="right")
        for chunk in block["chunks"]:
            chunks.add_row(*(str(value) for value in chunk.values()))
        console.print(chunks)
    console.print(
        "every record verifies" if not report["damaged"] else f"[red]{report['damaged']} damaged records[/red]"
    )
