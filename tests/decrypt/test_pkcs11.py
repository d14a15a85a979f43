"""PKCS#11: a SoftHSM token of the test, opened by URI; and the rules for which module may be loaded."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa

from imgsvc.base.concurrency import CancelToken
from imgsvc.base.errors import Cancelled, ImgsvcError, InvalidArgument, PermissionDenied
from imgsvc.decrypt.interfaces import NotOpened
from imgsvc.decrypt.keys import KeyFileError, KeyRing, TokenFile
from imgsvc.decrypt.pkcs11 import ModulePolicy, Pkcs11Wrapper, TokenKey, _turn, load_policy, parse_token_file
from tests.decrypt.softhsm import MODULE, PIN, make_token, uri
from tests.decrypt.vectors import pkcs11

OPTIONS = b'{"symkey":"AAAA"}'


@dataclass(frozen=True)
class Token:
    """A token "images" with two keys: id 01 "first", id 02 "second"."""

    env: Mapping[str, str]
    first: rsa.RSAPrivateKey
    second: rsa.RSAPrivateKey

    def wrapper(self, uri: str, config: str = "", cancel: CancelToken | None = None) -> Pkcs11Wrapper:
        text = json.dumps({"pkcs11": {"uri": uri}, "module": {"env": dict(self.env)}}).encode()
        return Pkcs11Wrapper(KeyRing(tokens=(TokenFile("token.yaml", text),)), config, 20.0, cancel)


@pytest.fixture(scope="module")
def token(tmp_path_factory: pytest.TempPathFactory, rsa_key: rsa.RSAPrivateKey, other_rsa_key: rsa.RSAPrivateKey) -> Token:
    env = make_token(tmp_path_factory.mktemp("hsm"), {"first": rsa_key, "second": other_rsa_key})
    return Token(env, rsa_key, other_rsa_key)


@pytest.mark.compat
@pytest.mark.parametrize("digest", ["sha1", "sha256"])  # SoftHSM does only the first itself
def test_a_token_opens_a_packet(token: Token, digest: str) -> None:
    packet = pkcs11(OPTIONS, token.first.public_key(), digest)

    assert token.wrapper(uri()).unwrap(packet) == OPTIONS
    assert token.wrapper(uri()).recipients(packet) == [f"RSA 2048 bit, OAEP {digest}"]


@pytest.mark.compat
def test_keys_are_chosen_by_id_and_label_and_modules_by_name(token: Token) -> None:
    packet = pkcs11(OPTIONS, token.second.public_key(), "sha1")
    by_name = f"module-name=softhsm2&pin-value={PIN}"

    for path in ("token=images;id=%02", "token=images;object=second", "object=second;id=%02;token=images"):
        assert token.wrapper(uri(path, by_name)).unwrap(packet) == OPTIONS
    for path in ("token=images;id=%01", "token=images;id=%01;object=second", "token=images;object=third", "token=other;id=%02"):
        with pytest.raises(NotOpened):
            token.wrapper(uri(path, by_name)).unwrap(packet)


@pytest.mark.compat
def test_several_packets_at_once_do_not_disturb_each_other(token: Token) -> None:
    packet = pkcs11(OPTIONS, token.first.public_key(), "sha1")
    with ThreadPoolExecutor(4) as layers:
        assert list(layers.map(lambda _: token.wrapper(uri()).unwrap(packet), range(24))) == [OPTIONS] * 24


@pytest.mark.compat
def test_who_waits_for_a_module_can_be_cancelled(token: Token) -> None:
    cancel = CancelToken()
    cancel.cancel()
    with pytest.raises(Cancelled), _turn(os.path.realpath(MODULE), None), ThreadPoolExecutor(1) as layer:
        layer.submit(token.wrapper(uri(), cancel=cancel).unwrap, pkcs11(OPTIONS, token.first.public_key(), "sha1")).result(20)


@pytest.mark.compat
def test_a_pin_comes_from_a_file_too_and_is_never_shown(token: Token, tmp_path: Path) -> None:
    packet = pkcs11(OPTIONS, token.first.public_key(), "sha1")
    (tmp_path / "pin").write_text(PIN)
    for source in (f"{tmp_path}/pin", f"file:{tmp_path}/pin"):
        assert token.wrapper(uri(query=f"module-path={MODULE}&pin-source={source}")).unwrap(packet) == OPTIONS

    with pytest.raises(NotOpened, match="PinIncorrect") as caught:
        token.wrapper(uri(query=f"module-path={MODULE}&pin-value=wr0ng-pin")).unwrap(packet)
    assert "wr0ng-pin" not in str(caught.value)


@pytest.mark.compat
def test_a_bad_token_file_does_not_hide_a_good_one(token: Token) -> None:
    good = token.wrapper(uri())
    files = (TokenFile("bad", b"pkcs11: {uri: nonsense}"), TokenFile("worse", b"pkcs11: ["), *good._tokens)

    assert Pkcs11Wrapper(KeyRing(tokens=files), "", 20, None).unwrap(pkcs11(OPTIONS, token.first.public_key(), "sha1")) == OPTIONS


@pytest.mark.compat
@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler to build the module with")
def test_a_module_that_crashes_or_hangs_takes_nobody_along(token: Token, tmp_path: Path) -> None:
    packet = pkcs11(OPTIONS, token.first.public_key(), "sha1")
    source = tmp_path / "module.c"
    for body, reason in (("*(volatile int *)0 = 1;", "status -11"), ("for (;;);", "no answer within")):
        source.write_text(f"int C_GetFunctionList(void **list) {{ {body} return 5; }}\n")
        module = tmp_path / "evil.so"
        subprocess.run(["cc", "-shared", "-fPIC", "-o", str(module), str(source)], check=True)
        (tmp_path / "config").write_text(f"pkcs11: {{allowed-module-paths: [{tmp_path}/]}}")
        wrapper = token.wrapper(uri(query=f"module-path={module}&pin-value=1"), str(tmp_path / "config"))
        wrapper._timeout_s = 2.0
        with pytest.raises(NotOpened, match=reason):
            wrapper.unwrap(packet)


@pytest.mark.parametrize(
    "packet",
    [
        b"",
        b"{}",
        b'{"version": 1, "recipients": []}',
        b'{"recipients": [5]}',
        b'{"recipients": [{"blob": "***"}]}',
        b'{"recipients": [{"hash": "md5"}]}',
    ],
)
def test_damaged_packets_open_nothing(packet: bytes) -> None:
    wrapper = Pkcs11Wrapper(KeyRing(), "", 1, None)
    with pytest.raises(NotOpened):
        wrapper.unwrap(packet)
    assert wrapper.recipients(packet) == []


def read(address: str, policy: ModulePolicy | None = None, **document: object) -> TokenKey:
    text = json.dumps({"pkcs11": {"uri": address}, **document}).encode()
    return parse_token_file(TokenFile("f", text), policy or ModulePolicy())


def test_a_uri_is_decoded(tmp_path: Path) -> None:
    (tmp_path / "mod.so").touch()
    policy = ModulePolicy((str(tmp_path),), (str(tmp_path / "mod.so"),))
    key = read("pkcs11:slot-id=7;id=%00%ff;object=a%20b?module-name=MOD&pin-value=%31%26", policy, module={"env": {"A": 1}})

    assert (key.slot, key.key_id, key.label, key.pin, key.module, key.env) == (
        7,
        b"\0\xff",
        "a b",
        "1&",
        str(tmp_path / "mod.so"),
        {"A": "1"},
    )
    assert "1&" not in repr(key)


@pytest.mark.parametrize(
    "address",
    [
        "http://x",
        "pkcs11:",
        "pkcs11:object=x?pin-value=1",
        "pkcs11:token=x?pin-value=1",
        "pkcs11:slot-id=x;object=x?pin-value=1",
        "pkcs11:slot-id=4294967296;object=x?pin-value=1",
        "pkcs11:token=t;object=x?module-name=nothing-of-that-name&pin-value=1",
        f"pkcs11:token=t;object=x?module-path={MODULE}",
        f"pkcs11:token=t;object=x?module-path={MODULE}&pin-source=relative",
        f"pkcs11:token=t;object=x?module-path={MODULE}&pin-source=/no/such/file",
    ],
)
def test_a_uri_that_cannot_work_is_refused(address: str) -> None:
    with pytest.raises((KeyFileError, ImgsvcError)):
        read(address)


@pytest.mark.parametrize("path", ["/tmp/evil.so", "/usr/lib/softhsm/../../../tmp/evil.so", "/usr/lib/softhsm/sub/evil.so", "evil.so"])
def test_a_module_outside_the_allowed_places_is_never_loaded(path: str) -> None:
    with pytest.raises(PermissionDenied, match="not allowed"):
        read(f"pkcs11:token=t;object=x?module-path={path}&pin-value=1")


def test_the_configuration_says_what_is_allowed(tmp_path: Path) -> None:
    file = tmp_path / "ocicrypt.conf"
    file.write_text("pkcs11:\n  module-directories: [/opt/hsm]\n  allowed-module-paths: [/opt/hsm/, /exact.so]\n")
    policy = load_policy(str(file))

    assert [policy.allows(p) for p in ("/opt/hsm/a.so", "/exact.so", "/opt/hsm/b/a.so", "/exact.so.1")] == [True, True, False, False]
    assert load_policy("") == load_policy("internal") == ModulePolicy()
    for text in ("[]", "pkcs11: 5", "pkcs11: {allowed-module-paths: x}", "{"):
        file.write_text(text)
        with pytest.raises(InvalidArgument):
            load_policy(str(file))
    with pytest.raises(InvalidArgument):
        load_policy(str(tmp_path / "missing"))
