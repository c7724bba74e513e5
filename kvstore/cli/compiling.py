"""`kvstore compile`: the compiled loops made before anybody waits for them."""

from __future__ import annotations

import argparse
from typing import Any

from kvstore.cli.common import EXIT_OK, command, note
from kvstore.machine.system import RealClock

DESCRIPTION = """\
Make the compiled loops (numba) and keep them on disk, in NUMBA_CACHE_DIR if it is set. Whoever finds none there
compiles while it works, and answers late meanwhile. They are of this machine's processor and this release: do it again
after an update. Where all is there it takes seconds."""

TOLD_S = 0.5
"""Where all is there nobody wants to hear of each part."""


def add(commands: Any) -> None:
    made = command(
        commands,
        "compile",
        "make the compiled loops, once on a machine: most of a minute, then servers and engines start fast",
        examples="kvstore compile",
        description=DESCRIPTION,
    )
    made.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    compiled()
    return EXIT_OK


def compiled() -> None:
    """Have all of them on disk, and loaded in this process; what takes its time is told."""
    from kvstore.operations.compiling import compile_all  # imports numba

    now = RealClock().monotonic
    begun = now()
    compile_all(lambda what: note(f"compiling: {what}") if now() - begun > TOLD_S else None)
    note(f"all compiled loops are on disk, after {now() - begun:.1f} s")
