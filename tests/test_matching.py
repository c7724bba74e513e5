"""Group rules and rectangles, without a directory: depths at which stored shards are held go in, a length comes out."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.directory.matching import CHUNK, Held, Rule, longest, make_plan, rule_of
from kvstore.errors import BadRequest
from kvstore.spec import Group, ModelSpec, Shard
from tests.cluster_model import FULL, FULL_SLIDING, FULL_STATE, LATENT, OPAQUE, SLIDING_STATE, TOKENS, halves


def held_at(*depths: str) -> Held:
    """One string per stored shard: '1' where it is held."""

    def held(position: int, start: int, stop: int) -> bytes:
        return bytes(int(at) for at in depths[position][start:stop])

    return held


def matched(spec: ModelSpec, needed: list[Shard], stored: list[Shard], *depths: str) -> int:
    return longest(make_plan(spec, needed, stored), held_at(*depths), len(depths[0]))


def test_rules_are_read_from_the_spec() -> None:
    assert rule_of(FULL_SLIDING, 0) == Rule()
    assert rule_of(FULL_SLIDING, 1) == Rule(3)  # nine tokens are the last two blocks and one token before
    assert rule_of(FULL_STATE, 1) == Rule(1)
    assert rule_of(LATENT, 0) == rule_of(OPAQUE, 0) == Rule()
    exact = Group("sliding", k_dim=1, v_dim=1, window=2 * TOKENS)
    assert rule_of(ModelSpec("m", (exact,), block_tokens=TOKENS), 0) == Rule(2)


@pytest.mark.parametrize(
    ("rule", "blocks", "first"),
    [(Rule(), 5, 0), (Rule(3), 5, 2), (Rule(3), 2, 0), (Rule(1), 5, 4), (Rule(1), 1, 0)],
)
def test_blocks_that_a_length_needs(rule: Rule, blocks: int, first: int) -> None:
    assert rule.first_needed(blocks) == first


@pytest.mark.parametrize("spec", [FULL, LATENT, OPAQUE])
def test_full_latent_and_opaque_need_every_block(spec: ModelSpec) -> None:
    whole = Shard.whole(spec)
    assert matched(spec, [whole], [whole], "1111") == 4
    assert matched(spec, [whole], [whole], "1101") == 2
    assert matched(spec, [whole], [whole], "0111") == 0
    assert matched(spec, [whole], [], "1111") == 0


def test_a_gap_is_found_in_every_chunk_of_a_long_chain() -> None:
    whole = Shard.whole(FULL)
    for gap in (0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 2 * CHUNK + 7):
        depths = "1" * gap + "0" + "1" * CHUNK
        assert matched(FULL, [whole], [whole], depths) == gap


def test_a_sliding_window_needs_only_its_last_blocks() -> None:
    sliding = Shard.whole(SLIDING_STATE, 0)
    assert matched(SLIDING_STATE, [sliding], [sliding], "000111") == 6
    assert matched(SLIDING_STATE, [sliding], [sliding], "000110") == 0  # two are too few
    assert matched(SLIDING_STATE, [sliding], [sliding], "110011") == 2  # a short prefix needs only what it has
    assert matched(SLIDING_STATE, [sliding], [sliding], "111011") == 3


def test_recurrent_state_needs_exactly_the_last_block() -> None:
    state = Shard.whole(SLIDING_STATE, 1)
    assert matched(SLIDING_STATE, [state], [state], "000100") == 4
    assert matched(SLIDING_STATE, [state], [state], "100001") == 6
    assert matched(SLIDING_STATE, [state], [state], "000000") == 0


def test_groups_agree_on_one_length_that_is_not_the_least_of_each() -> None:
    full, state = Shard.whole(FULL_STATE, 0), Shard.whole(FULL_STATE, 1)
    # Alone: full 6, state 7. Together the state must end where full still reaches: at 3.
    assert matched(FULL_STATE, [full, state], [full, state], "1111110", "0010001") == 3
    sliding, state = Shard.whole(SLIDING_STATE, 0), Shard.whole(SLIDING_STATE, 1)
    # Sliding can end at 1 to 3, 7 and 8; state at 2 and 5.
    assert matched(SLIDING_STATE, [sliding, state], [sliding, state], "11101111", "01001000") == 2


def test_all_ranks_must_agree_too() -> None:
    left, right = halves(FULL_STATE, 1)
    assert matched(FULL_STATE, [left, right], [left, right], "10110", "11010") == 4
    assert matched(FULL_STATE, [left, right], [left, right], "10100", "01010") == 0


def test_a_rectangle_is_cut_from_a_containing_one() -> None:
    left, right = halves(FULL)
    assert matched(FULL, [left, right], [Shard.whole(FULL)], "111") == 3


def test_a_rectangle_is_the_union_of_several() -> None:
    whole, (left, right) = Shard.whole(FULL), halves(FULL)
    assert matched(FULL, [whole], [left, right], "1111", "1110") == 3
    assert matched(FULL, [whole], [left], "1111") == 0
    middle = Shard(0, 0, 2, 1, 2)
    first_layer, second_layer = Shard(0, 0, 1, 0, 4), Shard(0, 1, 1, 0, 4)
    assert matched(FULL, [middle], [left, right], "11", "11") == 2
    assert matched(FULL, [whole], [left, middle, first_layer], "11", "11", "11") == 0  # a corner is missing
    assert matched(FULL, [whole], [left, middle, second_layer, Shard(0, 0, 1, 3, 1)], *["11"] * 4) == 2


def test_a_block_may_be_whole_here_and_in_pieces_there() -> None:
    whole, (left, right) = Shard.whole(FULL), halves(FULL)
    assert matched(FULL, [whole], [whole, left, right], "10010", "01110", "01101") == 4


def test_opaque_pages_serve_an_equal_shard_only() -> None:
    whole, (left, right) = Shard.whole(OPAQUE), halves(OPAQUE)
    assert matched(OPAQUE, [whole], [left, right], "11", "11") == 0
    assert matched(OPAQUE, [left], [whole], "11") == 0
    assert matched(OPAQUE, [left], [whole, left], "11", "10") == 1


def test_another_groups_shards_do_not_serve() -> None:
    assert matched(FULL_SLIDING, [Shard.whole(FULL_SLIDING, 0)], [Shard.whole(FULL_SLIDING, 1)], "11") == 0


def test_nothing_needed_is_nothing_matched() -> None:
    assert longest(make_plan(FULL, [], [Shard.whole(FULL)]), held_at("11"), 2) == 0


@pytest.mark.parametrize("wrong", [Shard(1, 0, 1, 0, 1), Shard(0, 0, 3, 0, 4), Shard(0, 0, 2, 0, 0)])
def test_a_need_that_is_no_rectangle_of_the_spec_is_refused(wrong: Shard) -> None:
    with pytest.raises(BadRequest, match="shard"):
        make_plan(FULL, [wrong], [Shard.whole(FULL)])


def test_repeated_needs_count_once() -> None:
    whole = Shard.whole(FULL)
    plan = make_plan(FULL, [whole, whole], [whole])
    assert len(plan.covers) == 1 and plan.sources() == [(0, Rule())]


Rectangle = st.builds(
    lambda layer, layers, head, heads: Shard(0, layer, min(layers, 5 - layer), head, min(heads, 6 - head)),
    st.integers(0, 4), st.integers(1, 5), st.integers(0, 5), st.integers(1, 6),
)  # fmt: skip
BIG = ModelSpec("test/big", (Group(layers=5, kv_heads=6, k_dim=1, v_dim=1),), block_tokens=TOKENS)


@settings(max_examples=200, deadline=None)
@given(Rectangle, st.lists(Rectangle, max_size=6))
def test_a_union_covers_exactly_when_every_cell_is_in_one(needed: Shard, stored: list[Shard]) -> None:
    cells = [
        Shard(0, layer, 1, head, 1)
        for layer in range(needed.layer_first, needed.layer_first + needed.layer_count)
        for head in range(needed.head_first, needed.head_first + needed.head_count)
    ]
    covered = all(any(shard.contains(cell) for shard in stored) for cell in cells)
    assert longest(make_plan(BIG, [needed], stored), lambda _, start, stop: b"\1" * (stop - start), 1) == covered
