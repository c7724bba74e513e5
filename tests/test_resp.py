"""One connection to Redis, against a server that says what the test wants: pieces, seals, silence."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest

from kvstore.tiers.redis_value import AES_GMAC, HMAC_SHA256, Checking, Sealing, trailer
from kvstore.transport import resp
from kvstore.transport.resp import PIECE_BYTES, RespSocket, Sealed, Server

BLOCK = bytes(range(256)) * (PIECE_BYTES * 2 // 256) + b"a tail of a piece"


class Peer:
    """Takes one connection, sends `reply` at once, and keeps what it receives while `takes`."""

    def __init__(self, folder: Path, reply: bytes, *, takes: bool = True) -> None:
        self.path = str(folder / "s")
        self.received = bytearray()
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(self.path)
        self._listening.listen(1)
        self._reply, self._takes = reply, takes
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        connection, _ = self._listening.accept()
        with closing(connection), suppress(OSError):
            connection.sendall(self._reply)
            while self._takes and (got := connection.recv(1 << 20)):
                self.received += got
            self._ended.wait(30)

    def close(self) -> None:
        self._ended.set()
        self._thread.join()
        self._listening.close()


@pytest.fixture
def peers(no_leaks: None) -> Iterator[list[Peer]]:
    made: list[Peer] = []
    yield made
    for peer in made:
        peer.close()


def connected(peer: Peer, timeout_s: float = 30.0) -> RespSocket:
    return RespSocket(Server.of(f"unix://{peer.path}"), timeout_s)


@pytest.mark.parametrize("algorithm", [HMAC_SHA256, AES_GMAC])
def test_a_sealed_value_is_summed_while_it_is_sent(tmp_path: Path, peers: list[Peer], algorithm: int) -> None:
    peers.append(Peer(tmp_path, b"+OK\r\n"))
    seal = Sealing(b"secret", bytes(12), algorithm)
    value = Sealed((memoryview(BLOCK), b"small", memoryview(b"")), seal)
    with closing(connected(peers[0])) as found:
        assert found.call([["SET", b"k", value]], ()) == [b"OK"]
    peers[0].close()
    whole = BLOCK + b"small" + trailer([BLOCK, b"small"], b"secret", bytes(12), algorithm)
    assert peers[0].received == b"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$%d\r\n%s\r\n" % (len(whole), whole)
    assert Sealed((BLOCK, b"small"), Sealing(b"secret", bytes(12), algorithm)).joined() == whole


def test_a_value_is_seen_in_pieces_and_its_end_is_not(tmp_path: Path, peers: list[Peer]) -> None:
    peers.append(Peer(tmp_path, b"$%d\r\n%send\r\n" % (len(BLOCK) + 3, BLOCK)))
    target, end, seen = bytearray(len(BLOCK)), bytearray(3), list[bytes]()
    with closing(connected(peers[0])) as found:
        into = (memoryview(target), memoryview(end))
        assert found.call([["GET", b"k"]], into, lambda piece: seen.append(bytes(piece)))[0] is into
    assert bytes(target + end) == BLOCK + b"end" and b"".join(seen) == BLOCK
    assert [len(piece) for piece in seen] == [PIECE_BYTES, PIECE_BYTES, len(BLOCK) - 2 * PIECE_BYTES]


def test_a_value_of_another_length_lands_nowhere(tmp_path: Path, peers: list[Peer]) -> None:
    peers.append(Peer(tmp_path, b"$3\r\nabc\r\n"))
    target, seen = bytearray(4), list[memoryview]()
    with closing(connected(peers[0])) as found:
        assert found.call([["GET", b"k"]], (memoryview(target),), seen.append) == [b"abc"]
    assert target == bytes(4) and not seen


@pytest.mark.parametrize("takes", [True, False], ids=["no answer", "nothing taken"])
def test_silence_ends_a_call(tmp_path: Path, peers: list[Peer], monkeypatch: pytest.MonkeyPatch, takes: bool) -> None:
    monkeypatch.setattr(resp, "SEND_BUFFER_BYTES", 4096)
    peers.append(Peer(tmp_path, b"", takes=takes))
    with closing(connected(peers[0], 0.05)) as found, pytest.raises(TimeoutError):
        found.call([["SET", b"k", Sealed((BLOCK,), Sealing(b"secret", bytes(12)))]], ())


def test_half_a_value_and_silence(tmp_path: Path, peers: list[Peer]) -> None:
    peers.append(Peer(tmp_path, b"$%d\r\n%s" % (len(BLOCK), BLOCK[:-1])))
    with closing(connected(peers[0], 0.05)) as found, pytest.raises(TimeoutError):
        found.call([["GET", b"k"]], (memoryview(bytearray(len(BLOCK))),))


@pytest.mark.parametrize("cut", [0, 1, 4096, len(BLOCK)])
def test_a_checking_sum_knows_the_nonce_at_the_end(cut: int) -> None:
    nonce = bytes(range(12))
    end = trailer([BLOCK], b"secret", nonce)

    def holds(block: bytes, end: bytes, secret: bytes = b"secret") -> bool:
        passed = Checking(secret)
        passed.update(block[:cut])
        passed.update(block[cut:])
        return passed.holds(end)

    assert holds(BLOCK, end)
    assert not holds(BLOCK, end, b"another secret")
    assert not holds(BLOCK[:-1] + b"?", end)
    for place in range(8, 36):  # nonce and tag
        assert not holds(BLOCK, end[:place] + bytes([end[place] ^ 1]) + end[place + 1 :])
