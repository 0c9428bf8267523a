"""What a report must survive: numbers too large or too close, names of any kind, rude visitors."""

import errno
import socket
import struct

import numpy as np
import pytest

from gradhpo.cluster.reporting.generations import quantiles
from gradhpo.page import packed, unpacked
from gradhpo.page.document import script
from gradhpo.page.leaves import leaf
from gradhpo.page.server import PageServer


@pytest.mark.parametrize(
    "numbers",
    [
        np.repeat([1.0, np.nextafter(1.0, 2.0)], 10),  # no room for forty bars between them
        np.repeat([-1.7e308, 1.7e308], 10),  # a range that is no number
        np.repeat([0.0, 5e-324], 10),
    ],
)
def test_a_leaf_whose_range_cannot_be_divided_is_one_bar(numbers):
    made = leaf(numbers)
    assert made["counts"] == [20]
    assert made["edges"] == [made["least"], made["greatest"]] == [numbers.min(), numbers.max()]


def test_a_leaf_of_equal_numbers_and_an_ordinary_one():
    assert sum(leaf(np.full(20, 3.0))["counts"]) == 20
    made = leaf(np.append(np.arange(100.0), np.nan))
    assert (len(made["counts"]), sum(made["counts"]), made["lost"]) == (40, 100, 1)


def test_what_is_too_large_for_the_page_is_infinite_there_without_a_warning():
    assert unpacked(packed(np.array([1e300, -1e300, 1.0]))).tolist() == [np.inf, -np.inf, 1.0]
    assert quantiles(np.array([-3e38, 3e38], np.float32))[2] == 0


def test_names_of_a_person_s_are_no_names_of_javascript_s():
    """A metric may be called "constructor", which every ordinary object has."""
    head = script().split("take(given)")[0].split("class Rows")[1]
    assert "Object.create(null)" in head
    assert "{}" not in head


@pytest.mark.parametrize("port", [-1, 65536])
def test_a_port_that_is_none_is_named(port):
    with pytest.raises(ValueError, match=rf"port must be from 0 .* to 65535, got {port}"):
        PageServer("", lambda after, epoch: {}, port)


def test_a_port_in_use_is_named():
    with PageServer("", lambda after, epoch: {}) as server:
        port = server.port
        with pytest.raises(OSError, match=f"^port {port} of 127.0.0.1 cannot be had: ") as raised:
            PageServer("", lambda after, epoch: {}, port)
    assert raised.value.errno == errno.EADDRINUSE


def test_who_goes_away_or_asks_nonsense_is_no_traceback(capfd):
    with PageServer("x" * 20_000_000, lambda after, epoch: {}) as server:
        address = ("127.0.0.1", server.port)
        host = f"Host: 127.0.0.1:{server.port}\r\n\r\n".encode()
        with socket.create_connection(address) as away:
            away.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            away.sendall(b"GET / HTTP/1.1\r\n" + host)
            assert away.recv(10)
        with socket.create_connection(address) as asks:
            asks.settimeout(30)
            asks.sendall(b"GET http://[ HTTP/1.1\r\n" + host)
            assert asks.recv(100).startswith(b"HTTP/1.1 400 ")
    assert "Traceback" not in capfd.readouterr().err
