"""The flat arrays of a directory at sizes where pages split and merge, held against plain dicts; what it can't hold."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from random import Random

import numpy as np
import pytest

from kvstore.directory.block_table import SLOT_BYTES, BlockTable, key_array
from kvstore.directory.directory import Directory
from kvstore.directory.entries import BYTES_MAX, OWNERS_MAX, bytes_of, fidelity_of, owner_of, pack, tier_of
from kvstore.directory.runs import RemovedRun, Run
from kvstore.kernels import private_folder
from kvstore.kernels.directory import DEPTH_MAX, PAGE_SLOTS
from kvstore.spec import Shard
from kvstore.types import Fidelity, Keys, Tier
from tests.cluster_model import FULL, chain, directory_for, halves, run_of

ROOT = Path(__file__).parent.parent
WHOLE = Shard.whole(FULL)


def made_up(count: int, seed: int) -> list[bytes]:
    rng = Random(seed)
    return [rng.randbytes(16) for _ in range(count)]


def run_with(keys: list[bytes], tier: Tier = Tier.HOST, shard: Shard = WHOLE) -> Run:
    return run_of(FULL, shard, keys, 0, len(keys), tier)


def held(directory: Directory, holder: str, shard: Shard = WHOLE) -> set[bytes]:
    return {key for digest, key in directory.contents(holder) if digest == shard.digest}


@pytest.mark.parametrize("stored", [0, 1, 127, 128, 129, 255, 1 << 20, (1 << 21) - 1, 3_000_000_000, BYTES_MAX])
def test_a_copy_comes_back_from_its_bits(stored: int) -> None:
    for owner in (1, 77, OWNERS_MAX):
        for tier in Tier:
            for fidelity in Fidelity:
                copy = pack(owner, tier, fidelity, stored)
                assert 0 < copy < 1 << 32
                assert (owner_of(copy), tier_of(copy), fidelity_of(copy)) == (owner, tier, fidelity)
                assert stored <= bytes_of(copy) <= stored * 65 / 64
    assert bytes_of(pack(1, Tier.HOT, Fidelity.EXACT, 2 * BYTES_MAX)) == BYTES_MAX


def test_any_changes_at_any_size_are_those_of_a_dict() -> None:
    """Tens of pages, three holders, two shards; removed in pieces, dropped, replaced, swept; valid all the way."""
    rng = Random(7)
    directory = directory_for(FULL)
    keys = made_up(20_000, 1)
    shards = [WHOLE, halves(FULL)[0]]
    model: dict[tuple[str, Shard], set[bytes]] = {(h, s): set() for h in ("a", "b", "c") for s in shards}
    for step in range(60):
        holder, shard = rng.choice(sorted(model, key=str))
        some = rng.sample(keys, rng.choice((10, 3000, 9000)))
        kind = rng.random()
        if kind < 0.5:
            directory.add(holder, run_with(some, rng.choice(list(Tier)), shard))
            model[holder, shard] |= set(some)
        elif kind < 0.8:
            directory.remove(holder, shard.digest, some)
            model[holder, shard] -= set(some)
        elif kind < 0.9:
            directory.replace(holder, [run_with(some, shard=shard)])
            model.update({(holder, other): set() for other in shards})
            model[holder, shard] = set(some)
        else:
            directory.drop(holder)
            model.update({(holder, other): set() for other in shards})
        directory.sweep(rng.choice((0, 5000)))
        if step % 6 == 5:
            directory.validate()
            assert {at: held(directory, *at) for at in model} == model
    for of in ("a", "b", "c"):
        directory.drop(of)
    while directory.sweep(10_000):
        directory.validate()
    directory.validate()
    assert directory.blocks == 0 and directory.nbytes > 0


def test_what_changes_over_and_over_takes_no_more_room() -> None:
    directory, keys = directory_for(FULL), made_up(5000, 2)
    for holder in ("a", "b", "c", "d"):
        directory.add(holder, run_with(keys))
    once = directory.nbytes
    for turn in range(20):
        directory.add("a", run_with(keys, list(Tier)[turn % 4]))
        directory.remove("b", WHOLE.digest, keys)
        directory.add("b", run_with(keys))
        directory.replace("c", [run_with(keys)])
    assert directory.nbytes <= 1.3 * once  # a few copies of a replaced life wait for their sweep
    directory.validate()


def test_bytes_a_block() -> None:
    """With two holders each; the least and the most that the module promises, after a split and before the next."""
    directory, keys = directory_for(FULL), made_up(60_000, 3)
    each = []
    for start in range(0, len(keys), 1000):
        for holder in ("a", "b"):
            directory.add(holder, run_with(keys[start : start + 1000]))
        if start >= 10_000:
            each.append(directory.nbytes / (start + 1000))
    assert 30 < min(each) < max(each) < 80
    assert max(each) > 1.5 * SLOT_BYTES  # the control: pages are never all full


def test_a_thousand_holders_of_one_block_are_all_known_and_the_fastest_named() -> None:
    directory, keys = directory_for(FULL), chain(FULL, 3)
    for number in range(1000):
        directory.add(f"w{number:03}", run_of(FULL, WHOLE, keys, 0, 3, Tier.HOT if number % 100 == 7 else Tier.SSD))
    assert len(directory.holders(WHOLE.digest, keys[1])) == 1000
    match = directory.match(FULL.root, keys, [WHOLE], Fidelity.EXACT)
    assert match.blocks == 3 and len(match.runs) == directory.copies_max
    assert [run.tier for run in match.runs[:11]] == [Tier.HOT] * 10 + [Tier.SSD]
    assert {run.count for run in match.runs} == {3}
    for number in range(1000):
        directory.remove(f"w{number:03}", WHOLE.digest, keys[:2])
    directory.validate()
    assert directory.match(FULL.root, keys, [WHOLE], Fidelity.EXACT).blocks == 0
    assert len(directory.holders(WHOLE.digest, keys[2])) == 1000


@pytest.mark.parametrize("seed", range(8))
def test_a_lookup_in_one_pass_says_what_several_steps_say(seed: int) -> None:
    """Up to five holders a block, hidden ones among them, in longer and shorter stretches."""
    rng = Random(seed)
    table, keys = BlockTable(50_000), key_array(Keys(b"".join(made_up(3000, seed))))
    table.status[1:7] = 1
    table.status[rng.randint(1, 6)] = 2  # hidden
    at = 0
    while at < len(keys):
        count = min(rng.choice((1, 3, 40) if seed < 4 else (1,)), len(keys) - at)
        for owner in rng.sample(range(1, 7), rng.randint(1, 5)):
            tier, fidelity = rng.choice(list(Tier)), rng.choice((Fidelity.EXACT, Fidelity.EXACT, Fidelity.NEAR))
            copy = pack(owner, tier, fidelity, rng.randint(1, 1 << 20))
            table.apply(keys, np.array([[at, count, 1, copy]]), owner, 1 << 30)
        at += count
    table.validate(7, 2)
    only = table.only((1, 3, 5))
    most = 0
    for least in (Fidelity.EXACT, Fidelity.NEAR):
        for seen in (None, only):
            for start in (0, 1, 64, 1000, 2999, *(rng.randrange(3000) for _ in range(30))):
                slots, flags = table.held(keys[start:], 1, least, seen)
                blocks = int(np.argmin(np.append(flags, 0)))
                spans = table.spans(slots[:blocks], 0, least, 4, seen)
                assert table.lookup(keys[start:], 1, least, 4, seen) == (blocks, spans)
                most = max(most, blocks)
    assert most > 20, "prefixes are long enough to say something"


def test_more_ranges_than_there_was_room_for() -> None:
    table, keys = BlockTable(50_000), key_array(Keys(b"".join(made_up(3000, 9))))
    table.status[1:3] = 1
    for at in range(3000):
        owner = 1 + at % 2
        table.apply(keys, np.array([[at, 1, 1, pack(owner, Tier.HOT, Fidelity.EXACT, 64)]]), owner, 1 << 30)
    blocks, spans = table.lookup(keys, 1, Fidelity.EXACT, 4)
    assert blocks == 3000 and [span[1:] for span in spans] == [[at, 1, 64] for at in range(3000)]


def test_many_tables_and_short_runs_in_one_go() -> None:
    """The changes of one message, in order, over several shards; the same block twice."""
    directory, keys = directory_for(FULL), chain(FULL, 8)
    left, right = halves(FULL)
    whole_run = run_of(FULL, WHOLE, keys, 0, 8)
    directory.apply(
        "w",
        [
            whole_run,
            RemovedRun(WHOLE.digest, keys[2:4]),
            run_of(FULL, left, keys, 0, 3),
            run_of(FULL, WHOLE, keys, 3, 4, Tier.SSD),
            run_of(FULL, right, keys, 0, 2),
            RemovedRun(right.digest, keys[:2]),
        ],
    )
    assert held(directory, "w") == set(keys) - {keys[2]}
    assert held(directory, "w", left) == set(keys[:3]) and held(directory, "w", right) == set()
    assert [copy.tier for copy in directory.holders(WHOLE.digest, keys[3])] == [Tier.SSD]
    directory.apply("nobody", [RemovedRun(WHOLE.digest, keys)])
    assert directory.names() == ["w"]
    directory.validate()


def test_keys_chosen_to_collide_are_refused_in_the_end_and_others_are_still_served() -> None:
    """Who knows the seed can make keys of one hash; what they take is bounded. Who does not know it can't."""
    seed, mask = 5, (1 << 64) - 1
    firsts = [Random(1).getrandbits(63) + number for number in range(2000)]
    seconds = [(-((first ^ seed) * 0x9E3779B97F4A7C15) - 0x94D049BB133111EB) & mask for first in firsts]
    chosen = np.array(list(zip(firsts, seconds, strict=True)), np.uint64).view(np.int64)
    honest = key_array(Keys(b"".join(made_up(20_000, 6))))
    runs = np.array([[0, 2000, 1, pack(1, Tier.HOT, Fidelity.EXACT, 1)]])
    for known, refused in ((seed, 2000 - (PAGE_SLOTS - 1)), (seed + 1, 0)):
        table = BlockTable(200_000, seed=known)
        assert table.apply(chosen, runs, 1, 1 << 30)[2] == refused
        runs[0, 1] = len(honest)
        new, _, lost = table.apply(honest, runs, 1, 1 << 30)
        assert new + lost == len(honest) and lost < 30  # those that share the chosen ones' page
        table.validate(2, 2)
        runs[0, 1] = 2000


def test_a_full_table_refuses_and_goes_on() -> None:
    table = BlockTable(1000)
    keys = key_array(Keys(b"".join(made_up(table.slots_max, 4))))
    runs = np.array([[0, len(keys), 1, pack(1, Tier.HOT, Fidelity.EXACT, 1)]])
    new, _, refused = table.apply(keys, runs, 1, 1 << 30)
    assert new + refused == len(keys) and refused > 0 and new > table.slots_max // 2
    table.validate(2, 2)
    runs[0, 3] = 0
    assert table.apply(keys, runs, 1, 0)[1] == new and table.blocks == 0
    table.validate(2, 2)


def test_owners_that_are_dead_make_room_for_new_ones() -> None:
    directory, keys = directory_for(FULL), chain(FULL, 2)
    for _ in range(OWNERS_MAX + 100):
        directory.stage("w")
        directory.add_staged("w", run_of(FULL, WHOLE, keys, 0, 2))
        directory.commit_staged("w")
    directory.validate()
    assert held(directory, "w") == set(keys)


def test_the_cache_of_compiled_code_is_nobody_elses(tmp_path: Path) -> None:
    assert private_folder(tmp_path / "new") == tmp_path / "new"
    assert private_folder(tmp_path / "new") == tmp_path / "new"
    (tmp_path / "new").chmod(0o770)
    assert private_folder(tmp_path / "new") is None
    (tmp_path / "link").symlink_to(tmp_path)
    assert private_folder(tmp_path / "link") is None
    assert private_folder(tmp_path / "no" / "such") is None


NOWHERE = """
import numba.core.caching as caching
for name, kind in vars(caching).items():
    if isinstance(kind, type) and issubclass(kind, caching._CacheLocator) and "UserProvided" not in name:
        kind.from_function = classmethod(lambda cls, function, path: None)
import numpy
from kvstore.kernels.moves import move
there, here = numpy.zeros(4, numpy.uint8), numpy.arange(4, dtype=numpy.uint8)
move(*(numpy.array([n], numpy.uint64) for n in (there.ctypes.data, here.ctypes.data, 4)))
assert there.tolist() == [0, 1, 2, 3]
"""


def test_where_nothing_may_be_written_the_code_is_kept_in_a_folder_of_ones_own(tmp_path: Path) -> None:
    """And where somebody else has made that folder, it is compiled without being kept."""
    folder = tmp_path / f"kvstore-kernels-{os.getuid()}"
    for public in (False, True):
        if public:
            shutil.rmtree(folder)
            folder.mkdir(mode=0o777)
            folder.chmod(0o777)
        env = {**os.environ, "TMPDIR": str(tmp_path)}
        done = subprocess.run(
            [sys.executable, "-c", NOWHERE], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        assert bool(list(folder.rglob("*.nbc"))) is not public


def test_bounds_of_the_hash() -> None:
    assert (1 << DEPTH_MAX) * PAGE_SLOTS > 40_000_000 / 0.4
