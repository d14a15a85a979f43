from __future__ import annotations

import hashlib
import random
import struct
import zlib
from collections.abc import Callable

import pytest

from imgsvc.runtime.streaming import spdy
from imgsvc.runtime.streaming.spdy import Answer, GoneAway, Session, SpdyError, StreamData, StreamOpened, StreamReset
from imgsvc.runtime.streaming.spdy_dictionary import DICTIONARY
from tests.support.stream_client import HeaderPacker, control, data_frame


class Client:
    """Bytes of a client, in order."""

    def __init__(self) -> None:
        self._packer = HeaderPacker()

    def syn(self, stream_id: int, headers: dict[str, str] | None = None, *, flags: int = 0) -> bytes:
        return control(1, struct.pack(">IIBB", stream_id, 0, 0, 0) + self._packer.pack(headers or {}), flags=flags)

    def syn_raw(self, stream_id: int, plain: bytes) -> bytes:
        return control(1, struct.pack(">IIBB", stream_id, 0, 0, 0) + self._packer.pack_raw(plain))


def opened(*stream_ids: int) -> tuple[Session, Client]:
    session, client = Session(), Client()
    for stream_id in stream_ids:
        session.receive(client.syn(stream_id))
    return session, client


def test_dictionary_is_the_one_of_spdy_3() -> None:
    assert len(DICTIONARY) == 1423
    assert hashlib.sha256(DICTIONARY).hexdigest() == "51d27341373f923f3cd88e1eb7162aeaa3723d7585ff2399201dc06498407f02"


def conversation() -> tuple[bytes, list[spdy.Event]]:
    client = Client()
    ping = control(6, struct.pack(">I", 1))
    sent = [
        client.syn(1, {"streamtype": "error"}),
        client.syn(3, {"Streamtype": "stdin", "port": "80"}),
        control(4, struct.pack(">IBBHI", 1, 0, 0, 4, 100)),
        data_frame(3, b"hello"),
        ping,
        control(9, struct.pack(">II", 3, 5)),
        data_frame(3, b"", fin=True),
        client.syn(5, {"streamtype": "stdout"}, flags=1),
        control(3, struct.pack(">II", 5, 5)),
        control(7, struct.pack(">II", 0, 0)),
    ]
    events: list[spdy.Event] = [
        StreamOpened(1, {"streamtype": "error"}, False),
        StreamOpened(3, {"streamtype": "stdin", "port": "80"}, False),
        StreamData(3, b"hello", False),
        Answer(ping),
        StreamData(3, b"", True),
        StreamOpened(5, {"streamtype": "stdout"}, True),
        StreamReset(5),
        GoneAway(),
    ]
    return b"".join(sent), events


def merged(events: list[spdy.Event]) -> list[spdy.Event]:
    """Adjacent data of one stream joined, as its pieces depend on how the bytes came."""
    result: list[spdy.Event] = []
    for event in events:
        last = result[-1] if result else None
        same = isinstance(event, StreamData) and isinstance(last, StreamData) and last.stream_id == event.stream_id and not last.fin
        if same and isinstance(event, StreamData) and isinstance(last, StreamData) and (last.data and event.data):
            result[-1] = StreamData(event.stream_id, last.data + event.data, event.fin)
        else:
            result.append(event)
    return result


def test_conversation_split_at_every_byte() -> None:
    sent, expected = conversation()
    for at in range(len(sent) + 1):
        session = Session()
        assert merged(session.receive(sent[:at]) + session.receive(sent[at:])) == expected, at


def test_conversation_byte_by_byte() -> None:
    sent, expected = conversation()
    session = Session()
    assert merged([event for i in range(len(sent)) for event in session.receive(sent[i : i + 1])]) == expected


def test_what_we_send_is_understood() -> None:
    session, _ = opened(1, 3)
    reply = session.reply(1) + session.reply(3)
    inflate = zlib.decompressobj(zdict=DICTIONARY)
    size = struct.unpack_from(">I", reply, 4)[0]
    assert reply[:4] == b"\x80\x03\x00\x02"
    assert inflate.decompress(reply[12 : 8 + size]) == b"\0\0\0\0"
    assert session.data(1, b"abc") == b"\0\0\0\x01\0\0\0\x03abc"
    assert session.data(1, b"d", fin=True) == b"\0\0\0\x01\x01\0\0\x01d"
    assert session.reset(3, spdy.Rst.CANCEL) == b"\x80\x03\x00\x03\0\0\0\x08\0\0\0\x03\0\0\0\x05"
    assert session.go_away() == b"\x80\x03\x00\x07\0\0\0\x08\0\0\0\x03\0\0\0\0"


def test_nothing_is_sent_on_a_closed_stream() -> None:
    session, _ = opened(1, 3)
    session.data(1, b"", fin=True)
    session.reset(3, spdy.Rst.CANCEL)
    assert session.data(1, b"late") == b""
    assert session.data(3, b"late") == b""
    assert session.reset(3, spdy.Rst.CANCEL) == b""


def test_half_close_leaves_the_other_direction_open() -> None:
    session, _ = opened(1)
    assert session.receive(data_frame(1, b"x", fin=True)) == [StreamData(1, b"x", True)]
    assert session.data(1, b"answer") != b""


def test_data_after_the_end_is_dropped() -> None:
    session, _ = opened(1)
    assert session.receive(data_frame(1, b"x", fin=True) + data_frame(1, b"late")) == [StreamData(1, b"x", True)]


def test_even_pings_are_not_echoed() -> None:
    assert Session().receive(control(6, struct.pack(">I", 2))) == []


HOSTILE: dict[str, Callable[[Client], bytes]] = {
    "control frame over the limit": lambda c: control(1, b"\0" * (spdy.MAX_CONTROL + 1)),
    "announces 16 MiB of control frame": lambda c: b"\x80\x03\x00\x01\x00\xff\xff\xff",
    "other version": lambda c: control(6, b"\0\0\0\x01", version=2),
    "unknown type": lambda c: control(99, b""),
    "short SYN_STREAM": lambda c: control(1, b"\0\0\0\x01"),
    "even stream": lambda c: c.syn(2),
    "stream zero": lambda c: c.syn(0),
    "stream opened twice": lambda c: c.syn(1) + c.syn(1),
    "stream ids going back": lambda c: c.syn(5) + c.syn(3),
    "data without a stream": lambda c: data_frame(7, b"x"),
    "data on stream zero": lambda c: data_frame(0, b"x"),
    "header block is not zlib": lambda c: control(1, struct.pack(">IIBB", 1, 0, 0, 0) + b"garbage"),
    "header count": lambda c: c.syn_raw(1, struct.pack(">I", 0xFFFFFFFF)),
    "many headers": lambda c: c.syn_raw(1, struct.pack(">I", 1000) + b"\0\0\0\x01a\0\0\0\0" * 1000),
    "header name length": lambda c: c.syn_raw(1, struct.pack(">II", 1, 0xFFFFFFFF) + b"a"),
    "header value length": lambda c: c.syn_raw(1, struct.pack(">II", 1, 1) + b"a" + struct.pack(">I", 0x7FFFFFFF)),
    "header block cut": lambda c: c.syn_raw(1, b"\0\0"),
    "bytes after the headers": lambda c: c.syn_raw(1, struct.pack(">I", 0) + b"more"),
    "settings count": lambda c: control(4, struct.pack(">I", 0xFFFFFFFF)),
    "settings cut": lambda c: control(4, b"\0"),
    "ping size": lambda c: control(6, b"\0" * 8),
    "reset size": lambda c: control(3, b"\0" * 4),
    "goaway size": lambda c: control(7, b""),
    "window update size": lambda c: control(9, b""),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_c_c9_hostile_frames_end_the_session(case: str) -> None:
    with pytest.raises(SpdyError):
        Session().receive(HOSTILE[case](Client()))


@pytest.mark.parametrize("megabytes", [1, 256])
def test_c_c9_header_bomb_is_not_inflated(megabytes: int) -> None:
    deflate = zlib.compressobj(9, zdict=DICTIONARY)
    zeros = bytes(1024 * 1024)
    bomb = b"".join(deflate.compress(zeros) for _ in range(megabytes)) + deflate.flush(zlib.Z_SYNC_FLUSH)
    frame = control(1, struct.pack(">IIBB", 1, 0, 0, 0) + bomb[: spdy.MAX_CONTROL - 10])
    with pytest.raises(SpdyError, match="more than"):
        Session().receive(frame)


def test_c_c9_open_streams_are_bounded() -> None:
    session, client = Session(), Client()
    events = [e for n in range(spdy.MAX_STREAMS + 10) for e in session.receive(client.syn(2 * n + 1))]
    refused = [e for e in events if isinstance(e, Answer)]
    assert len(refused) == 10
    assert refused[0].data[-1] == spdy.Rst.REFUSED_STREAM


def test_c_c9_streams_that_come_and_go_leave_nothing() -> None:
    session, client = Session(), Client()
    for n in range(50_000):
        stream_id = 2 * n + 1
        events = session.receive(client.syn(stream_id) + control(3, struct.pack(">II", stream_id, 5)))
        assert isinstance(events[-1], StreamReset)
    assert len(session._streams) == 0


def test_data_frame_of_16_mib_is_passed_on_as_it_comes() -> None:
    session, _ = opened(1)
    size = (1 << 24) - 1
    session.receive(struct.pack(">II", 1, size))
    got = 0
    while got < size:
        chunk = bytes(min(65536, size - got))
        (event,) = session.receive(chunk)
        assert isinstance(event, StreamData)
        got += len(event.data)
        assert len(session._buffer) == 0


@pytest.mark.parametrize("seed", range(40))
def test_random_bytes_end_in_spdy_error_only(seed: int) -> None:
    rng = random.Random(seed)
    sent, _ = conversation()
    damaged = bytearray(sent)
    for _ in range(rng.randint(1, 20)):
        damaged[rng.randrange(len(damaged))] = rng.randrange(256)
    session = Session()
    try:
        for at in range(0, len(damaged), 7):
            session.receive(bytes(damaged[at : at + 7]))
    except SpdyError:
        pass
