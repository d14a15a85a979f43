"""needs.md C2: one test or more per row, by its ID, against servers on loopback. C-R12 and C-R13 are in test_download.py."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import logging
import time
import traceback
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from imgsvc.base.errors import ImgsvcError, InvalidArgument
from imgsvc.base.oci import DOCKER_CONFIG, MAX_DOCUMENT, MIB, OCI_INDEX, OCI_MANIFEST, Descriptor, Digest
from imgsvc.base.reference import Reference
from imgsvc.registry.http.netguard import Reach
from imgsvc.registry.http.netstream import AddressRefused, Backend
from imgsvc.registry.interfaces import Credential, PullFailed
from tests.fakes.registry import FakeRegistry, Reply, Request
from tests.registry.certs import authority
from tests.registry.real import PATIENT
from tests.registry.support import MemorySink, blob, client_for, fails, hosts_d, image_of, noise, pull, run

SECRET = "hunter2-very-secret"
TOKEN = "tok-registry-very-secret"
CALLER = Credential("CRI request", "robot", SECRET)
BASIC = base64.b64encode(f"robot:{SECRET}".encode()).decode()
APP = Reference.parse("docker.io/library/app")


def only(fake: FakeRegistry, extra: str = "") -> dict[str, str]:
    return {"docker.io": f'server = "{fake.url}"\n{extra}'}


async def resolve(root: Path, reference: Reference = APP, credential: Credential | None = None) -> None:
    async with client_for(root) as client:
        await client.resolve(reference, credential)


def has_secret(*fakes: FakeRegistry) -> bool:
    """Whether the password, in any form it travels in, reached one of these."""
    return any(form in fake.everything_received() for fake in fakes for form in (SECRET, BASIC, TOKEN))


# --- C-R1 … C-R3: documents and digests


def _without_digest(kind: str, body: bytes) -> Reply:
    return Reply(200, {"Content-Type": kind}, body)


EMPTY_CONFIG = {"mediaType": DOCKER_CONFIG, "digest": str(Digest.of(b"{}")), "size": 2}


@pytest.mark.parametrize(
    "kind, body",
    [
        (OCI_MANIFEST, json.dumps({"schemaVersion": 2, "config": EMPTY_CONFIG, "layers": [], "manifests": []}).encode()),
        (OCI_INDEX, json.dumps({"schemaVersion": 2, "config": EMPTY_CONFIG, "layers": [], "manifests": []}).encode()),
        (OCI_INDEX, json.dumps({"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": EMPTY_CONFIG, "layers": []}).encode()),
        (OCI_MANIFEST, b'{"schemaVersion":2,"fsLayers":[],"history":[]}'),
        (OCI_MANIFEST, b'{"schemaVersion":2,"layers":[],"layers":[],"config":{}}'),
        (OCI_MANIFEST, b"\xef\xbb\xbf" + json.dumps({"schemaVersion": 2, "config": EMPTY_CONFIG, "layers": []}).encode()),
        (OCI_MANIFEST, json.dumps({"schemaVersion": 2, "config": EMPTY_CONFIG, "layers": []}).encode("utf-16")),
    ],
    ids=["both-as-manifest", "both-as-index", "other-type", "schema1", "duplicate", "bom", "utf-16"],
)
def test_c_r1_ambiguous_documents_are_refused_before_any_blob(tmp_path: Path, kind: str, body: bytes) -> None:
    with FakeRegistry() as fake:
        fake.rule(fake.on("/manifests/", _without_digest(kind, body)))
        hosts_d(tmp_path, only(fake))

        async def main() -> None:
            async with client_for(tmp_path) as client:
                await pull(client, str(APP))

        assert fails(main()).code == "INVALID_ARGUMENT"
        assert not fake.seen("/blobs/")


def test_c_r1_content_type_must_be_the_descriptors(tmp_path: Path) -> None:
    with FakeRegistry() as fake:
        image = image_of()
        fake.add(image, "library/app")

        def renamed(request: Request) -> Reply | None:
            honest = fake.honest(request)
            return None if request.method == "HEAD" else Reply(200, {"Content-Type": OCI_INDEX}, honest.body)

        fake.rule(fake.on("/manifests/", renamed))
        hosts_d(tmp_path, only(fake))

        async def main() -> None:
            async with client_for(tmp_path) as client:
                await pull(client, str(APP))

        assert fails(main()).code == "INVALID_ARGUMENT"
        assert not fake.seen("/blobs/")


HUGE = {"body": b" " * MIB, "repeat": 5 * 1024, "length": -1}  # 5 GiB in chunks, without a length


@pytest.mark.parametrize("what", ["manifest", "config", "token", "error"])
def test_c_r2_endless_bodies_are_cut_off_early(tmp_path: Path, what: str) -> None:
    with FakeRegistry() as fake:
        image = image_of()
        fake.add(image, "library/app")
        huge = Reply(200, **HUGE)  # type: ignore[arg-type]
        if what == "manifest":
            fake.rule(fake.on("/manifests/", huge))
        elif what == "config":
            fake.rule(fake.on(f"/blobs/{image.config_digest}", huge))
        elif what == "token":
            fake.rule(fake.on("/v2/", Reply(401, {"WWW-Authenticate": f'Bearer realm="{fake.url}/token"'})))
            fake.rule(fake.on("/token", huge))
        else:
            fake.rule(fake.on("/manifests/", Reply(403, **HUGE)))  # type: ignore[arg-type]
        hosts_d(tmp_path, only(fake))

        async def main() -> None:
            async with client_for(tmp_path) as client:
                await pull(client, str(APP))

        assert fails(main()).code in ("RESOURCE_EXHAUSTED", "DATA_LOSS", "PERMISSION_DENIED")
        assert fake.sent < 64 * MIB


@pytest.mark.parametrize(
    "body",
    [
        b'{"schemaVersion":2,"a":' + b"[" * 100_000,
        b'{"schemaVersion":' + b"9" * 3_000_000 + b"}",
        b'{"schemaVersion":2,"config":{},"layers":[' + b",".join([b"{}"] * 500_000) + b"]}",
    ],
    ids=["nesting", "digits", "descriptors"],
)
def test_c_r2_hostile_json_is_an_error_in_time(tmp_path: Path, body: bytes) -> None:
    with FakeRegistry() as fake:
        fake.rule(fake.on("/manifests/", _without_digest(OCI_MANIFEST, body)))
        hosts_d(tmp_path, only(fake))
        started = time.monotonic()
        assert fails(resolve(tmp_path)).code in ("INVALID_ARGUMENT", "RESOURCE_EXHAUSTED")
        assert time.monotonic() - started < 30


@pytest.mark.parametrize(
    "digest",
    ["sha256:../../etc/x", "sha256:" + "a" * 63, "sha256:" + "a" * 65, "sha256:" + "A" * 64, "md5:" + "a" * 32, "sha512:" + "a" * 64],
)
def test_c_r3_digests_in_headers_and_references(tmp_path: Path, digest: str) -> None:
    with FakeRegistry() as fake:
        fake.add(image_of(), "library/app")

        def lying(request: Request) -> Reply:
            honest = fake.honest(request)
            return Reply(200, {**honest.headers, "Docker-Content-Digest": digest}, honest.body)

        fake.rule(fake.on("/manifests/", lying))
        hosts_d(tmp_path, only(fake))
        assert fails(resolve(tmp_path)).code == "INVALID_ARGUMENT"
        assert {request.path for request in fake.requests} == {"/v2/library/app/manifests/latest"}
        before = len(fake.requests)
        with pytest.raises(InvalidArgument):
            Reference.parse(f"docker.io/library/app@{digest}")
        assert len(fake.requests) == before


# --- C-R4 … C-R8: where credentials go


def test_c_r4_foreign_layer_urls_are_not_followed(tmp_path: Path) -> None:
    async def main() -> None:
        data = noise(1000)
        with FakeRegistry() as fake, FakeRegistry() as evil:
            evil.rule(lambda _: Reply(401, {"WWW-Authenticate": 'Basic realm="give"'}))
            fake.add_blob(data)
            hosts_d(tmp_path, only(fake))
            layer = Descriptor("application/vnd.oci.image.layer.v1.tar", Digest.of(data), len(data), urls=(f"{evil.url}/layer",))
            async with client_for(tmp_path) as client:
                await client.fetcher(APP, CALLER).download(layer, MemorySink(len(data)))
            assert not evil.requests

    run(main())


@pytest.mark.usefixtures("either_sender")
def test_c_r4_allowed_foreign_layers_are_fetched_without_a_credential(tmp_path: Path) -> None:
    async def main() -> None:
        data = noise(1000)
        with FakeRegistry() as fake, FakeRegistry() as cdn:
            cdn.rule(lambda r: None if r.path == "/v2/" else Reply(200, {}, data) if r.path == "/layer" else Reply(404))
            fake.add_blob(data)
            hosts_d(tmp_path, only(fake, 'credentials = "namespace"\n'))
            layer = Descriptor("application/x", Digest.of(data), len(data), urls=(f"{cdn.url}/layer",))
            async with client_for(tmp_path, foreign_layer_hosts=(cdn.address,)) as client:
                sink = MemorySink(len(data))
                source = await client.fetcher(APP, CALLER).download(layer, sink)
                assert source.by_endpoint == {cdn.url: len(data)}
                cdn.rule(lambda _: Reply(401, {"WWW-Authenticate": "Basic"}))
                source = await client.fetcher(APP, CALLER).download(layer, MemorySink(len(data)))
                assert source.by_endpoint == {f"{fake.url}/v2": len(data)}
            assert not has_secret(cdn)

    run(main())


def _bearer(fake: FakeRegistry, realm: str) -> None:
    """`fake` asks for a token of `realm` and takes TOKEN."""

    def rule(request: Request) -> Reply | None:
        if request.authorization == f"Bearer {TOKEN}" or not request.path.startswith("/v2/"):
            return None
        return Reply(401, {"WWW-Authenticate": f'Bearer realm="{realm}",service="test"'})

    fake.rule(rule)


def _issue(fake: FakeRegistry) -> None:
    fake.rule(fake.on("/token", Reply(200, {}, json.dumps({"token": TOKEN}).encode())))


def test_c_r5_a_realm_on_another_host_gets_no_credential(tmp_path: Path) -> None:
    with FakeRegistry() as fake, FakeRegistry() as evil:
        fake.add(image_of(), "library/app")
        _bearer(fake, f"http://localhost:{evil.port}/token")
        evil.rule(evil.on("/token", Reply(403)))
        hosts_d(tmp_path, only(fake, 'credentials = "namespace"\n'))
        error = fails(resolve(tmp_path, APP, CALLER))
    assert not has_secret(evil)
    assert evil.seen("/token"), "an anonymous token is still worth asking for"
    assert "token_hosts" in str(error) or error.code == "PERMISSION_DENIED"


def test_c_r5_a_listed_token_host_gets_it(tmp_path: Path) -> None:
    with FakeRegistry() as fake, FakeRegistry() as tokens:
        fake.add(image_of(), "library/app")
        _bearer(fake, f"http://localhost:{tokens.port}/token")
        _issue(tokens)
        hosts_d(tmp_path, only(fake, 'credentials = "namespace"\ntoken_hosts = ["localhost"]\n'))
        run(resolve(tmp_path, APP, CALLER))
    assert SECRET in tokens.everything_received()


@pytest.mark.parametrize(
    "realm",
    [
        "http://169.254.169.254/latest/token",
        "http://[fe80::1]/token",
        "http://0.0.0.0:{port}/token",
        "http://robot:{port}@127.0.0.1:{port}/token",
        "file:///etc/passwd",
        "http://",
        "gopher://127.0.0.1/",
    ],
)
def test_c_r5_realms_that_are_never_asked(tmp_path: Path, realm: str) -> None:
    with FakeRegistry() as fake:
        _bearer(fake, realm.format(port=fake.port))
        hosts_d(tmp_path, only(fake, 'credentials = "namespace"\n'))
        started = time.monotonic()
        error = fails(resolve(tmp_path, APP, CALLER))
        assert error.code in ("PERMISSION_DENIED", "UNAUTHENTICATED")
        assert not fake.seen("/token")
        assert not has_secret(fake)
        assert time.monotonic() - started < 2, "nothing was connected to"


def test_c_r5_an_https_registry_may_not_name_a_plain_realm(tmp_path: Path) -> None:
    with FakeRegistry(authority().server(tmp_path)) as fake, FakeRegistry() as plain:
        _bearer(fake, f"http://127.0.0.1:{plain.port}/token")
        (tmp_path / "ca.pem").write_bytes(authority().pem)
        hosts_d(tmp_path, only(fake, f'credentials = "namespace"\nca = "{tmp_path}/ca.pem"\n'))
        assert fails(resolve(tmp_path, APP, CALLER)).code == "PERMISSION_DENIED"
    assert not plain.requests


def test_c_r5_redirects_of_token_requests_are_not_followed(tmp_path: Path) -> None:
    with FakeRegistry() as fake, FakeRegistry() as evil:
        _bearer(fake, f"{fake.url}/token")
        fake.rule(fake.on("/token", Reply(307, {"Location": f"{evil.url}/token"})))
        hosts_d(tmp_path, only(fake, 'credentials = "namespace"\n'))
        assert "redirect" in str(fails(resolve(tmp_path, APP, CALLER)))
    assert not evil.requests


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1", "::ffff:127.0.0.1", "::1", "169.254.169.254", "0.0.0.0"])
def test_c_r5_addresses_are_checked_on_the_way_to_the_socket(name: str) -> None:
    """What a public registry may send us to: a name that resolves to loopback is refused by its address."""

    async def main() -> None:
        with FakeRegistry() as fake:
            with pytest.raises(AddressRefused):
                await Backend(frozenset({Reach.PUBLIC, Reach.PRIVATE})).connect_tcp(name, fake.port, timeout=2)
            assert not fake.connections

    run(main())


@pytest.mark.usefixtures("either_sender")
def test_c_r6_nothing_of_ours_reaches_a_foreign_hop_nor_the_origin_after_it(tmp_path: Path) -> None:
    async def main() -> None:
        data = noise(5000)
        with FakeRegistry() as fake, FakeRegistry() as foreign:
            fake.add_blob(data)
            path = f"/v2/library/app/blobs/{blob(data).digest}"
            fake.rule(lambda r: Reply(401, {"WWW-Authenticate": "Basic"}) if not r.authorization and "hop" not in r.query else None)
            fake.rule(lambda r: Reply(307, {"Location": f"{foreign.url}/x?sig=1"}) if r.authorization and r.path == path else None)
            foreign.rule(lambda _: Reply(302, {"Location": f"{fake.url}{path}?hop=2", "Set-Cookie": "a=b"}))
            header = '[header]\nX-Api-Key = "configured-secret"\nCookie = "c=configured-secret"\n'
            hosts_d(tmp_path, only(fake, f'credentials = "namespace"\n{header}'))
            async with client_for(tmp_path) as client:
                sink = MemorySink(len(data))
                await client.fetcher(APP, CALLER).download(blob(data), sink)
            assert bytes(sink.data) == data
            first, back = fake.seen(path)[1], fake.seen(path)[-1]
            assert first.authorization == f"Basic {BASIC}"
            assert first.headers["x-api-key"] == "configured-secret"
            for request in (foreign.requests[0], back):
                assert not {"authorization", "cookie", "x-api-key", "proxy-authorization"} & set(request.headers)

    run(main())


@pytest.mark.usefixtures("either_sender")
def test_c_r6_a_client_certificate_is_not_shown_to_a_foreign_host(tmp_path: Path) -> None:
    async def main() -> None:
        ca = authority()
        (tmp_path / "ca.pem").write_bytes(ca.pem)
        ca.issue("client").write(tmp_path, "client")
        data = noise(100)
        with (
            FakeRegistry(ca.server(tmp_path, wants_client=True)) as fake,
            FakeRegistry(ca.server(tmp_path, wants_client=True)) as foreign,
        ):
            foreign.add_blob(data)
            fake.rule(fake.on("/blobs/", lambda r: Reply(307, {"Location": f"{foreign.url}{r.path}"})))
            tls = f'ca = "{tmp_path}/ca.pem"\nclient = ["{tmp_path}/client.cert", "{tmp_path}/client.key"]\n'
            tls = f'ca = "{tmp_path}/ca.pem"\nclient = [["{tmp_path}/client.cert", "{tmp_path}/client.key"]]\n'
            hosts_d(tmp_path, only(fake, tls))
            async with client_for(tmp_path) as client:
                with pytest.raises(PullFailed):
                    await client.fetcher(APP).download(blob(data), MemorySink(len(data)))
            assert fake.requests
            assert not foreign.requests

    run(main())


@pytest.mark.usefixtures("either_sender")
def test_c_r6_https_to_http_is_refused(tmp_path: Path) -> None:
    with FakeRegistry(authority().server(tmp_path)) as fake, FakeRegistry() as plain:
        (tmp_path / "ca.pem").write_bytes(authority().pem)
        fake.rule(fake.on("/manifests/", Reply(307, {"Location": f"{plain.url}/x"})))
        hosts_d(tmp_path, only(fake, f'ca = "{tmp_path}/ca.pem"\n'))
        error = fails(resolve(tmp_path))
    assert "HTTPS to HTTP" in str(error)
    assert not plain.requests


@pytest.mark.usefixtures("either_sender")
def test_c_r6_hop_limit(tmp_path: Path) -> None:
    with FakeRegistry() as fake:
        fake.rule(lambda r: Reply(302, {"Location": f"{r.path}?n={len(fake.requests)}"}))
        hosts_d(tmp_path, only(fake))
        assert "more than 10 redirects" in str(fails(resolve(tmp_path)))
        assert len(fake.requests) == 11


def _wants_basic(fake: FakeRegistry) -> None:
    fake.rule(lambda r: Reply(401, {"WWW-Authenticate": 'Basic realm="x"'}) if not r.authorization else None)


def test_c_r7_the_callers_secret_stays_with_the_namespace(tmp_path: Path) -> None:
    """CRI auth with an empty server_address: containerd offers it to every mirror."""

    async def main() -> None:
        with FakeRegistry() as mirror, FakeRegistry() as own:
            _wants_basic(mirror)
            _wants_basic(own)
            own.add(image_of(), "app")
            hosts_d(tmp_path, {own.address: f'[host."{mirror.url}"]\n'})
            async with client_for(tmp_path) as client:
                resolved = await client.resolve(Reference.parse(f"{own.address}/app"), CALLER)
            assert SECRET not in mirror.everything_received()
            assert BASIC not in mirror.everything_received()
            assert BASIC in own.everything_received()
            assert str(resolved.attempts[0].credential).startswith("withheld: CRI request is bound to")
            assert str(resolved.attempts[-1].credential) == "CRI request"

    run(main())


def test_c_r7_a_credential_for_another_server_address_is_not_sent(tmp_path: Path) -> None:
    with FakeRegistry() as own:
        _wants_basic(own)
        bound = Credential("CRI request", "robot", SECRET, host="registry.other.test")
        error = fails(resolve(tmp_path, Reference.parse(f"{own.address}/app"), bound))
        assert error.code == "UNAUTHENTICATED"
        assert "registry.other.test" in str(error)
        assert not has_secret(own)


@pytest.mark.parametrize("attack", ["reset", "plain"])
def test_c_r8_no_credential_over_a_connection_that_fell_back_to_http(tmp_path: Path, attack: str) -> None:
    async def main() -> None:
        (tmp_path / "ca.pem").write_bytes(authority().pem)
        with FakeRegistry() as fake:
            _wants_basic(fake)
            reset = await asyncio.start_server(lambda _, writer: writer.transport.abort(), "127.0.0.1", 0)
            port = reset.sockets[0].getsockname()[1] if attack == "reset" else fake.port
            hosts_d(tmp_path, {"docker.io": f'server = "http://127.0.0.1:{port}"\nca = "{tmp_path}/ca.pem"\ncredentials = "namespace"\n'})
            with pytest.raises(PullFailed):
                await resolve(tmp_path, APP, CALLER)
            reset.close()
            assert not has_secret(fake)
            if attack == "plain":
                assert fake.requests, "http:// was configured, so plain HTTP is used, without the credential"

    run(main())


# --- C-R9 … C-R11: mirrors, configuration, rate limits


def test_c_r9_tags_are_resolved_only_where_that_is_trusted(tmp_path: Path) -> None:
    async def main() -> None:
        with FakeRegistry() as mirror, FakeRegistry() as own:
            true, false = image_of(b"true"), image_of(b"false")
            mirror.add(false, "library/app")
            own.add(true, "library/app")
            hosts_d(tmp_path, only(own, f'[host."{mirror.url}"]\ncapabilities = ["pull"]\n'))
            async with client_for(tmp_path) as client:
                assert (await client.resolve(APP)).descriptor.digest == true.digest
                await pull(client, str(APP))

    run(main())


@pytest.mark.usefixtures("either_sender")
def test_c_r9_wrong_bytes_are_refused_and_the_mirror_is_left_out(tmp_path: Path) -> None:
    async def main() -> None:
        with FakeRegistry() as mirror, FakeRegistry() as own:
            image, other = image_of(b"true"), image_of(b"false")
            own.add(image, "library/app")
            mirror.manifests[f"library/app/{image.digest}"] = (OCI_MANIFEST, other.data)
            hosts_d(tmp_path, only(own, f'[host."{mirror.url}"]\ncapabilities = ["pull"]\n'))
            async with client_for(tmp_path) as client:
                for _ in range(3):
                    await pull(client, str(APP))
            asked = [r for r in mirror.requests if "/manifests/" in r.path]
            assert len(asked) == 1

    run(main())


@pytest.mark.parametrize(
    "text, position, hint",
    [
        ("[host", "2:6", ""),
        ("capabilites = ['pull']", "2:1", 'did you mean "capabilities"?'),
        ("plain_http = true", "2:1", ""),
        ("ca = 'missing.pem'", "1:1", "relative paths"),
    ],
)
def test_c_r10_a_wrong_file_fails_the_pull_and_nobody_is_asked(tmp_path: Path, text: str, position: str, hint: str) -> None:
    with FakeRegistry() as fake:
        hosts_d(tmp_path, only(fake, text))
        error = fails(resolve(tmp_path))
        assert isinstance(error, InvalidArgument)
        assert error.where == f"{tmp_path}/docker.io/hosts.toml:{position}"
        assert hint in error.hint
        assert not fake.requests


def test_c_r10_several_roots(tmp_path: Path) -> None:
    async def main() -> None:
        from imgsvc.registry.client import RegistryClient, RegistrySettings
        from imgsvc.registry.hosts.hostdirs import split_config_path

        with FakeRegistry() as fake:
            fake.add(image_of(), "library/app")
            hosts_d(tmp_path / "second", only(fake))
            client = RegistryClient(RegistrySettings(roots=split_config_path(f"{tmp_path}/missing:{tmp_path}/second"), environ={}))
            assert (await client.resolve(APP)).endpoint == f"{fake.url}/v2"
            assert client.directories.missing_roots() == [f"{tmp_path}/missing"]
            await client.close()

    run(main())


def test_c_r11_retry_after_is_honoured_by_everybody(tmp_path: Path) -> None:
    """containerd asks again at once, five times per host and pull."""

    async def main() -> None:
        with FakeRegistry() as fake:
            for name in range(50):
                fake.add(image_of(str(name).encode()), f"library/app{name}")
            times: list[float] = []
            fake.rule(fake.times(1, lambda _: Reply(429, {"Retry-After": "2"})))
            fake.rule(lambda _: times.append(time.monotonic()))
            hosts_d(tmp_path, only(fake))
            # Fifty pulls at once take their time on a busy machine; that is not what is tested.
            async with client_for(tmp_path, timeouts=PATIENT) as client:
                with pytest.raises(asyncio.TimeoutError):
                    await asyncio.wait_for(client.resolve(Reference.parse("app0")), 0.5)
                await asyncio.gather(*(client.resolve(Reference.parse(f"app{name}")) for name in range(50)))
            assert not [at for at in times[1:] if at - times[0] < 1.9]
            assert len(times) == 51

    run(main())


@pytest.mark.parametrize("value", ["1000000000", "-5", "soon", ""])
def test_c_r11_absurd_values_end_in_an_error_or_a_bounded_wait(tmp_path: Path, value: str) -> None:
    async def main() -> None:
        with FakeRegistry() as fake, FakeRegistry() as other:
            other.add(image_of(), "library/app")
            fake.rule(lambda _: Reply(429, {"Retry-After": value}))
            hosts_d(tmp_path, only(other, f'[host."{fake.url}"]\n'))
            async with client_for(tmp_path) as client:
                started = time.monotonic()
                for _ in range(3):
                    assert (await client.resolve(APP)).endpoint == f"{other.url}/v2"
                assert time.monotonic() - started < 5, "another host was there: waiting would take 2 s each time"
                assert len(fake.requests) == 1
            hosts_d(tmp_path, only(fake))
            if value == "1000000000":
                async with client_for(tmp_path) as client:
                    with pytest.raises(PullFailed) as caught:
                        await client.resolve(APP)
                assert caught.value.code == "RESOURCE_EXHAUSTED"

    run(main())


def test_c_r11_a_date_is_understood(tmp_path: Path) -> None:
    with FakeRegistry() as fake:
        fake.add(image_of(), "library/app")
        at = format_datetime(datetime.now(UTC) + timedelta(seconds=2), usegmt=True)
        fake.rule(fake.times(1, lambda _: Reply(503, {"Retry-After": at})))
        hosts_d(tmp_path, only(fake))
        started = time.monotonic()
        run(resolve(tmp_path))
        assert 0.5 < time.monotonic() - started < 40


# --- C-R14 … C-R17


def test_c_r14_a_document_with_too_many_entries_is_refused(tmp_path: Path) -> None:
    entry = {"mediaType": OCI_MANIFEST, "digest": str(Digest.of(b"x")), "size": 1}
    body = json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [entry] * 20_000}).encode()
    with FakeRegistry() as fake:
        fake.rule(fake.on("/manifests/", _without_digest(OCI_INDEX, body)))
        hosts_d(tmp_path, only(fake))
        assert fails(resolve(tmp_path)).code == "RESOURCE_EXHAUSTED"


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.floats(allow_nan=False),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["config", "layers", "digest", "size", "x"]), inner, max_size=4)
    ),
    max_leaves=10,
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    document=st.dictionaries(st.sampled_from(["schemaVersion", "mediaType", "config", "layers", "manifests", "subject"]), _json, max_size=6)
)
def test_c_r15_malformed_manifests_are_errors_of_ours(tmp_path: Path, document: dict[str, object]) -> None:
    with FakeRegistry() as fake:
        fake.rule(fake.on("/manifests/", _without_digest(OCI_MANIFEST, json.dumps(document).encode())))
        hosts_d(tmp_path, only(fake))
        with contextlib.suppress(ImgsvcError):
            run(resolve(tmp_path))


@pytest.mark.parametrize("head", [b"\0\0\0", b"HTTP/1.1 abc\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n", b""])
def test_c_r15_answers_that_are_not_http(tmp_path: Path, head: bytes) -> None:
    async def main() -> None:
        def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(head)
            writer.close()

        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        hosts_d(tmp_path, {"docker.io": f'server = "http://127.0.0.1:{port}"\n'})
        with pytest.raises(PullFailed) as caught:
            await resolve(tmp_path)
        assert caught.value.code == "UNAVAILABLE"
        server.close()

    run(main())


def test_c_r16_no_secret_in_errors_logs_and_tracebacks(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with FakeRegistry() as fake:
        fake.add(image_of(), "library/app")
        _bearer(fake, f"{fake.url}/token")
        _issue(fake)
        words = f"\x1b[31m you sent {SECRET} as Basic {BASIC}\n\x07".encode().decode()
        body = json.dumps({"errors": [{"code": "DENIED", "message": words}]}).encode()
        fake.rule(lambda r: Reply(403, {}, body) if r.authorization and r.method == "GET" and "manifests" in r.path else None)
        fake.rule(lambda r: Reply(403) if r.authorization and r.method == "HEAD" else None)
        hosts_d(tmp_path, only(fake, 'credentials = "namespace"\n'))
        error = fails(resolve(tmp_path, APP, CALLER))
    seen = str(error) + repr(error) + "".join(traceback.format_exception(error)) + caplog.text + repr(CALLER)
    assert "DENIED" in seen
    for hidden in (SECRET, BASIC, TOKEN, "\x1b", "\x07"):
        assert hidden not in seen


@pytest.mark.usefixtures("either_sender")
def test_c_r16_signed_urls_are_redacted(tmp_path: Path) -> None:
    with FakeRegistry() as fake, FakeRegistry() as store:
        store.rule(lambda _: Reply(403, {}, b"expired"))
        fake.rule(fake.on("/manifests/", Reply(307, {"Location": f"{store.url}/bucket?X-Amz-Signature=deadbeefcafe&ns=kept"})))
        hosts_d(tmp_path, only(fake))
        text = str(fails(resolve(tmp_path)))
    assert "deadbeefcafe" not in text
    assert "X-Amz-Signature=REDACTED" in text
    assert "ns=kept" in text


def test_c_r17_every_resolve_really_asks_with_the_credential_given(tmp_path: Path) -> None:
    async def main() -> None:
        with FakeRegistry() as fake:
            image = image_of()
            fake.add(image, "library/app")
            fake.rule(lambda r: Reply(401, {"WWW-Authenticate": "Basic"}) if r.authorization != f"Basic {BASIC}" else None)
            hosts_d(tmp_path, only(fake, 'credentials = "namespace"\n'))
            async with client_for(tmp_path) as client:
                first = await client.resolve(APP, CALLER)
                with pytest.raises(PullFailed) as caught:
                    await client.resolve(APP, Credential("CRI request", "robot", "wrong-password"))
                assert caught.value.code == "UNAUTHENTICATED"
                with pytest.raises(PullFailed):
                    await client.resolve(APP)
                count = len(fake.requests)
                again = await client.resolve(APP, CALLER)
                assert len(fake.requests) > count
                assert again.descriptor == first.descriptor
            assert MAX_DOCUMENT == 4 * MIB

    run(main())
