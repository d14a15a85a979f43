"""The client against Debian's docker-registry: anonymous, htpasswd, Bearer tokens, nginx with client certificates.

Each set-up runs the same full round: push by both ways and by mount, pull, tags, referrers, delete.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from imgsvc.base.errors import InvalidArgument
from imgsvc.base.oci import MIB, OCI_EMPTY, OCI_INDEX, OCI_MANIFEST, Descriptor, Digest
from imgsvc.base.reference import Reference
from imgsvc.registry.check import check, render
from imgsvc.registry.client import RegistryClient
from imgsvc.registry.http.exchange import Timeouts
from imgsvc.registry.interfaces import Credential, CredentialUse, PullFailed, Repository
from tests.registry.certs import authority
from tests.registry.real import (
    PASSWORD,
    PATIENT,
    USER,
    TokenServer,
    docker_registry,
    htpasswd_registry,
    nginx_registry,
    running,
    token_registry,
)
from tests.registry.support import Bytes, MemorySink, blob, client_for, fails, hosts_d, image_of, noise, pull, run
from tests.support.images import BuiltDocument, descriptor
from tests.support.registries import free_port

pytestmark = pytest.mark.compat
ROBOT = Credential("CRI request", USER, PASSWORD)


async def push(repository: Repository, image: BuiltDocument, tag: str = "latest", chunk_size: int = 0) -> Descriptor:
    for digest, data in image.blobs.items():
        await repository.push_blob(Descriptor("application/octet-stream", digest, len(data)), Bytes(data), chunk_size=chunk_size)
    return await repository.push_manifest(image.data, image.media_type, tag)


async def full_round(client: RegistryClient, host: str, credential: Credential | None) -> None:
    image, second = image_of(noise(3 * MIB), noise(100, seed=1)), image_of(noise(5 * MIB, seed=2))
    name = Reference.parse(f"{host}/team/app")
    repository = client.repository(name, credential)
    pushed = await push(repository, image)
    assert pushed.digest == image.digest
    await push(repository, second, "chunked", chunk_size=2 * MIB)
    for tag, document in (("latest", image), ("chunked", second)):
        manifest, _ = await pull(client, f"{name.name}:{tag}", credential)
        assert len(manifest.layers) == len(document.blobs) - 1
    layer = next(iter(image.blobs))
    assert await repository.has_blob(layer)
    assert not await repository.push_blob(Descriptor("x", layer, len(image.blobs[layer])), Bytes(b"never read"))
    other = client.repository(Reference.parse(f"{host}/team/other"), credential)
    for digest, data in image.blobs.items():
        assert not await other.push_blob(Descriptor("x", digest, len(data)), Bytes(b"never read"), mount_from="team/app")
    await other.push_manifest(image.data, image.media_type, "mounted")
    await pull(client, f"{host}/team/other:mounted", credential)
    assert sorted(await repository.tags()) == ["chunked", "latest"]
    assert await referrers_round(repository, pushed) == 1
    await repository.delete(pushed.digest)
    with pytest.raises(PullFailed) as caught:
        await client.resolve(name, credential)
    assert caught.value.code == "NOT_FOUND"
    await repository.delete_blob(layer)
    with pytest.raises(PullFailed) as caught:
        await client.fetcher(name, credential).document(Descriptor("x", layer, len(image.blobs[layer])), limit=10 * MIB)
    assert caught.value.code == "NOT_FOUND"


async def referrers_round(repository: Repository, subject: Descriptor) -> int:
    """docker-registry 2.8 has no referrers API, so the tag schema answers."""
    empty = b"{}"
    await repository.push_blob(Descriptor(OCI_EMPTY, Digest.of(empty), 2), Bytes(empty))
    document = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": descriptor(OCI_EMPTY, empty),
        "layers": [descriptor(OCI_EMPTY, empty)],
    }
    document["subject"] = subject.to_json()
    raw = json.dumps(document).encode()
    await repository.push_manifest(raw, OCI_MANIFEST, "signature")
    entries = [{**descriptor(OCI_MANIFEST, raw), "artifactType": kind} for kind in ("application/x", "application/y")]
    index = json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries}).encode()
    await repository.push_manifest(index, OCI_INDEX, subject.digest.replace(":", "-"))
    assert len(await repository.referrers(subject.digest)) == 2
    assert await repository.referrers(Digest.of(b"unknown")) == []
    return len(await repository.referrers(subject.digest, "application/y"))


@pytest.fixture(scope="module")
def anonymous(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with docker_registry(tmp_path_factory.mktemp("anonymous")) as address:
        yield address


def test_anonymous(tmp_path: Path, anonymous: str) -> None:
    async def main() -> None:
        async with client_for(tmp_path, timeouts=PATIENT) as client:
            await full_round(client, anonymous, None)

    run(main())


def test_through_a_mirror_named_in_hosts_toml(tmp_path: Path, anonymous: str) -> None:
    async def main() -> None:
        image = image_of(b"busybox")
        hosts_d(tmp_path, {"docker.io": f'fallback = false\n[host."http://{anonymous}"]\n'})
        async with client_for(tmp_path, timeouts=PATIENT) as client:
            await push(client.repository(Reference.parse("busybox")), image)
            manifest, _ = await pull(client, "busybox")
            assert manifest.config.digest == image.config_digest

    run(main())


def test_htpasswd(tmp_path: Path) -> None:
    async def main() -> None:
        with htpasswd_registry(tmp_path) as address:
            async with client_for(tmp_path, timeouts=PATIENT) as client:
                await full_round(client, address, ROBOT)
                for wrong in (None, Credential("CRI request", USER, "wrong-password")):
                    with pytest.raises(PullFailed) as caught:
                        await client.resolve(Reference.parse(f"{address}/team/app:chunked"), wrong)
                    assert caught.value.code == "UNAUTHENTICATED"

    run(main())


@pytest.fixture
def bearer(tmp_path: Path) -> Iterator[tuple[str, TokenServer]]:
    with token_registry(tmp_path) as (address, tokens):
        yield address, tokens


def with_tokens(tmp_path: Path, address: str) -> Path:
    """The token service has another port, hence the same host name: nothing to configure."""
    assert address.startswith("127.0.0.1:")
    return tmp_path / "no-hosts-d"


@pytest.mark.parametrize("post", [True, False])
def test_bearer_tokens(tmp_path: Path, bearer: tuple[str, TokenServer], post: bool) -> None:
    address, tokens = bearer
    tokens.post = post

    async def main() -> None:
        async with client_for(with_tokens(tmp_path, address), timeouts=PATIENT) as client:
            await full_round(client, address, ROBOT)
            methods = [request.method for request in tokens.fake.requests]
            assert methods.count("POST") == (len(methods) if post else 1), "a service without POST is asked by GET from then on"
            assert "repository:team/app:pull repository:team/other:pull,push" in tokens.issued, "a mount needs both"
            assert len(tokens.issued) == len(set(tokens.issued)), "tokens are kept"

    run(main())


def test_bearer_identity_token(tmp_path: Path, bearer: tuple[str, TokenServer]) -> None:
    address, tokens = bearer

    async def main() -> None:
        async with client_for(with_tokens(tmp_path, address), timeouts=PATIENT) as client:
            await push(client.repository(Reference.parse(f"{address}/a"), ROBOT), image_of())
            await pull(client, f"{address}/a", Credential("CRI request", identity_token=tokens.refresh_token))
            wrong = Credential("CRI request", identity_token="something-else")
            with pytest.raises(PullFailed) as caught:
                await client.resolve(Reference.parse(f"{address}/a"), wrong)
            assert caught.value.code == "UNAUTHENTICATED"
            assert "wrong password" in str(caught.value)
            assert "something-else" not in str(caught.value)

    run(main())


def test_a4_6_bearer_registry_token(tmp_path: Path, bearer: tuple[str, TokenServer]) -> None:
    """CRI's registry_token, which containerd leaves unused."""
    address, tokens = bearer

    async def main() -> None:
        async with client_for(with_tokens(tmp_path, address), timeouts=PATIENT) as client:
            await push(client.repository(Reference.parse(f"{address}/a"), ROBOT), image_of())
            ready = tokens._sign(USER, "test-service", ["repository:a:pull"])
            count = len(tokens.fake.requests)
            await pull(client, f"{address}/a", Credential("CRI request", registry_token=ready))
            assert len(tokens.fake.requests) == count
            with pytest.raises(PullFailed) as caught:
                await client.resolve(Reference.parse(f"{address}/a"), Credential("CRI request", registry_token=ready[:-8] + "AAAAAAAA"))
            assert caught.value.code == "UNAUTHENTICATED"

    run(main())


def test_bearer_anonymous_and_private(tmp_path: Path, bearer: tuple[str, TokenServer]) -> None:
    address, _ = bearer

    async def main() -> None:
        async with client_for(with_tokens(tmp_path, address), timeouts=PATIENT) as client:
            await push(client.repository(Reference.parse(f"{address}/public/a"), ROBOT), image_of())
            await push(client.repository(Reference.parse(f"{address}/private/a"), ROBOT), image_of())
            await pull(client, f"{address}/public/a")
            await pull(client, f"{address}/private/a", ROBOT)
            with pytest.raises(PullFailed) as caught:
                await pull(client, f"{address}/private/a")
            assert caught.value.code == "UNAUTHENTICATED"
            assert caught.value.attempts[-1].credential == CredentialUse()

    run(main())


def test_check_and_the_log_tell_whom_a_token_is_for_and_not_the_token(
    tmp_path: Path, bearer: tuple[str, TokenServer], caplog: pytest.LogCaptureFixture
) -> None:
    address, _ = bearer

    async def main() -> None:
        caplog.set_level(logging.DEBUG, "imgsvc")
        async with client_for(with_tokens(tmp_path, address), timeouts=PATIENT) as client:
            reference = Reference.parse(f"{address}/a")
            await push(client.repository(reference, ROBOT), image_of())
            (result,) = await check(client, reference, ROBOT)
            assert re.fullmatch(rf'for "{USER}", until 2\d\d\d-.*Z', result.token)
            assert f"  token {result.token}" in list(render([result]))
            assert f'gave a token for "{USER}", until ' in caplog.text
            assert "eyJ" not in caplog.text + str(result)

    run(main())


def test_a4_5_expired_tokens_are_replaced_early_and_when_refused(tmp_path: Path, bearer: tuple[str, TokenServer]) -> None:
    address, tokens = bearer
    tokens.lifetime = 2

    async def main() -> None:
        async with client_for(with_tokens(tmp_path, address), timeouts=PATIENT) as client:
            reference = Reference.parse(f"{address}/a")
            await push(client.repository(reference, ROBOT), image_of())
            await client.resolve(reference, ROBOT)
            count = len(tokens.issued)
            await client.resolve(reference, ROBOT)
            assert len(tokens.issued) == count
            await asyncio.sleep(1.8)
            await client.resolve(reference, ROBOT)
            assert len(tokens.issued) == count + 1

    run(main())


def test_a1_4_one_token_request_for_many_blobs_at_once(tmp_path: Path, bearer: tuple[str, TokenServer]) -> None:
    address, tokens = bearer

    async def main() -> None:
        image = image_of(*(noise(1000, seed=n) for n in range(8)))
        reference = Reference.parse(f"{address}/a")
        async with client_for(with_tokens(tmp_path, address), timeouts=PATIENT) as client:
            await push(client.repository(reference, ROBOT), image)
        async with client_for(with_tokens(tmp_path, address), timeouts=PATIENT, max_downloads=8, max_downloads_per_image=8) as client:
            tokens.issued.clear()
            fetcher = client.fetcher(reference, ROBOT)
            blobs = [blob(data) for data in image.blobs.values()]
            await asyncio.gather(*(fetcher.download(entry, MemorySink(entry.size)) for entry in blobs))
            assert len(tokens.issued) == 1

    run(main())


@pytest.fixture
def nginx(tmp_path: Path) -> Iterator[str]:
    with nginx_registry(tmp_path) as address:
        yield address


def client_files(tmp_path: Path, address: str, tls: str) -> Path:
    directory = tmp_path / "hosts"
    name = f"127.0.0.1_{address.rpartition(':')[2]}_"
    hosts_d(directory, {name: f'server = "https://{address}"\n{tls}\n'})
    (directory / name / "ca.crt").write_bytes(authority().pem)
    pair = authority().issue("node")
    pair.write(directory / name, "node")
    (directory / name / "both.pem").write_bytes(pair.certificate + pair.key)
    return directory


def test_nginx_with_client_certificates(tmp_path: Path, nginx: str) -> None:
    async def main() -> None:
        root = client_files(tmp_path, nginx, 'ca = "ca.crt"\nclient = [["node.cert", "node.key"]]')
        async with client_for(root, timeouts=PATIENT) as client:
            await full_round(client, nginx, None)
            (result,) = await check(client, Reference.parse(f"{nginx}/team/app:chunked"))
            assert result.ok
            assert result.tls.startswith("TLSv1.")
            assert "verified" in result.tls
            assert result.speed > 0
            assert result.clock_skew is not None
            assert abs(result.clock_skew) < 5
            assert "ok (status 200" in "\n".join(render([result]))

    run(main())


@pytest.mark.parametrize("form", ['"both.pem"', '["both.pem"]', '[["both.pem", ""]]'])
def test_nginx_with_the_other_forms_of_client(tmp_path: Path, nginx: str, form: str) -> None:
    root = client_files(tmp_path, nginx, f'ca = "ca.crt"\nclient = {form}')

    async def main() -> None:
        async with client_for(root, timeouts=PATIENT) as client:
            await client.repository(Reference.parse(f"{nginx}/a")).has_blob(Digest.of(b""))

    run(main())


def test_a_registry_that_has_only_http2(tmp_path: Path) -> None:
    async def main() -> None:
        with nginx_registry(tmp_path, only_h2=True) as address:
            hosts_d(tmp_path / "hosts", {address: f'server = "http://{address}"\n'})
            async with client_for(tmp_path / "hosts", timeouts=PATIENT) as client:
                await full_round(client, address, None)

    run(main())


def test_a_server_that_refuses_http1_in_the_tls_handshake_is_offered_http2(tmp_path: Path) -> None:
    certificate, key = authority().issue().write(tmp_path, "server")
    (tmp_path / "ca.pem").write_bytes(authority().pem)
    address, log = f"127.0.0.1:{free_port()}", tmp_path / "log"
    server = ["openssl", "s_server", "-accept", address, "-cert", str(certificate), "-key", str(key), "-alpn", "h2"]

    async def main() -> None:
        hosts_d(tmp_path / "hosts", {address: f'server = "https://{address}"\nca = "{tmp_path}/ca.pem"\n'})
        async with client_for(tmp_path / "hosts", timeouts=Timeouts(connect=5, headers=1, stall=1)) as client:
            with pytest.raises(PullFailed):
                await client.resolve(Reference.parse(f"{address}/app"))  # openssl takes the request, and answers nothing

    with running(server, log, address):
        run(main())
    assert b"ALPN protocols selected: h2" in log.read_bytes()


def test_nginx_by_dockers_certificate_directory(tmp_path: Path, nginx: str) -> None:
    root = client_files(tmp_path, nginx, "")
    next(root.glob("*/hosts.toml")).unlink()

    async def main() -> None:
        async with client_for(root, timeouts=PATIENT) as client:
            await client.repository(Reference.parse(f"{nginx}/a")).has_blob(Digest.of(b""))

    run(main())


@pytest.mark.parametrize(
    "tls, words",
    [
        ('client = "both.pem"', "certificate not trusted"),
        ('ca = "ca.crt"', "400"),
        ('skip_verify = true\nclient = "both.pem"', ""),
        ('ca = "node.key"', "certificate cannot be used"),
    ],
)
def test_what_is_said_when_tls_is_configured_wrong(tmp_path: Path, nginx: str, tls: str, words: str) -> None:
    root = client_files(tmp_path, nginx, tls)

    async def main() -> None:
        async with client_for(root, timeouts=PATIENT) as client:
            await client.repository(Reference.parse(f"{nginx}/a")).has_blob(Digest.of(b""))

    if not words:
        run(main())
        return
    error = fails(main())
    assert words in str(error)
    if "cannot be used" in words:
        assert isinstance(error, InvalidArgument)


def test_check_reports_what_is_wrong_at_each_endpoint(tmp_path: Path, anonymous: str) -> None:
    async def main() -> None:
        hosts_d(tmp_path, {"docker.io": f'server = "http://{anonymous}"\n[host."http://127.0.0.1:1"]\n'})
        async with client_for(tmp_path) as client:
            image = image_of(noise(2 * MIB))
            first, second = await check(client, Reference.parse("checked"))
            assert (first.ok, second.ok, second.status) == (False, False, 404)
            hosts_d(tmp_path, {"docker.io": f'server = "http://{anonymous}"\n'})
            await push(client.repository(Reference.parse("checked")), image)
            (found,) = await check(client, Reference.parse("checked"))
            assert found.ok
            assert json.loads(json.dumps(found.to_json()))["tls"] == "off"

    run(main())
