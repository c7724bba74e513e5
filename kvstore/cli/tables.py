"""Tables for people."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

PIPE_WIDTH = 140  # columns where no terminal says how many


def console(**options: Any) -> Console:
    """For stdout; wide where nobody looks on."""
    made = Console(**options)
    return made if made.is_terminal else Console(width=PIPE_WIDTH, **options)


def table(*columns: str, right: str = "", title: str = "") -> Table:
    """A plain table; `right`: names of the columns of numbers."""
    made = Table(box=box.SIMPLE_HEAD, title=title or None, title_justify="left", pad_edge=False)
    for name in columns:
        made.add_column(name, justify="right" if name in right.split() else "left", no_wrap=True)
    return made


def size(nbytes: float) -> str:
    """1536 -> "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(nbytes) < 1024:
            return f"{nbytes:.0f} {unit}" if unit == "B" or nbytes >= 100 else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.1f} TiB"


def print_status(status: dict[str, Any], title: str = "") -> None:
    """The object of `kvstore status` as two tables."""
    out = console()
    coordinators = table("coordinator", "state", "blocks", right="blocks", title=title)
    for coordinator in status["coordinators"]:
        coordinators.add_row(coordinator["address"], coordinator["state"], str(coordinator.get("blocks", "")))
    out.print(coordinators)
    columns = ("worker", "node", "epoch", "worker state", "tier", "state", "used", "of", "blocks", "ratio")
    workers = table(*columns, right="epoch used of blocks ratio")
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
    out.print(workers)
    for worker in status["workers"]:
        for tier, row in worker["tiers"].items():
            if row["detail"] and row["state"] != "off":
                out.print(f"{tier} of {worker['id']}: {row['detail']}", markup=False)
    if any(row["codecs"] for worker in status["workers"] for row in worker["tiers"].values()):
        print_codecs(status["workers"])
    if status.get("reconciler"):
        out.print(f"reconciler: {reconciler_line(status['reconciler'])}")
    if any(use["quota"] for entry in status["namespaces"] for use in entry["tiers"].values()):
        print_namespaces(status["namespaces"])


def print_codecs(workers: list[dict[str, Any]]) -> None:
    """What each codec made of what was written to each tier since the worker's start. GB/s are of raw bytes."""
    columns = ("worker", "tier", "codec", "chunks", "ratio", "encode s", "GB/s", "decode s")
    made = table(*columns, right="chunks ratio GB/s")
    for worker in workers:
        head = worker["id"]
        for tier, row in worker["tiers"].items():
            for name, use in row["codecs"].items():
                ratio = "" if use["ratio"] is None else f"{use['ratio']:.2f}"
                speed = f"{use['raw_bytes'] / use['encode_s'] / 1e9:.1f}" if use["encode_s"] else ""
                times = f"{use['encode_s']:.2f}", speed, f"{use['decode_s']:.2f}"
                made.add_row(head, tier, name, str(use["chunks"]), ratio, *times)
                head = ""
    console().print(made)


def reconciler_line(reconciler: dict[str, Any]) -> str:
    """What a person wants to know of it."""
    words = [reconciler["state"]]
    if reconciler.get("detail"):
        words.append(reconciler["detail"])
    if reconciler.get("unplaced"):
        words.append(f"{reconciler['unplaced']} workers have no place")
    if reconciler.get("held"):
        words.append(f"{len(reconciler['held'])} nodes drained")
    down = [row["name"] for row in reconciler.get("actors", ()) if not row["up"]]
    if down:
        words.append(f"not up: {', '.join(down)}")
    words += [f"{name}: {error}" for name, error in reconciler.get("errors", {}).items()]
    return "; ".join(words)


def print_namespaces(namespaces: list[dict[str, Any]]) -> None:
    """Sums over the workers, of bytes that stay in a tier."""
    rows = table("namespace", "tier", "used", "quota", "puts dropped", "evicted", right="used quota puts evicted")
    for entry in namespaces:
        head = [entry["namespace"]]
        counts = [str(entry["puts_over_quota"]), str(entry["blocks_over_quota"])]
        for tier, use in entry["tiers"].items():
            rows.add_row(*head, tier, size(use["used"]), size(use["quota"]) if use["quota"] else "", *counts)
            head, counts = [""], ["", ""]
    console().print(rows)


def print_checks(report: dict[str, Any]) -> None:
    """The object of `kvstore doctor`: one line a check, the fix below what failed."""
    out = console(soft_wrap=True, highlight=False)
    for check in report["checks"]:
        mark = "[green]ok   [/green]" if check["ok"] else "[red]FAULT[/red]"
        out.print(f"{mark} {check['name']}: ", end="")
        out.print(check["detail"], markup=False)
        if not check["ok"] and check["fix"]:
            out.print(f"      -> {check['fix']}", markup=False)
    faults = sum(not check["ok"] for check in report["checks"])
    out.print(f"{len(report['checks'])} checks, " + (f"[red]{faults} faults[/red]" if faults else "all well"))


def print_inspection(report: dict[str, Any]) -> None:
    """The object of `kvstore inspect`."""
    out = console(soft_wrap=True, highlight=False)
    ratio = report["raw_bytes"] / report["stored_bytes"] if report["stored_bytes"] else 1.0
    sizes = f"{size(report['stored_bytes'])} stored, {size(report['raw_bytes'])} raw, ratio {ratio:.2f}"
    out.print(f"{report['folder']}: {report['segments']} segments, {report['records']} records, {sizes}")
    for title in ("models", "namespaces", "skipped"):
        for name, count in report[title].items():
            out.print(f"  {title.removesuffix('s')} {name}: {count}", markup=False)
    for damage in report["damage"]:
        out.print(f"  damaged: segment {damage['segment']} offset {damage['offset']}: {damage['why']}", markup=False)
    for block in report.get("blocks", ()):
        _print_block(out, block, f"{block['key']} depth {block['depth']}")
    out.print("every record verifies" if not report["damaged"] else f"[red]{report['damaged']} damaged records[/red]")


def print_copies(report: dict[str, Any]) -> None:
    """The object of `kvstore inspect KEY`."""
    out = console(soft_wrap=True, highlight=False)
    for copy in report["copies"]:
        _print_block(out, copy, f"{copy['tier']} of worker {copy['worker']}")
    for id, error in report["failed"].items():
        out.print(f"worker {id}: {error}", markup=False)
    copies = f"{len(report['copies'])} copies on {report['workers']} workers"
    out.print(copies + (f", [red]{report['damaged']} damaged[/red]" if report["damaged"] else ", every one verifies"))


def _print_block(out: Console, block: dict[str, Any], title: str) -> None:
    """Header and chunk table."""
    fields = table("field", "value", title=title)
    for name, value in block.items():
        if name != "chunks":
            fields.add_row(name, str(value))
    out.print(fields)
    names = tuple(block["chunks"][0]) if block["chunks"] else ()
    chunks = table(*names, right=" ".join(names))
    for chunk in block["chunks"]:
        chunks.add_row(*(str(value) for value in chunk.values()))
    if names:
        out.print(chunks)
