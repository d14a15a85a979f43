from __future__ import annotations

import random
import struct

import pytest

from imgsvc.runtime.streaming.websocket import (
    Answer,
    CloseCode,
    Closed,
    Event,
    MessagePart,
    Opcode,
    Receiver,
    WebSocketError,
    accept_key,
    close_frame,
    frame,
    xor,
)
from tests.support.stream_client import masked


def messages(events: list[Event]) -> list[bytes]:
    whole: list[bytes] = []
    for event in events:
        if isinstance(event, MessagePart):
            if event.first:
                whole.append(b"")
            whole[-1] += event.data
    return whole


def test_accept_key_of_rfc_6455() -> None:
    assert accept_key("dGhlIHNhbXBsZSBub25jZQ==") == "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="


@pytest.mark.parametrize("key", ["", "short", "AAAA", "dGhlIHNhbXBsZSBub25jZQ", "x" * 24, "dGhlIHNhbXBsZSBub25jZSBhbmQgbW9yZQ=="])
def test_bad_keys_are_refused(key: str) -> None:
    with pytest.raises(WebSocketError):
        accept_key(key)


def test_masked_hello_of_rfc_6455() -> None:
    events = Receiver().receive(bytes.fromhex("818537fa213d7f9f4d5158"))
    assert events == [MessagePart(b"Hello", first=True, last=True)]


@pytest.mark.parametrize(
    "size, head", [(0, "8200"), (125, "827d"), (126, "827e007e"), (65535, "827effff"), (65536, "827f0000000000010000")]
)
def test_frame_lengths(size: int, head: str) -> None:
    assert frame(Opcode.BINARY, b"x" * size) == bytes.fromhex(head) + b"x" * size


def test_conversation_split_at_every_byte() -> None:
    sent = (
        masked(2, b"\0one", fin=False)
        + masked(9, b"ping")
        + masked(0, b"", fin=False)
        + masked(0, b" two" * 40)
        + masked(2, b"")
        + masked(10, b"unasked pong")
        + masked(2, b"z" * 300)
        + masked(8, struct.pack(">H", 1000) + b"bye")
    )
    for at in range(len(sent) + 1):
        receiver = Receiver()
        events = receiver.receive(sent[:at]) + receiver.receive(sent[at:])
        assert messages(events) == [b"\0one" + b" two" * 40, b"", b"z" * 300], at
        assert [e for e in events if isinstance(e, Answer)] == [Answer(frame(Opcode.PONG, b"ping"))]
        assert events[-1] == Closed(close_frame(CloseCode.NORMAL))


def test_parts_mark_begin_and_end() -> None:
    receiver = Receiver()
    whole = masked(2, b"abcdef")
    assert receiver.receive(whole[:9]) == [MessagePart(b"abc", first=True, last=False)]
    assert receiver.receive(whole[9:]) == [MessagePart(b"def", first=False, last=True)]


def test_nothing_is_read_after_close() -> None:
    receiver = Receiver()
    receiver.receive(masked(8, b""))
    assert receiver.receive(masked(2, b"more") + b"\xff" * 50) == []


HOSTILE = {
    "not masked": bytes([0x82, 1]) + b"x",
    "reserved bit": bytes([0xC2, 0x80]) + b"\0\0\0\0",
    "unknown opcode": masked(3, b""),
    "unknown control": masked(11, b""),
    "long ping": masked(9, b"x" * 126),
    "fragmented close": masked(8, b"", fin=False),
    "close of one byte": masked(8, b"x"),
    "continuation of nothing": masked(0, b"x"),
    "message in a message": masked(2, b"x", fin=False) + masked(2, b"y"),
    "length of 2^63": bytes([0x82, 0xFF]) + b"\x80" + b"\0" * 7 + b"\0\0\0\0",
}


@pytest.mark.parametrize("case", HOSTILE)
def test_c_c9_hostile_frames_end_the_session(case: str) -> None:
    with pytest.raises(WebSocketError):
        Receiver().receive(HOSTILE[case])


def test_c_c9_a_huge_frame_is_passed_on_and_not_kept() -> None:
    receiver = Receiver()
    receiver.receive(bytes([0x82, 0xFF]) + struct.pack(">Q", 1 << 40) + b"\0\0\0\0")
    for _ in range(100):
        (part,) = receiver.receive(bytes(65536))
        assert isinstance(part, MessagePart)
        assert len(part.data) == 65536
        assert len(receiver._buffer) == 0


@pytest.mark.parametrize("size", [1, 3, 4, 5, 63, 64, 1000])
def test_xor_agrees_with_a_loop(size: int) -> None:
    data, mask = random.Random(size).randbytes(size), b"\xa0\x0b\x00\xff"
    assert xor(data, mask) == bytes(b ^ mask[i % 4] for i, b in enumerate(data))


@pytest.mark.parametrize("seed", range(40))
def test_random_bytes_end_in_websocket_error_only(seed: int) -> None:
    rng = random.Random(seed)
    damaged = bytearray(masked(2, b"\0hello", fin=False) + masked(0, b"x" * 200) + masked(9, b"p") + masked(8, b"\x03\xe8"))
    for _ in range(rng.randint(1, 10)):
        damaged[rng.randrange(len(damaged))] = rng.randrange(256)
    receiver = Receiver()
    try:
        for at in range(0, len(damaged), 5):
            receiver.receive(bytes(damaged[at : at + 5]))
    except WebSocketError:
        pass
