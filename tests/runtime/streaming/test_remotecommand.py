from __future__ import annotations

import base64
import json

import pytest

from imgsvc.runtime.streaming.interfaces import StreamWants, TerminalSize
from imgsvc.runtime.streaming.remotecommand import (
    SPDY_VERSIONS,
    WEBSOCKET_VERSIONS,
    ChannelData,
    ChannelDecoder,
    Outcome,
    RemoteCommandError,
    Role,
    SizeParser,
    channel_message,
    encode_status,
    expected_roles,
    role_of,
)
from imgsvc.runtime.streaming.websocket import MessagePart

V1, V4, V5 = (WEBSOCKET_VERSIONS[n] for n in ("channel.k8s.io", "v4.channel.k8s.io", "v5.channel.k8s.io"))
V4_BASE64 = WEBSOCKET_VERSIONS["v4.base64.channel.k8s.io"]


def whole(data: bytes) -> MessagePart:
    return MessagePart(data, first=True, last=True)


@pytest.mark.parametrize(
    "name, tty, roles",
    [
        ("channel.k8s.io", True, {Role.ERROR, Role.STDIN, Role.STDOUT}),
        ("v2.channel.k8s.io", True, {Role.ERROR, Role.STDIN, Role.STDOUT}),
        ("v3.channel.k8s.io", True, {Role.ERROR, Role.STDIN, Role.STDOUT, Role.RESIZE}),
        ("v4.channel.k8s.io", True, {Role.ERROR, Role.STDIN, Role.STDOUT, Role.RESIZE}),
        ("v4.channel.k8s.io", False, {Role.ERROR, Role.STDIN, Role.STDOUT}),
    ],
)
def test_expected_streams(name: str, tty: bool, roles: set[Role]) -> None:
    assert expected_roles(StreamWants(stdin=True, stdout=True, stderr=False, tty=tty), SPDY_VERSIONS[name]) == roles


def test_status_of_success() -> None:
    assert json.loads(encode_status(Outcome(), V4)) == {"metadata": {}, "status": "Success"}


def test_status_of_an_exit_code() -> None:
    status = json.loads(encode_status(Outcome(exit_code=3), V5))
    assert (status["status"], status["reason"]) == ("Failure", "NonZeroExitCode")
    assert status["details"]["causes"] == [{"reason": "ExitCode", "message": "3"}]


def test_status_of_an_error() -> None:
    status = json.loads(encode_status(Outcome(error='no "such" thing'), V4))
    assert (status["reason"], status["code"]) == ("InternalError", 500)
    assert status["message"] == 'Internal error occurred: no "such" thing'


@pytest.mark.parametrize(
    "outcome, text",
    [(Outcome(), b""), (Outcome(exit_code=2), b"command terminated with exit code 2"), (Outcome(error="boom"), b"boom")],
)
def test_status_before_v4_is_text_on_failure_only(outcome: Outcome, text: bytes) -> None:
    assert encode_status(outcome, V1) == text


def test_sizes_split_at_every_byte() -> None:
    sent = b'{"Width":80,"Height":24}\n {"width":65535,"HEIGHT":0}{"Width":1,"Height":2}'
    for at in range(len(sent) + 1):
        parser = SizeParser()
        assert parser.feed(sent[:at]) + parser.feed(sent[at:]) == [TerminalSize(80, 24), TerminalSize(65535, 0), TerminalSize(1, 2)]


@pytest.mark.parametrize(
    "text",
    [
        b"[]}",
        b'{"Width":80}',
        b'{"Width":65536,"Height":1}',
        b'{"Width":-1,"Height":1}',
        b'{"Width":1.5,"Height":1}',
        b'{"Width":true,"Height":1}',
        b'{"Width":"80","Height":1}',
        b"\xff\xfe}",
        b"{" * 2000,
        b"[" * 60000 + b"}",
        b" x" * 600,
    ],
)
def test_hostile_sizes_are_refused(text: bytes) -> None:
    with pytest.raises(RemoteCommandError):
        SizeParser().feed(text)


def test_channel_data_in_pieces() -> None:
    decoder = ChannelDecoder(V4)
    assert decoder.feed(MessagePart(b"", first=True, last=False)) == []
    assert decoder.feed(MessagePart(b"\0", first=False, last=False)) == []
    assert decoder.feed(MessagePart(b"ab", first=False, last=False)) == [ChannelData(0, b"ab")]
    assert decoder.feed(MessagePart(b"c", first=False, last=True)) == [ChannelData(0, b"c")]
    assert decoder.feed(whole(b"\x04{}")) == [ChannelData(4, b"{}")]


def test_v5_closes_a_channel() -> None:
    assert ChannelDecoder(V5).feed(whole(b"\xff\x00")) == [ChannelData(0, b"", eof=True)]


def test_v5_close_in_pieces() -> None:
    decoder = ChannelDecoder(V5)
    assert decoder.feed(MessagePart(b"\xff", first=True, last=False)) == []
    assert decoder.feed(MessagePart(b"\x00", first=False, last=True)) == [ChannelData(0, b"", eof=True)]
    assert decoder.feed(whole(b"\0x")) == [ChannelData(0, b"x")]


def test_v5_close_of_two_channels_is_refused() -> None:
    with pytest.raises(RemoteCommandError):
        ChannelDecoder(V5).feed(whole(b"\xff\x00\x01"))


def test_v4_has_no_channel_255() -> None:
    (item,) = ChannelDecoder(V4).feed(whole(b"\xff\x00"))
    with pytest.raises(RemoteCommandError):
        role_of(item.channel)


def test_base64_message_is_kept_until_whole() -> None:
    decoder = ChannelDecoder(V4_BASE64)
    text = b"0" + base64.b64encode(b"hello")
    assert decoder.feed(MessagePart(text[:4], first=True, last=False)) == []
    assert decoder.feed(MessagePart(text[4:], first=False, last=True)) == [ChannelData(0, b"hello")]


def test_base64_message_without_end_is_refused() -> None:
    decoder = ChannelDecoder(V4_BASE64)
    for _ in range(16):
        decoder.feed(MessagePart(b"0" * 65536, first=False, last=False))
    with pytest.raises(RemoteCommandError):
        decoder.feed(MessagePart(b"0", first=False, last=False))


def test_base64_nonsense_is_refused() -> None:
    with pytest.raises(RemoteCommandError):
        ChannelDecoder(V4_BASE64).feed(whole(b"0***"))


def test_messages_we_send() -> None:
    assert channel_message(1, b"x", as_base64=False) == b"\x82\x02\x01x"
    assert channel_message(3, b"x", as_base64=True) == b"\x81\x053eA=="
