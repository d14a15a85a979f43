"""Registries, token services and credential files as they are met, and what the kubelet is told of them."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from imgsvc.base.errors import InvalidArgument
from imgsvc.base.oci import Digest
from imgsvc.base.reference import Reference
from imgsvc.registry.auth.challenge import check_realm, parse_token
from imgsvc.registry.auth.credentials import CredentialSettings, NodeCredentials
from imgsvc.registry.auth.dockerconfig import credential_from_cri, entry_for, helper_for, parse_docker_config
from imgsvc.registry.check import check
from imgsvc.registry.hosts.explain import explain
from imgsvc.registry.hosts.hostdirs import HostDirectories
from imgsvc.registry.hosts.hosts import parse_url
from imgsvc.registry.interfaces import Attempt, Credential, CredentialUse, PullFailed
from tests.fakes.registry import FakeRegistry, Reply, Request
from tests.registry.support import MemorySink, blob, client_for, fails, hosts_d, image_of, pull, run
from tests.support import cri
from tests.support.daemon import Daemon
from tests.support.registries import free_port

APP = Reference.parse("docker.io/library/app")
ALICE = Credential("CRI request", "alice", "secret-of-alice")
BAD_NAMES = ["a..b", "a" * 64 + ".example", "[::1", "a.b:99999", "x y", "ü..ä", ".example"]


def basic(user: str, password: str) -> str:
    return base64.b64encode(f"{user}:{password}".encode()).decode()


def latin(text: str) -> str:
    """As it arrives when a server sends UTF-8 in a header."""
    return text.encode().decode("latin-1")


def mirrors(tmp_path: Path, *fakes: FakeRegistry, options: str = "") -> Path:
    return hosts_d(tmp_path, {"docker.io": "fallback = false\n" + "".join(f'[host."{fake.url}"]\n{options}\n' for fake in fakes)})


# --- S11


@pytest.mark.parametrize("name", BAD_NAMES)
@pytest.mark.parametrize("proxied", [False, True], ids=["direct", "proxied"])
def test_S11_a_redirect_to_a_bad_name_is_a_failed_attempt(tmp_path: Path, name: str, proxied: bool) -> None:
    async def main() -> None:
        async with client_for(tmp_path, environ={"HTTPS_PROXY": "http://127.0.0.1:9"} if proxied else {}) as client:
            assert (await client.resolve(APP)).endpoint == f"{good.url}/v2"

    with FakeRegistry() as bad, FakeRegistry() as good:
        good.add(image_of(), "library/app")
        bad.rule(lambda _: Reply(307, {"Location": latin(f"https://{name}/x")}))
        mirrors(tmp_path, bad, good)
        run(main())


@pytest.mark.parametrize("name", BAD_NAMES)
def test_S11_a_token_service_with_a_bad_name_is_a_failed_attempt(tmp_path: Path, name: str) -> None:
    async def main() -> None:
        async with client_for(tmp_path) as client:
            assert (await client.resolve(APP)).endpoint == f"{good.url}/v2"

    with FakeRegistry() as bad, FakeRegistry() as good:
        good.add(image_of(), "library/app")
        bad.rule(lambda _: Reply(401, {"WWW-Authenticate": latin(f'Bearer realm="http://{name}/token"')}))
        mirrors(tmp_path, bad, good)
        run(main())


@pytest.mark.parametrize("token", ["tök€n", "a\r\nb: c"])
def test_S11_a_secret_that_no_header_can_hold_is_a_failed_attempt(tmp_path: Path, token: str) -> None:
    async def main() -> None:
        async with client_for(tmp_path) as client:
            await client.resolve(APP, Credential("CRI request", registry_token=token))

    with FakeRegistry() as fake:
        mirrors(tmp_path, fake, options='credentials = "namespace"')
        error = fails(main())
    assert isinstance(error, PullFailed)
    assert token not in str(error)


@pytest.mark.parametrize("url", ["http://[", "http://[::1", "https://a..b/x", "http://\u2100/x"])
def test_S11_urls_of_a_layer_that_are_none_are_passed_over(tmp_path: Path, url: str) -> None:
    async def main() -> None:
        async with client_for(tmp_path, foreign_layer_hosts=("a..b",)) as client:
            sink = MemorySink(5)
            await client.fetcher(APP).download(replace(blob(b"bytes"), urls=(url,)), sink)
            assert sink.digest == Digest.of(b"bytes")

    with FakeRegistry() as fake:
        fake.add_blob(b"bytes")
        mirrors(tmp_path, fake)
        run(main())


@pytest.mark.parametrize("host", ["a.example:99999", "[::::]", "a" * 64 + ".example", "[1:2]:5"])
def test_S11_a_registry_that_cannot_be_is_a_clear_error(tmp_path: Path, host: str) -> None:
    async def main() -> None:
        async with client_for(tmp_path) as client:
            await client.resolve(Reference.parse(f"{host}/app"))

    assert fails(main()).code in ("INVALID_ARGUMENT", "UNAVAILABLE")


def test_S11_text_of_others_is_refused_by_its_parser() -> None:
    with pytest.raises(InvalidArgument):
        check_realm("https://a..b/token", "https://r.example/v2", frozenset())
    with pytest.raises(InvalidArgument):
        parse_url("https://[::", override_path=False)
    assert parse_token(b'{"token":"t","expires_in":' + b"9" * 400 + b"}", "token service").lifetime == 24 * 3600


@pytest.mark.parametrize("date", ["Mon, 01 Jan 0001 00:00:00 +2359", "Mon, 99 Foo", "1" * 4000, "Fri, 31 Dec 9999 23:59:59 -2359"])
def test_S11_dates_of_others_end_nothing(tmp_path: Path, date: str) -> None:
    async def main() -> None:
        async with client_for(tmp_path) as client:
            (told,) = await check(client, APP)
            assert told.status == 429

    with FakeRegistry() as fake:
        fake.rule(lambda _: Reply(429, {"Retry-After": date, "Date": date}))
        mirrors(tmp_path, fake)
        run(main())


# --- P8, P9


def wants_token(fake: FakeRegistry, *, where: str = "/token/") -> None:
    """`fake` wants a token, and its token service redirects, to a trailing slash as a rule."""
    challenge = {"WWW-Authenticate": f'Bearer realm="{fake.url}/token"'}
    fake.rule(fake.on("/v2/", lambda r: None if r.authorization == "Bearer good" else Reply(401, challenge)))
    fake.rule(lambda r: Reply(301, {"Location": where}) if r.path == "/token" else None)
    fake.rule(lambda r: Reply(200, {}, b'{"token":"good"}') if r.path == "/token/" else None)


@pytest.mark.parametrize("credential", [None, ALICE], ids=["anonymous", "authenticated"])
def test_P8_a_token_service_may_redirect_on_its_own_host(tmp_path: Path, credential: Credential | None) -> None:
    async def main() -> None:
        async with client_for(tmp_path) as client:
            await pull(client, "app", credential)

    with FakeRegistry() as fake:
        fake.add(image_of(), "library/app")
        wants_token(fake)
        mirrors(tmp_path, fake, options='credentials = "namespace"')
        run(main())
        asked = fake.seen("/token/")[0]
    assert asked.authorization == (f"Basic {basic('alice', ALICE.password)}" if credential else "")


def test_P8_a_token_service_does_not_redirect_credentials_to_another_host(tmp_path: Path) -> None:
    async def main() -> None:
        async with client_for(tmp_path) as client:
            await client.resolve(APP, ALICE)

    with FakeRegistry() as fake, FakeRegistry() as other:
        wants_token(fake, where=f"{other.url}/token/")
        mirrors(tmp_path, fake, options='credentials = "namespace"')
        error = fails(main())
        assert other.requests == []
    assert "a redirect to another host" in str(error)


def test_P8_a_token_service_that_redirects_in_a_circle_is_given_up(tmp_path: Path) -> None:
    async def main() -> None:
        async with client_for(tmp_path) as client:
            await client.resolve(APP)

    with FakeRegistry() as fake:
        wants_token(fake, where="/token")
        mirrors(tmp_path, fake)
        assert "redirects" in str(fails(main()))
        assert len(fake.seen("/token")) < 15


def test_P9_a_registry_that_has_moved_gives_an_anonymous_token(tmp_path: Path) -> None:
    async def main() -> None:
        async with client_for(tmp_path) as client:
            await pull(client, "app", ALICE)

    with FakeRegistry() as old, FakeRegistry() as new:
        new.add(image_of(), "library/app")
        wants_token(new)
        old.rule(lambda r: Reply(308, {"Location": f"{new.url}{r.path}"}))
        mirrors(tmp_path, old, options='credentials = "namespace"')
        run(main())
        assert ALICE.password not in new.everything_received()
        assert basic("alice", ALICE.password) not in new.everything_received()
        assert len(new.seen("/token")) == 2, "one token, and its redirect, for all requests"


def test_P9_a_host_we_were_sent_to_gets_no_credential_for_its_challenge(tmp_path: Path) -> None:
    """Nor does the first host: what another host asks for is not answered with what was meant for this one."""

    async def main() -> None:
        async with client_for(tmp_path) as client:
            await client.resolve(APP, ALICE)

    with FakeRegistry() as old, FakeRegistry() as new:
        new.rule(lambda _: Reply(401, {"WWW-Authenticate": 'Basic realm="all of them"'}))
        old.rule(lambda r: Reply(308, {"Location": f"{new.url}{r.path}"}))
        mirrors(tmp_path, old, options='credentials = "namespace"')
        assert fails(main()).code == "UNAUTHENTICATED"
        assert "authorization" not in new.everything_received() + old.everything_received()


# --- P11, P12


def docker_config(tmp_path: Path, auths: Mapping[str, Mapping[str, Any]]) -> NodeCredentials:
    (tmp_path / "config.json").write_text(json.dumps({"auths": auths}))
    return NodeCredentials(CredentialSettings(files=(str(tmp_path / "config.json"),), environ={}))


FULL = {"auth": basic("right", "pw")}
STALE = {"auth": basic("stale", "pw")}


@pytest.mark.parametrize(
    "registry, auths",
    [
        ("r.example", {"r.example": FULL, "https://r.example": {}}),
        ("r.example", {"https://r.example": {}, "r.example": FULL}),
        ("r.example", {"r.example": {}, "https://r.example/v1/": FULL}),
        ("r.example", {"r.example": FULL, "https://r.example/v1/": STALE}),
        ("r.example", {"https://r.example/v1/": STALE, "r.example": FULL}),
        ("docker.io", {"https://index.docker.io/v1/": FULL, "docker.io": {}}),
        ("docker.io", {"registry-1.docker.io": STALE, "https://index.docker.io/v1/": FULL}),
    ],
)
def test_P11_the_exact_spelling_counts_and_an_empty_one_hides_none(tmp_path: Path, registry: str, auths: Mapping[str, Any]) -> None:
    node = docker_config(tmp_path, auths)
    found = run(node.find(registry, "app", directories=()))
    assert found is not None
    assert found.username == "right"
    told = explain(HostDirectories(()), node, Reference(registry, "app", "1"), {}).endpoints[0].credential
    assert found.source in told, "what is told is what is done"


def test_P11_helpers_are_found_by_every_spelling() -> None:
    config = parse_docker_config(b'{"credHelpers": {"https://r.example/v1/": "old", "r.example": "new", "https://s.example": "s"}}', "f")
    assert (helper_for(config, "r.example"), helper_for(config, "s.example")) == ("new", "s")


@pytest.mark.parametrize("ends", ["\n", "\r\n"])
def test_P12_line_ends_in_auth_mean_nothing(ends: str) -> None:
    text = basic("user", "a long password " * 8)
    wrapped = ends.join(text[at : at + 76] for at in range(0, len(text), 76)) + ends
    entry = entry_for(parse_docker_config(json.dumps({"auths": {"r.example": {"auth": wrapped}}}).encode(), "f"), "r.example", "")
    given = credential_from_cri(auth=wrapped)
    assert entry is not None
    assert given is not None
    assert entry.password == given.password == "a long password " * 8


def test_P12_a_latin_1_password_arrives_as_it_is(tmp_path: Path) -> None:
    auth = base64.b64encode("user:größe".encode("latin-1")).decode()

    async def main() -> None:
        async with client_for(tmp_path, credentials=docker_config(tmp_path, {fake.address: {"auth": auth}})) as client:
            await client.resolve(APP)

    def answer(request: Request) -> Reply | None:
        if request.path == "/token":
            return Reply(200, {}, b'{"token":"good"}') if request.authorization == f"Basic {auth}" else Reply(405)
        return None if request.authorization == "Bearer good" else Reply(401, {"WWW-Authenticate": f'Bearer realm="{fake.url}/token"'})

    with FakeRegistry() as fake:
        fake.add(image_of(), "library/app")
        fake.rule(answer)
        mirrors(tmp_path, fake, options="insecure_credentials = true")
        run(main())
        (posted,) = fake.seen("/token", "POST")
    assert b"gr%F6%DFe" in posted.body


# --- P13


@pytest.mark.parametrize("name", ["REGISTRY.CORP:5000", "Registry.Corp_5000_"])
def test_P13_a_directory_with_capitals_is_found(tmp_path: Path, name: str) -> None:
    hosts_d(tmp_path, {name: 'fallback = false\n[host."https://mirror.corp"]\n'})
    directories = HostDirectories((str(tmp_path),))
    reference = Reference.parse("registry.corp:5000/app")
    assert [host.url for host in directories.lookup(reference.host, reference.repository).hosts] == ["https://mirror.corp/v2"]
    assert directories.namespaces() == [("registry.corp:5000", "")]
    told = explain(directories, NodeCredentials(CredentialSettings(environ={})), reference, {})
    assert told.origin == f"{tmp_path}/{name}/hosts.toml"


def test_P13_the_exact_name_counts_first(tmp_path: Path) -> None:
    hosts_d(tmp_path, {"R.CORP": '[host."https://wrong.corp"]\n', "r.corp": '[host."https://right.corp"]\n'})
    assert HostDirectories((str(tmp_path),)).lookup("r.corp").hosts[0].url == "https://right.corp/v2"


def test_P13_a_directory_for_a_repository_that_cannot_be_is_told(tmp_path: Path) -> None:
    hosts_d(tmp_path, {"r.corp": "", "r.corp/Library": "blocked = true\n"})
    directories = HostDirectories((str(tmp_path),))
    _, (namespace, prefix) = directories.namespaces()
    with pytest.raises(InvalidArgument, match='"Library"'):
        directories.search(namespace, prefix)


# --- K3, K6


def test_K3_K6_the_kubelet_finds_the_reason_and_always_the_same_text(make_daemon: Callable[..., Daemon]) -> None:
    daemon = make_daemon()
    hosts_d(daemon.directory / "hosts.d", {"docker.io": f'fallback = false\n[host."http://127.0.0.1:{free_port()}"]\n'})
    daemon.start()
    (code, first), second = (cri.refusal(lambda: cri.pull(daemon.images(), "field/app:1")) for _ in range(2))
    assert code is grpc.StatusCode.UNKNOWN
    assert first.startswith("RegistryUnavailable: ")
    assert second == (code, first)
    assert first.count("Connection refused") == 1


def test_K6_attempts_are_told_where_they_say_more_than_the_cause() -> None:
    refused = [Attempt("http://m/v2", "connect", 0, seconds, CredentialUse(), "refused") for seconds in (0.1, 0.2)]
    denied = Attempt("http://r/v2", "resolve", 403, 0.5, CredentialUse(), "DENIED")
    assert PullFailed("app: refused", refused, "UNAVAILABLE", retryable=True, where="http://m/v2/app").what == "app: refused"
    assert "http://m/v2 [connect]" in PullFailed("app: refused", refused, "UNAVAILABLE", retryable=True, where="http://cdn/x").what
    assert (
        "http://r/v2 [resolve]" in PullFailed("app: refused", [*refused, denied], "UNAVAILABLE", retryable=True, where="http://m/v2").what
    )
