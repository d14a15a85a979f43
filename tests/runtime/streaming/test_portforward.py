from __future__ import annotations

import pytest

from imgsvc.runtime.streaming.portforward import Pair, Pairing, PortForwardError, parse_port, port_greeting


def headers(kind: str, port: str = "80", request: str = "") -> dict[str, str]:
    return {"streamtype": kind, "port": port} | ({"requestid": request} if request else {})


def test_pair_in_either_order() -> None:
    pairing = Pairing()
    assert pairing.opened(1, headers("error", request="0")) is None
    assert pairing.opened(3, headers("data", "81", "1")) is None
    assert pairing.opened(5, headers("error", "81", "1")) == Pair(81, data_id=3, error_id=5)
    assert pairing.opened(7, headers("data", request="0")) == Pair(80, data_id=7, error_id=1)


def test_old_clients_send_no_request_id() -> None:
    pairing = Pairing()
    assert pairing.opened(1, headers("error")) is None
    assert pairing.opened(3, headers("data")) == Pair(80, data_id=3, error_id=1)


@pytest.mark.parametrize(
    "second",
    [headers("data", "80", "7"), headers("error", "81", "7")],
    ids=["same kind", "other port"],
)
def test_streams_that_do_not_fit_are_refused(second: dict[str, str]) -> None:
    pairing = Pairing()
    pairing.opened(1, headers("data", "80", "7"))
    with pytest.raises(PortForwardError):
        pairing.opened(3, second)


def test_a_dropped_stream_waits_no_more() -> None:
    pairing = Pairing()
    pairing.opened(1, headers("error", request="7"))
    pairing.dropped(1)
    assert pairing.opened(3, headers("data", request="7")) is None


@pytest.mark.parametrize("bad", [{}, {"streamtype": "data"}, {"streamtype": "stdin", "port": "80"}])
def test_missing_headers_are_refused(bad: dict[str, str]) -> None:
    with pytest.raises(PortForwardError):
        Pairing().opened(1, bad)


@pytest.mark.parametrize("text", ["", "0", "65536", "-1", "+80", "8 0", "１２", "1e3", "0x50", "000080"])
def test_bad_ports_are_refused(text: str) -> None:
    with pytest.raises(PortForwardError):
        parse_port(text)


def test_greeting_is_little_endian() -> None:
    assert port_greeting(8080) == b"\x90\x1f"
