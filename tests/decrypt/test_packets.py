"""What a descriptor says, including what it must not be believed."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from imgsvc.base.errors import InvalidArgument
from imgsvc.decrypt.packets import MAX_ITEMS, is_encrypted, layer_options, plain_type, public_options, wrapped_keys
from tests.decrypt.vectors import ENC, b64, seal

OCI = "application/vnd.oci.image.layer."


@pytest.mark.parametrize(
    "plain",
    [
        *(f"{OCI}{kind}v1.tar{pack}" for kind in ("", "nondistributable.") for pack in ("", "+gzip", "+zstd")),
        "application/vnd.docker.image.rootfs.diff.tar.gzip",
        "application/vnd.wasm.content.layer.v1+wasm",
    ],
)
def test_the_decrypted_type_is_the_type_without_its_suffix(plain: str) -> None:
    assert is_encrypted(plain + "+encrypted")
    assert not is_encrypted(plain)
    assert plain_type(plain + "+encrypted") == plain


def test_a_damaged_item_does_not_hide_its_neighbours() -> None:
    layer = replace(
        seal(b"x").descriptor(), annotations={ENC + "keys.jwe": f"***, {b64(b'b')},{b64(b'two')},AA", ENC + "keys.provider.p": b64(b"x")}
    )

    assert [(k.scheme, k.packet) for k in wrapped_keys(layer)] == [
        ("jwe", None),  # not base64
        ("jwe", None),  # a space after the comma
        ("jwe", b"two"),
        ("jwe", None),  # no padding
        ("provider.p", b"x"),
    ]


def test_line_ends_inside_base64_are_ignored_as_go_does() -> None:
    layer = replace(seal(b"x").descriptor(), annotations={ENC + "keys.jwe": "dH\r\ndv,"})

    assert [k.packet for k in wrapped_keys(layer)] == [b"two"]


def test_too_many_wrapped_keys_are_refused() -> None:
    with pytest.raises(InvalidArgument):
        wrapped_keys(seal(b"x").descriptor(jwe=[b"x"] * (MAX_ITEMS + 1)))


@pytest.mark.parametrize(
    "pubopts", [None, "***", b64(b"[]"), b64(b"{}"), b64(b'{"cipher":"NONE"}'), b64(b'{"cipher":' * 9000), b64(b"{" + b" " * 70_000 + b"}")]
)
def test_public_options_nobody_can_use_are_refused(pubopts: str | None) -> None:
    layer = replace(seal(b"x").descriptor(), annotations={} if pubopts is None else {ENC + "pubopts": pubopts})

    with pytest.raises(InvalidArgument):
        public_options(layer)


def test_member_names_match_regardless_of_case_and_unknown_ones_are_ignored() -> None:
    sealed = seal(b"x", nonce=b"n" * 16)
    private = {"SymKey": sealed.private["symkey"], "CipherOptions": {"Nonce": b64(b"n" * 16)}, "new": 1}

    assert layer_options(json.dumps(private).encode(), sealed.public, "layer").nonce == b"n" * 16


@pytest.mark.parametrize(
    "private, public",
    [
        ({"cipheroptions": {}}, {}),  # no nonce anywhere: the reference makes one up
        ({"cipheroptions": None}, {"cipheroptions": None}),
        ({"cipheroptions": []}, {}),
        ({}, {"cipheroptions": {"nonce": b64(b"m" * 16)}}),  # a public nonce overrides the wrapped one in the reference
        ({"cipheroptions": {"nonce": b64(b"n" * 12)}}, {}),
        ({"cipheroptions": {"nonce": 5}}, {}),
        ({"symkey": b64(b"k" * 16)}, {}),
        ({"symkey": "***"}, {}),
        ({"symkey": None}, {}),
        ({"SYMKEY": b64(b"k" * 32)}, {}),  # twice
        ({}, {"hmac": ""}),
        ({}, {"hmac": b64(b"m" * 31)}),
        ({}, {"hmac": None}),
    ],
)
def test_options_that_break_a_rule_are_refused(private: dict[str, object], public: dict[str, object]) -> None:
    sealed = seal(b"x")

    with pytest.raises(InvalidArgument):
        layer_options(json.dumps(sealed.private | private).encode(), sealed.public | public, "layer")


def test_the_same_nonce_in_both_is_accepted_and_the_digest_is_not_judged() -> None:
    sealed = seal(b"x", nonce=b"n" * 16)
    public = sealed.public | {"cipheroptions": {"nonce": b64(b"n" * 16)}}

    options = layer_options(json.dumps(sealed.private | {"digest": "anything"}).encode(), public, "layer")

    assert options.nonce == b"n" * 16


def test_no_error_quotes_key_material() -> None:
    secret = "c2VjcmV0LWtleS1tYXRlcmlhbA=="
    for private in (f'{{"symkey": "{secret}"}}', f'{{"symkey": {secret}}}', secret, f'{{"{secret}": 1, "{secret}": 2}}'):
        with pytest.raises(InvalidArgument) as caught:
            layer_options(private.encode(), {}, "layer")
        assert "c2Vj" not in str(caught.value)
