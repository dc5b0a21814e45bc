"""Connections between hosts: who is let in, and what a stream of messages over one does."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from itertools import product

import pytest

from llmengine.backends.ranks.connections import ControlConnection, Gate, connect
from llmengine.backends.ranks.layout import Link, RankLayout
from llmengine.backends.ranks.sockets import SocketReader, SocketWriter

SECRET = b"s" * 32


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate("127.0.0.1", SECRET)
    yield gate
    gate.close()


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def test_who_knows_the_secret_is_let_in_by_name(gate: Gate) -> None:
    with connect(gate.address, SECRET, b"one", 30.0) as one, connect(gate.address, SECRET, b"other", 30.0) as other:
        for hello, theirs in ((b"other", other), (b"one", one)):
            taken = gate.take(hello, 30.0)
            assert taken is not None
            with taken:
                taken.sendall(hello)
                assert theirs.recv(16) == hello
    assert gate.take(b"nobody", 0.0) is None


def test_strangers_are_turned_away(gate: Gate) -> None:
    with pytest.raises(ConnectionError):
        connect(gate.address, b"x" * 32, b"one", 30.0)
    assert gate.take(b"one", 0.0) is None


def test_strangers_who_say_nothing_or_too_much_hold_nobody_up(gate: Gate) -> None:
    with socket.create_connection(gate.address), socket.create_connection(gate.address) as loud:
        loud.sendall(b"GET / HTTP/1.1\r\n" * 100)
        with connect(gate.address, SECRET, b"one", 30.0):
            taken = gate.take(b"one", 30.0)
            assert taken is not None
            taken.close()


def test_a_gate_that_does_not_know_the_secret_is_found_out() -> None:
    """Whoever has the port of a group that has ended hears nothing of another one's secret."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def pretend() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.sendall(b"n" * 32)
                connection.recv(1024)
                connection.sendall(b"p" * 32)

        thread = threading.Thread(target=pretend)
        thread.start()
        with pytest.raises(ConnectionError, match="does not know the group's secret"):
            connect(listener.getsockname(), SECRET, b"one", 30.0)
        thread.join()


def test_lost_hosts_are_noticed_by_the_kernel(gate: Gate) -> None:
    with connect(gate.address, SECRET, b"one", 30.0) as connection:
        control = ControlConnection(connection)
        assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        idle, every, probes = (
            connection.getsockopt(socket.IPPROTO_TCP, option)
            for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
        )
        assert idle + every * probes <= 10
        assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) <= 10_000
        control.close()
        with pytest.raises(EOFError):
            control.receive(30.0)


def test_objects_come_whole_and_the_end_is_told(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    # A pair of TCP's kind is needed for its options only.
    reader = SocketReader(theirs)
    assert not reader.has_message(0.0)
    ours.sendall((5).to_bytes(8, "little") + b"ab")
    assert not reader.has_message(0.0), "a part of one"
    ours.sendall(b"cde" + (0).to_bytes(8, "little"))
    assert reader.has_message(30.0)
    assert [reader.read(), reader.read()] == [b"abcde", b""]
    ours.shutdown(socket.SHUT_WR)
    assert reader.has_message(30.0)
    assert reader.read() is None


def test_a_reader_that_waits_for_something_else_takes_in_what_comes(pair: tuple[socket.socket, socket.socket]) -> None:
    """So rank 0 does not wait for a rank that waits for rank 0."""
    ours, theirs = pair
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    reader = SocketReader(theirs)
    writer = SocketWriter(ours, lambda waited_s: None if not reader.closed else pytest.fail("nobody has closed"))
    messages = [bytes([number]) * 100_000 for number in range(20)]
    for message in messages:
        writer.write(message)
    writer.close()
    assert reader.closed
    assert [reader.read() for _ in messages] == messages
    assert reader.read() is None


def test_what_is_written_to_a_reader_that_is_gone_is_dropped(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    theirs.close()
    writer = SocketWriter(ours, lambda waited_s: pytest.fail("there is room"))
    writer.write(b"x")
    writer.write(memoryview(b"x" * (1 << 20)))


@pytest.mark.parametrize(
    ("stage_size", "hosts"),
    [(1, (0, 1, 2)), (2, (0, 0, 1, 1)), (4, (0, 1, 1, 2)), (2, (0, 1, 1, 0, 2, 2)), (2, (0, 0))],
)
def test_ranks_that_share_no_memory_have_a_connection(stage_size: int, hosts: tuple[int, ...]) -> None:
    layout = RankLayout(stage_size, hosts)
    links = {link for host in range(layout.num_hosts) for link in layout.links(host)}
    for one, other in product(range(layout.size), repeat=2):
        apart = hosts[one] != hosts[other]
        assert (Link("messages", one, other) in links) == (one == 0 and apart)
        assert (Link("pipe", one, other) in links) == (layout.receiver(one) == other and apart)
        in_one_stage = one < other and other in layout.stage(one)
        assert (Link("sums", one, other) in links) == (in_one_stage and not layout.is_on_one_host(layout.stage(one)))
    for link in links:
        ends = [rank for host in range(layout.num_hosts) for rank in layout.ends_on(link, host)]
        assert sorted(ends) == sorted(link[1:])
