"""`python -m tests.sim --seeds 200 --first 0`: play seeds, show progress, print the ones that fail."""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections import Counter

from tests.sim.scenario import run_seed


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    parser.add_argument("--seeds", type=int, default=200, help="how many (default 200)")
    parser.add_argument("--first", type=int, default=0, help="the first one (default 0)")
    parser.add_argument("--turns", type=int, default=20, help="requests a client (default 20)")
    options = parser.parse_args()
    seen: Counter[str] = Counter()
    failed = []
    begin = time.monotonic()
    for seed in range(options.first, options.first + options.seeds):
        try:
            seen += run_seed(seed, turns=options.turns).seen
        except Exception:  # noqa: BLE001 - every failure is shown with its seed, and the run goes on
            failed.append(seed)
            print(f"\nseed {seed} failed; again: python -m tests.sim --first {seed} --seeds 1", file=sys.stderr)
            traceback.print_exc()
        print(f"\r{seed - options.first + 1}/{options.seeds} seeds, {len(failed)} failed", end="", file=sys.stderr)
    print(file=sys.stderr)
    for name, count in sorted(seen.items()):
        print(f"{name:24} {count}")
    print(f"{options.seeds} seeds in {time.monotonic() - begin:.0f} s; failed: {failed or 'none'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
