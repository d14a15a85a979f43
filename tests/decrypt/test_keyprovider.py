"""Key providers: a command and a gRPC server of the tests, and providers that misbehave."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.wrappers_pb2 import BytesValue

from imgsvc.base.concurrency import CancelToken
from imgsvc.base.errors import Cancelled, InvalidArgument
from imgsvc.decrypt.interfaces import NotOpened
from imgsvc.decrypt.keyprovider import GrpcTls, Provider, ProviderWrapper, load_providers
from tests.decrypt.providers import COMMAND, Server, reverse

OPTIONS = b'{"symkey":"AAAA"}'


def command(script: str, *arguments: str) -> Provider:
    return Provider("test", (sys.executable, "-c", script, *arguments))


def answer(value: object) -> Provider:
    return command("import sys; print(sys.argv[1])", json.dumps(value))


def test_a_command_gets_the_packet_and_its_own_parameters_only(tmp_path: Path) -> None:
    wrapper = ProviderWrapper(command(COMMAND, str(tmp_path / "seen")), [b"mine"])

    assert wrapper.scheme == "provider.test"
    assert wrapper.unwrap(OPTIONS[::-1]) == OPTIONS
    assert json.loads((tmp_path / "seen").read_text()) == {
        "op": "keyunwrap",
        "keywrapparams": {"ec": None, "optsdata": None},
        "keyunwrapparams": {"dc": {"Parameters": {"test": ["bWluZQ=="]}}, "annotation": base64.b64encode(OPTIONS[::-1]).decode()},
    }


@pytest.mark.parametrize(
    "value", [{}, {"keyunwrapresults": None}, {"keyunwrapresults": {"optsdata": None}}, {"keyunwrapresults": {"optsdata": ""}}]
)
def test_an_answer_without_options_means_the_next_packet(value: object) -> None:
    with pytest.raises(NotOpened, match="has no key") as caught:
        ProviderWrapper(answer(value)).unwrap(b"x")
    assert not caught.value.lasting


@pytest.mark.parametrize("value", [[], "text", {"keyunwrapresults": {"optsdata": "***"}}, {"keyunwrapresults": 5}])
def test_an_answer_of_another_shape_opens_nothing(value: object) -> None:
    with pytest.raises(NotOpened):
        ProviderWrapper(answer(value)).unwrap(b"x")


def test_c_e3_a_failing_provider_is_named_with_its_stderr() -> None:
    with pytest.raises(NotOpened, match=r"exit status 1: no token for this node\\x1b"):
        ProviderWrapper(command("import sys; sys.exit('no token for this node\\x1b[31m')")).unwrap(b"x")


def test_c_e3_a_provider_that_hangs_is_killed_with_its_helpers(tmp_path: Path) -> None:
    provider = Provider("test", ("sh", "-c", f"sleep 600 & echo $! > {tmp_path}/pid; wait"))
    started = time.monotonic()
    with pytest.raises(NotOpened, match="no answer within 2 s"):
        ProviderWrapper(provider, timeout_s=2).unwrap(b"x")

    assert time.monotonic() - started < 60
    wait_gone((tmp_path / "pid").read_text().strip())


def wait_written(path: Path) -> None:
    for _ in range(6000):
        if path.exists() and path.read_text():
            return
        time.sleep(0.01)
    pytest.fail(f"nothing in {path}")


def wait_gone(pid: str) -> None:
    for _ in range(6000):
        status = Path(f"/proc/{pid}/status")
        if not status.exists() or "State:\tZ" in status.read_text():
            return
        time.sleep(0.01)
    pytest.fail(f"process {pid} is still there")


def test_c_e3_a_provider_that_prints_without_end_is_cut_off() -> None:
    flood = "import sys\nfor _ in range(1024): sys.stdout.write('x' * 1024 * 1024)"
    started = time.monotonic()
    with pytest.raises(NotOpened, match="printed more than"):
        ProviderWrapper(command(flood)).unwrap(b"x")
    assert time.monotonic() - started < 60


def test_c_e3_stderr_without_end_is_bounded() -> None:
    flood = "import sys\nfor _ in range(100): sys.stderr.write('x' * 1024 * 1024)\nsys.exit(1)"
    with pytest.raises(NotOpened) as caught:
        ProviderWrapper(command(flood)).unwrap(b"x")
    assert len(str(caught.value)) < 2000


def test_a_provider_that_never_reads_its_input_cannot_block() -> None:
    with pytest.raises(NotOpened):
        ProviderWrapper(command("pass")).unwrap(b"x" * 1_000_000)


def test_a_cancelled_caller_does_not_wait_for_the_deadline() -> None:
    token = CancelToken()
    threading.Timer(0.3, token.cancel).start()
    started = time.monotonic()
    with pytest.raises(Cancelled):
        ProviderWrapper(command("import time; time.sleep(600)"), cancel=token).unwrap(b"x")
    assert time.monotonic() - started < 60


def test_a_missing_program_is_a_reason() -> None:
    with pytest.raises(NotOpened, match="/no/such/program: cannot start"):
        ProviderWrapper(Provider("test", ("/no/such/program",))).unwrap(b"x")


def refuse(_server: Server, _request: object, context: grpc.ServicerContext) -> bytes:
    context.abort(grpc.StatusCode.PERMISSION_DENIED, "not for this node")
    raise AssertionError


def hang(server: Server, _request: object, _context: grpc.ServicerContext) -> bytes:
    server.release.wait(60)
    return b""


def flood(_server: Server, _request: object, _context: grpc.ServicerContext) -> bytes:
    return BytesValue(value=b"x" * 3_000_000).SerializeToString()


def nonsense(_server: Server, _request: object, _context: grpc.ServicerContext) -> bytes:
    return b"\xff\xff\xff"


@pytest.fixture
def serve() -> Iterator[Any]:
    running: list[Server] = []

    def start(behave: Any, credentials: grpc.ServerCredentials | None = None) -> Server:
        running.append(Server(behave, credentials))
        return running[-1]

    yield start
    for server in running:
        server.stop()


def test_a_grpc_provider_unwraps_and_gets_no_keys(serve: Any) -> None:
    server = serve(reverse)

    assert ProviderWrapper(Provider("test", (), server.address)).unwrap(OPTIONS[::-1]) == OPTIONS
    assert server.requests[0]["keyunwrapparams"]["dc"] == {"Parameters": {}}


@pytest.mark.parametrize(
    "behave, reason",
    [(refuse, "PERMISSION_DENIED: not for this node"), (flood, "RESOURCE_EXHAUSTED"), (nonsense, "not a message"), (hang, "DEADLINE")],
)
def test_c_e3_grpc_providers_that_misbehave_are_a_reason(serve: Any, behave: Any, reason: str) -> None:
    started = time.monotonic()
    with pytest.raises(NotOpened, match=reason):
        ProviderWrapper(Provider("test", (), serve(behave).address), timeout_s=1).unwrap(b"x")
    assert time.monotonic() - started < 60


def test_a_grpc_provider_that_is_down_is_a_reason() -> None:
    with pytest.raises(NotOpened, match="UNAVAILABLE"):
        ProviderWrapper(Provider("test", (), "localhost:1"), timeout_s=2).unwrap(b"x")


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A server certificate for keys.example.test, a client certificate, both their own CA."""
    root = tmp_path_factory.mktemp("tls")
    for name, subject in (("server", "keys.example.test"), ("client", "node")):
        command = [
            "openssl",
            "req",
            "-x509",
            "-newkey",
            "rsa:2048",
            "-nodes",
            "-subj",
            f"/CN={subject}",
            "-addext",
            f"subjectAltName=DNS:{subject}",
        ]
        subprocess.run([*command, "-keyout", f"{root}/{name}.key", "-out", f"{root}/{name}.crt"], check=True, capture_output=True)
    return root


def test_mutual_tls(serve: Any, certificates: Path) -> None:
    key, chain, clients = ((certificates / n).read_bytes() for n in ("server.key", "server.crt", "client.crt"))
    server = serve(reverse, grpc.ssl_server_credentials([(key, chain)], clients, require_client_auth=True))
    root, client, secret = (str(certificates / n) for n in ("server.crt", "client.crt", "client.key"))
    good = GrpcTls(root, client, secret, "keys.example.test")
    bad = [
        None,
        GrpcTls(good.root_ca_file, "", "", good.server_name),  # no client certificate
        GrpcTls(good.root_ca_file, good.cert_file, good.key_file),  # another name
        GrpcTls(good.cert_file, good.cert_file, good.key_file, good.server_name),  # another CA
        GrpcTls(good.root_ca_file, good.cert_file, "/no/such/file", good.server_name),
    ]

    assert ProviderWrapper(Provider("test", (), server.address, good)).unwrap(OPTIONS[::-1]) == OPTIONS
    for tls in bad:
        with pytest.raises(NotOpened):
            ProviderWrapper(Provider("test", (), server.address, tls), timeout_s=2).unwrap(OPTIONS[::-1])
    assert len(server.requests) == 1


def test_the_configuration_is_read(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    tls = {"root-ca-file": "/ca", "server-name": "n"}
    providers = {
        "a": {"cmd": {"path": "/p", "args": ["x"]}, "grpc": "ignored:1"},
        "b": {"grpc": "h:1", "grpc-tls": tls},
        "c": {"grpc": "h:2"},
    }
    file.write_text(json.dumps({"key-providers": providers}))

    assert load_providers(file) == (
        Provider("a", ("/p", "x")),
        Provider("b", (), "h:1", GrpcTls("/ca", server_name="n")),
        Provider("c", (), "h:2"),
    )
    assert load_providers(tmp_path / "missing") == load_providers(None) == ()


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{",
        '{"key-providers": 5}',
        '{"key-providers": {"a": 5}}',
        '{"key-providers": {"a": {}}}',
        '{"key-providers": {"a": {"cmd": {"path": "/p", "args": "x"}}}}',
        '{"key-providers": {"a": {"path": "/p"}}}',
        '{"key-providers": {"a": {"grpc": "h:1", "grpc-tls": {"insecure-skip-verify": true}}}}',
        '{"key-providers": {"a": {"grpc": "h:1", "grpc-tls": {"root-ca-file": 5}}}}',
    ],
)
def test_a_configuration_that_cannot_work_is_refused_naming_the_file(tmp_path: Path, text: str) -> None:
    file = tmp_path / "config.json"
    file.write_text(text)
    with pytest.raises(InvalidArgument) as caught:
        load_providers(file)
    assert str(file) in caught.value.where
