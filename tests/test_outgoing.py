"""The order in which the parts of a Get leave a worker."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from workers import outgoing
from workers.outgoing import Part, _by_layer

LAYERS = st.lists(st.integers(0, 5), min_size=1, max_size=12).map(sorted)


@given(st.lists(LAYERS, max_size=6), st.booleans(), st.integers(1, 3 * outgoing.MESSAGE_BYTES))
def test_layers_go_one_after_the_other_across_all_blocks(layers: list[list[int]], alone: bool, nbytes: int) -> None:
    """Blocks that begin anywhere (others are resumed), with some layers in several parts, or in none."""
    cuts = [
        (block, [(layer, Part(block, at, 1, nbytes)) for at, layer in enumerate(mine)])
        for block, mine in enumerate(layers)
    ]
    messages = list(_by_layer(cuts, first_alone=alone))
    sent = [part for message in messages for part in message]
    of = {(part.block, part.first): layer for _, parts in cuts for layer, part in parts}
    order = [(of[part.block, part.first], part.block, part.first) for part in sent]
    assert order == sorted((layer, block, first) for (block, first), layer in of.items())
    assert all(len(message) == 1 or len(message) * nbytes <= outgoing.MESSAGE_BYTES for message in messages)
    if alone and sent:
        first = [message for message in messages if of[message[0].block, message[0].first] == order[0][0]]
        assert {of[part.block, part.first] for message in first for part in message} == {order[0][0]}


def test_a_part_of_a_block_like_it_is_of_that_block() -> None:
    alike = [(layer, Part(0, 2 * layer, 2, 100)) for layer in range(3)]
    [message] = _by_layer([(4, alike), (7, alike)], first_alone=False)
    assert [(part.block, part.first) for part in message] == [(4, 0), (7, 0), (4, 2), (7, 2), (4, 4), (7, 4)]
    assert alike[0][1].block == 0, "what is shared is not changed"
