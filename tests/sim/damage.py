"""What links do to messages beyond delays: streams that lose, double and reorder, frames that arrive wrong."""

from __future__ import annotations

from kvstore.errors import Corrupt
from kvstore.transport import frames
from kvstore.transport.base import Method
from kvstore.wire import worker_pb2
from tests.sim.network import MemoryNetwork


class Unruly:
    """One direction of an Announce stream. gRPC does none of this; the numbers of announcements promise to stand it.

    The first message, which says who speaks, always arrives: without it there is no stream.
    """

    def __init__(self, network: MemoryNetwork, method: Method) -> None:
        self._network = network
        self._concerned = method.name == "Announce"
        self._begun = False
        self._overtaken: bytes | None = None

    def pass_on(self, item: bytes) -> list[bytes]:
        """What arrives when `item` is sent, in order. Mutates."""
        network, share = self._network, self._network.faults.unruly
        if not (self._concerned and self._begun):
            self._begun = True
            return [item]
        late = [] if self._overtaken is None else [self._overtaken]
        self._overtaken = None
        if not share or network.rng.random() >= share:
            return [item, *late]
        fate = network.rng.choice(["lost", "twice", "overtaken"])
        network.note("unruly", fate)
        if fate == "lost":
            return late
        if fate == "twice":
            return [item, *late, item]
        self._overtaken = item
        return late


def damaged(network: MemoryNetwork, frame: bytes) -> bytes:
    """A frame as it arrives: mostly as it was sent."""
    share = network.faults.damage
    if not share or network.rng.random() >= share:
        return frame
    mixed = _mixed(network, frame) if network.rng.random() < 0.7 else None
    if mixed is not None:
        network.note("mixed")
        return mixed
    network.note("flipped")
    place = network.rng.randrange(len(frame))
    return frame[:place] + bytes([frame[place] ^ 1 << network.rng.randrange(8)]) + frame[place + 1 :]


def _mixed(network: MemoryNetwork, frame: bytes) -> bytes | None:
    """Two parts of equal shape change their blocks: every chunk holds, but they are not of one copy."""
    try:
        packed, data = frames.decode(frame)
    except Corrupt:
        return None
    header = worker_pb2.GetHeader.FromString(packed or b"")
    alike: dict[tuple[int, int], list[int]] = {}
    for index, part in enumerate(header.parts):
        alike.setdefault((part.first_chunk, len(part.table)), []).append(index)
    pairs = [indices for indices in alike.values() if len(indices) > 1]
    if not pairs:
        return None
    one, other = network.rng.sample(network.rng.choice(pairs), 2)
    header.parts[one].block, header.parts[other].block = header.parts[other].block, header.parts[one].block
    return frames.encode(header.SerializeToString(), [data])
