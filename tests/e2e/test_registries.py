"""The daemon and its registries: every set-up, every credential, every attempt told, no secret shown (needs.md A2 to A4, C-R7 to C-R17)."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import re
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from imgsvc.api import cri_pb2
from imgsvc.base.oci import Descriptor
from imgsvc.base.reference import Reference
from imgsvc.registry.interfaces import Credential
from tests.fakes.registry import FakeRegistry, Reply
from tests.registry.certs import authority
from tests.registry.real import PASSWORD, PATIENT, USER, TokenServer, docker_registry, htpasswd_registry, nginx_registry, token_registry
from tests.registry.support import client_for, hosts_d, noise
from tests.support import cri, images
from tests.support.daemon import RPC_TIMEOUT, Daemon, below
from tests.support.images import BuiltDocument, Entry

WRONG = "not-the-battery-staple"
DEAD = "127.0.0.1:1"


class Bytes:
    """A BlobReader."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    async def read_at(self, offset: int, count: int) -> bytes:
        return self._data[offset : offset + count]


def upload(made: BuiltDocument, name: str, hosts: Path, credential: Credential | None) -> None:
    """Push with the registry client, so that it works in every set-up."""

    async def main() -> None:
        async with client_for(hosts, timeouts=PATIENT) as client:
            repository = client.repository(reference := Reference.parse(name), credential)
            for digest, data in made.blobs.items():
                await repository.push_blob(Descriptor("application/octet-stream", digest, len(data)), Bytes(data))
            await repository.push_manifest(made.data, made.media_type, reference.tag)

    asyncio.run(main())


def image_of(text: str) -> BuiltDocument:
    return images.image([images.layer([Entry("text", text.encode())]), images.layer([Entry("more", noise(200_000))])])


@dataclass(frozen=True, slots=True)
class SetUp:
    """A registry with a private image `team/app:latest`, and what is needed to get it. hosts: namespace → hosts.toml and its files."""

    address: str
    image: BuiltDocument
    auth: cri_pb2.AuthConfig | None = None
    files: Mapping[str, bytes] | None = None
    tokens: TokenServer | None = None

    @property
    def name(self) -> str:
        return f"{self.address}/team/app:latest"

    @property
    def directory(self) -> str:
        return self.address.replace(":", "_") + "_"

    def configure(self, daemon: Daemon) -> None:
        """Write what hosts.d needs."""
        for name, data in (self.files or {}).items():
            path = daemon.directory / "hosts.d" / self.directory / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(data)


ROBOT = Credential("test", USER, PASSWORD)
AUTH = cri_pb2.AuthConfig(username=USER, password=PASSWORD)


@pytest.fixture(scope="module")
def anonymous(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SetUp]:
    with docker_registry(tmp_path_factory.mktemp("anonymous")) as address:
        made = SetUp(address, image_of("anonymous"))
        upload(made.image, made.name, Path("/nonexistent"), None)
        yield made


@pytest.fixture(scope="module")
def htpasswd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SetUp]:
    with htpasswd_registry(tmp_path_factory.mktemp("htpasswd")) as address:
        made = SetUp(address, image_of("htpasswd"), AUTH)
        upload(made.image, made.name, Path("/nonexistent"), ROBOT)
        yield made


@pytest.fixture(scope="module")
def bearer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SetUp]:
    with token_registry(tmp_path_factory.mktemp("bearer")) as (address, tokens):
        made = SetUp(address, image_of("bearer"), AUTH, tokens=tokens)
        upload(made.image, made.name, Path("/nonexistent"), ROBOT)
        yield made


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SetUp]:
    with nginx_registry(tmp_path_factory.mktemp("nginx")) as address:
        pair = authority().issue("node")
        files = {
            "hosts.toml": f'server = "https://{address}"\nca = "ca.pem"\nclient = [["node.cert", "node.key"]]\n'.encode(),
            "ca.pem": authority().pem,
            "node.cert": pair.certificate,
            "node.key": pair.key,
        }
        made = SetUp(address, image_of("certificates"), files=files)
        hosts = tmp_path_factory.mktemp("hosts")
        (hosts / made.directory).mkdir()
        for name, data in files.items():
            (hosts / made.directory / name).write_bytes(data)
        upload(made.image, made.name, hosts, None)
        yield made


def pull(daemon: Daemon, name: str, auth: cri_pb2.AuthConfig | None = None) -> str:
    request = cri_pb2.PullImageRequest(image=cri_pb2.ImageSpec(image=name), auth=auth)
    return daemon.images().PullImage(request, timeout=RPC_TIMEOUT).image_ref


def refusal(daemon: Daemon, name: str, auth: cri_pb2.AuthConfig | None = None) -> tuple[grpc.StatusCode, str]:
    return cri.refusal(lambda: pull(daemon, name, auth))


def inspected(daemon: Daemon, name: str) -> dict[str, Any]:
    done = daemon.cli("inspect", name)
    assert done.returncode == 0, done.stderr
    shown: dict[str, Any] = json.loads(done.stdout)
    return shown


@pytest.mark.compat
@pytest.mark.parametrize("kind", ["anonymous", "htpasswd", "bearer", "certificates"])
def test_the_four_set_ups(request: pytest.FixtureRequest, make_daemon: Callable[..., Daemon], kind: str) -> None:
    made: SetUp = request.getfixturevalue(kind)
    daemon = make_daemon()
    made.configure(daemon)
    daemon.start()

    assert pull(daemon, made.name, made.auth) == made.image.config_digest

    shown = inspected(daemon, made.name)
    scheme = "https" if kind == "certificates" else "http"
    assert shown["resolvedBy"].endswith(f"//{made.address}/v2")
    assert [list(layer["from"]) for layer in shown["layers"]] == [[f"{scheme}://{made.address}/v2"]] * 2
    assert [sum(layer["from"].values()) for layer in shown["layers"]] == [layer["size"] for layer in shown["layers"]]
    given, configured = ["CRI request"] if made.auth else [], "client certificate of " if kind == "certificates" else ""
    assert [source for source in shown["credentials"] if not configured or not source.startswith(configured)] == given
    assert bool(configured) == (len(shown["credentials"]) > len(given)), "a client certificate makes an image private too"
    if made.auth or kind == "certificates":
        fresh = make_daemon()
        fresh.start()
        code, text = refusal(fresh, made.name)
        assert code is not grpc.StatusCode.OK
        assert made.address in text


def basic(user: str, password: str) -> str:
    return base64.b64encode(f"{user}:{password}".encode()).decode()


@pytest.mark.compat
def test_a4_6_every_field_of_cris_auth_config(make_daemon: Callable[..., Daemon], htpasswd: SetUp, bearer: SetUp) -> None:
    daemon = make_daemon()
    daemon.start()
    tokens = bearer.tokens
    assert tokens
    ready = tokens._sign(USER, "test-service", ["repository:team/app:pull"])
    for made, auth in (
        (htpasswd, cri_pb2.AuthConfig(username=USER, password=PASSWORD)),
        (htpasswd, cri_pb2.AuthConfig(auth=basic(USER, PASSWORD))),
        (htpasswd, cri_pb2.AuthConfig(username=USER, password=PASSWORD, server_address=f"https://{htpasswd.address}/v1/")),
        (bearer, cri_pb2.AuthConfig(identity_token=tokens.refresh_token)),
        (bearer, cri_pb2.AuthConfig(registry_token=ready)),
    ):
        assert pull(daemon, made.name, auth) == made.image.config_digest, auth
    for made, auth, words in (
        (
            htpasswd,
            cri_pb2.AuthConfig(username=USER, password=PASSWORD, server_address="other.example"),
            "withheld: CRI request is bound to",
        ),
        (htpasswd, cri_pb2.AuthConfig(username=USER, password=WRONG), "CRI request"),
        (bearer, cri_pb2.AuthConfig(identity_token=WRONG), "CRI request"),
        (bearer, cri_pb2.AuthConfig(registry_token=WRONG), "CRI request"),
    ):
        code, text = refusal(daemon, made.name, auth)
        assert code is grpc.StatusCode.UNAUTHENTICATED, text
        assert words in text
        assert WRONG not in text
    code, text = refusal(daemon, htpasswd.name, cri_pb2.AuthConfig(auth="%%% no base64 %%%"))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "no base64" not in text


def private_file(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o600)
    return path


def program(path: Path, body: str) -> None:
    """A Python program that answers with `body`'s `answer`, given `asked`."""
    path.write_text(f"#!{sys.executable}\nimport json, sys\nasked = sys.stdin.read()\n{body}\nprint(json.dumps(answer))\n")
    path.chmod(0o755)


@dataclass(slots=True)
class Store:
    """One way of keeping the node's credential. save: put a password there; source: how errors and inspect call the place."""

    settings: str
    save: Callable[[str], object]
    source: str


def stores(kind: str, host: str, directory: Path, bin_dir: Path) -> Store:
    secrets = directory / "secrets"
    secrets.mkdir(exist_ok=True)
    helper = bin_dir / "docker-credential-test"

    def save_in_helper(password: str) -> None:
        program(helper, f'assert asked == "{host}"\nanswer = {{"Username": "{USER}", "Secret": "{password}"}}')

    match kind:
        case "credentials.toml":
            place = directory / "hosts.d" / (host.replace(":", "_") + "_")
            place.mkdir(exist_ok=True)
            return Store(
                "",
                lambda p: private_file(place / "credentials.toml", f'[namespace]\nusername = "{USER}"\npassword = "{p}"\n'),
                f"{place}/credentials.toml:1",
            )
        case "hosts":
            return Store(
                f'[registry.credentials.hosts."{host}"]\nusername = "{USER}"\npassword_file = "{secrets}/password"\n',
                lambda p: private_file(secrets / "password", p + "\n"),
                "config.toml:",
            )
        case "files":
            return Store(
                f'[registry.credentials]\nfiles = ["{secrets}/config.json"]\n',
                lambda p: private_file(secrets / "config.json", json.dumps({"auths": {host: {"auth": basic(USER, p)}}})),
                f"{secrets}/config.json ({host})",
            )
        case "helpers":
            return Store(f'[registry.credentials.helpers]\n"{host}" = "test"\n', save_in_helper, "docker-credential-test")
        case "credsStore":
            private_file(secrets / "config.json", '{"credsStore": "test"}')
            return Store(f'[registry.credentials]\nfiles = ["{secrets}/config.json"]\n', save_in_helper, "docker-credential-test")
        case "provider":
            provider = {
                "name": "test-provider",
                "matchImages": [host],
                "defaultCacheDuration": "1h",
                "apiVersion": "credentialprovider.kubelet.k8s.io/v1",
            }
            config = {"apiVersion": "kubelet.config.k8s.io/v1", "kind": "CredentialProviderConfig", "providers": [provider]}
            private_file(secrets / "providers.json", json.dumps(config))

            def save_in_provider(password: str) -> None:
                answer = {
                    "kind": "CredentialProviderResponse",
                    "apiVersion": "credentialprovider.kubelet.k8s.io/v1",
                    "cacheKeyType": "Registry",
                    "auth": {host: {"username": USER, "password": password}},
                }
                program(bin_dir / "test-provider", f"assert '{host}' in json.loads(asked)['image']\nanswer = {answer!r}")

            return Store(
                f'[registry.credentials]\nprovider_config = "{secrets}/providers.json"\nprovider_bin_dir = "{bin_dir}"\n',
                save_in_provider,
                "credential provider test-provider",
            )
    raise AssertionError(kind)


@pytest.mark.compat
@pytest.mark.parametrize("kind", ["credentials.toml", "hosts", "files", "helpers", "credsStore", "provider"])
def test_a4_1_the_nodes_own_credentials_are_used_and_changes_take_effect(
    make_daemon: Callable[..., Daemon], htpasswd: SetUp, tmp_path: Path, kind: str
) -> None:
    daemon = make_daemon()
    store = stores(kind, htpasswd.address, daemon.directory, tmp_path)
    with daemon.config.open("a") as config:
        config.write(store.settings)
    store.save(WRONG)
    daemon.start({"PATH": f"{tmp_path}:{os.environ['PATH']}"})

    code, text = refusal(daemon, htpasswd.name)
    assert code is grpc.StatusCode.UNAUTHENTICATED
    assert f"credential {store.source}" in text or store.source in text
    assert WRONG not in text

    store.save(PASSWORD)  # a provider's answer is kept for an hour, unless the registry refuses it
    assert pull(daemon, htpasswd.name) == htpasswd.image.config_digest
    (used,) = inspected(daemon, htpasswd.name)["credentials"]
    assert store.source in used


def test_a_hosts_file_that_changed_is_used_by_the_next_pull(make_daemon: Callable[..., Daemon]) -> None:
    made = image_of("moved")
    with FakeRegistry() as first, FakeRegistry() as second:
        first.add(made, "library/moved")
        second.add(made, "library/moved")
        daemon = make_daemon()
        daemon.map_host("docker.io", first.address)
        daemon.start()
        pull(daemon, "moved")
        asked = len(first.requests)
        daemon.map_host("docker.io", second.address)
        pull(daemon, "moved")
        assert len(first.requests) == asked
        assert second.requests
        (daemon.directory / "hosts.d/docker.io/hosts.toml").write_text("blocked = true\n")
        code, text = refusal(daemon, "moved")
        assert code is grpc.StatusCode.FAILED_PRECONDITION, text
        assert "blocked" in text


def test_a2_1_every_root_of_config_path_is_looked_into(make_daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    """containerd's default pull path takes the whole list for one directory and goes upstream (containerd#12636)."""
    made = image_of("second root")
    with FakeRegistry() as mirror:
        mirror.add(made, "library/app")
        daemon = make_daemon()
        hosts_d(tmp_path / "second", {"docker.io": f'server = "http://{DEAD}"\n[host."{mirror.url}"]\n'})
        first = daemon.directory / "hosts.d"
        daemon.config.write_text(daemon.config.read_text().replace(f'"{first}"', f'"{tmp_path}/missing:{first}:{tmp_path}/second"'))
        daemon.start()
        assert pull(daemon, "app") == made.config_digest
        assert f"{tmp_path}/missing is not there" in daemon.log
        # The first root that has the registry decides.
        hosts_d(first, {"docker.io": "blocked = true\n"})
        assert refusal(daemon, "app")[0] is grpc.StatusCode.FAILED_PRECONDITION


def test_a2_4_a_path_that_looks_wrong_is_said_once_with_the_url_that_is_asked(make_daemon: Callable[..., Daemon]) -> None:
    with FakeRegistry() as cache:
        daemon = make_daemon()
        hosts_d(daemon.directory / "hosts.d", {"docker.io": f'fallback = false\n[host."{cache.url}/v2/proxy"]\n'})
        daemon.start()
        for _ in range(3):
            assert refusal(daemon, "app")[0] is grpc.StatusCode.NOT_FOUND
        assert cache.seen("/v2/proxy/v2/library/app/manifests/latest")
        (warning,) = (line for line in daemon.log.splitlines() if "override_path" in line)
        assert f"{daemon.directory}/hosts.d/docker.io/hosts.toml:2:" in warning
        assert f"{cache.url}/v2/proxy/v2/<repository>" in warning


@pytest.mark.compat
def test_a2_10_containerds_older_tables_still_work_and_say_what_to_write_instead(
    make_daemon: Callable[..., Daemon], htpasswd: SetUp
) -> None:
    daemon = make_daemon()
    with daemon.config.open("a") as config:
        config.write(
            f'[registry.mirrors."docker.io"]\nendpoint = ["http://{htpasswd.address}"]\n'
            f'[registry.configs."{htpasswd.address}".auth]\nusername = "{USER}"\npassword = "{PASSWORD}"\n'
        )
    daemon.start()
    for name in (htpasswd.name, "docker.io/team/app"):
        assert pull(daemon, name) == htpasswd.image.config_digest
    warnings = [line for line in daemon.log.splitlines() if "WARNING" in line and "hosts.toml" in line]
    assert warnings
    assert str(daemon.config) in "".join(warnings)
    assert PASSWORD not in daemon.log + daemon.cli("config", "dump").stdout


def test_a3_3_a_mirror_gets_a_second_try_too(make_daemon: Callable[..., Daemon]) -> None:
    """containerd retries only the last host, so that one hiccup of a mirror costs its upstream a request."""
    made = image_of("hiccup")
    with FakeRegistry() as mirror, FakeRegistry() as upstream:
        for fake in (mirror, upstream):
            fake.add(made, "library/app")
        mirror.rule(mirror.times(1, mirror.on("/manifests/", Reply(503))))
        mirror.rule(mirror.times(1, mirror.on("/blobs/", Reply(502))))
        daemon = make_daemon()
        hosts_d(daemon.directory / "hosts.d", {"docker.io": f'server = "{upstream.url}"\n[host."{mirror.url}"]\n'})
        daemon.start()
        assert pull(daemon, "app") == made.config_digest
        assert upstream.requests == []


@pytest.mark.parametrize(
    "text, position",
    [
        ('server = "{up}"\n[host."http://{mirror}"\n', ":2:"),
        ('server = "{up}"\n[host."http://{mirror}"]\ncapabilites = ["pull"]\n', ":3:1"),
        ('server = "{up}"\n[host."http://{mirror}"]\ncapabilities = ["pul"]\n', ":3:"),
        ('server = "*"\n', ":1:"),
        ('server = "{up}"\nca = "missing.pem"\n', "missing.pem"),
    ],
    ids=["syntax", "unknown-key", "unknown-capability", "no-url", "no-ca"],
)
def test_a2_2_c_r10_a_broken_hosts_file_fails_the_pull_and_nobody_is_asked(
    make_daemon: Callable[..., Daemon], text: str, position: str
) -> None:
    with FakeRegistry() as upstream:
        upstream.add(image_of("broken"), "app")
        daemon = make_daemon()
        directory = daemon.directory / "hosts.d" / (upstream.address.replace(":", "_") + "_")
        directory.mkdir()
        (directory / "hosts.toml").write_text(text.replace("{up}", f"https://{upstream.address}").replace("{mirror}", DEAD))
        daemon.start()

        code, shown = refusal(daemon, f"{upstream.address}/app")

        assert code in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND), shown
        where = str(directory / position) if position.endswith(".pem") else f"{directory / 'hosts.toml'}{position}"
        assert where in shown
        assert upstream.requests == []
        # Another registry of the same node is not harmed by it.
        with FakeRegistry() as other:
            other.add(image_of("whole"), "app")
            pull(daemon, f"{other.address}/app")


@pytest.mark.compat
def test_c_r17_a_cached_private_image_is_asked_for_with_the_callers_credentials(
    make_daemon: Callable[..., Daemon], htpasswd: SetUp
) -> None:
    daemon = make_daemon()
    daemon.start()
    first = pull(daemon, htpasswd.name, AUTH)
    for auth in (None, cri_pb2.AuthConfig(username=USER, password=WRONG)):
        code, text = refusal(daemon, htpasswd.name, auth)
        assert code is grpc.StatusCode.UNAUTHENTICATED
        assert "401" in text
        seen = cri.image_status(daemon.images(), htpasswd.name)
        assert seen
        assert seen.id == first
    assert pull(daemon, htpasswd.name, AUTH) == first
    code, text = refusal(daemon, f"{htpasswd.address}/team/app@{htpasswd.image.digest}")
    assert code is grpc.StatusCode.UNAUTHENTICATED, "a digest that is here is no ticket either"


def test_a_failed_pull_lists_every_attempt(make_daemon: Callable[..., Daemon]) -> None:
    with FakeRegistry() as broken, FakeRegistry() as empty, FakeRegistry() as strict:
        broken.rule(broken.on("/manifests/", Reply(500, body=b'{"errors":[{"code":"UNKNOWN","message":"disk on fire"}]}')))
        challenge = {"WWW-Authenticate": 'Basic realm="strict"'}
        denied = Reply(403, {"Content-Type": "application/json"}, b'{"errors":[{"code":"DENIED","message":"not for robots"}]}')
        strict.rule(strict.on("/manifests/", lambda request: denied if request.authorization else Reply(401, challenge)))
        daemon = make_daemon()
        directory = daemon.directory / "hosts.d" / (strict.address.replace(":", "_") + "_")
        directory.mkdir()
        mirrors = "".join(f'[host."http://{address}"]\n' for address in (DEAD, broken.address, empty.address))
        (directory / "hosts.toml").write_text(f'server = "{strict.url}"\n{mirrors}')
        daemon.start()

        code, text = refusal(daemon, f"{strict.address}/team/app:1", cri_pb2.AuthConfig(username=USER, password=WRONG))

    assert code is grpc.StatusCode.PERMISSION_DENIED, "the most telling of all failures"
    attempts = text.partition("(tried: ")[2].split(" | ")
    seen = {found.groups() for a in attempts if (found := re.match(r"http://(\S+)/v2 \[(\w+)\] (no answer|\d+), credential ", a))}
    assert len(attempts) >= 4
    assert {(DEAD, "connect", "no answer"), (broken.address, "resolve", "500"), (empty.address, "resolve", "404")} <= seen
    assert any(address == strict.address and status == "403" for address, _, status in seen)
    told = {
        address: next(a for a in attempts if a.startswith(f"http://{address}/"))
        for address in (broken.address, empty.address, strict.address)
    }
    assert "credential CRI request: " in told[strict.address]
    assert any("DENIED: not for robots" in a for a in attempts if a.startswith(strict.url)), "the registry's own words"
    assert "credential withheld: CRI request is bound to" in told[empty.address], "a mirror gets no credential of the registry"
    assert WRONG not in text


@pytest.mark.compat
def test_c_r16_no_secret_is_shown_anywhere(make_daemon: Callable[..., Daemon], htpasswd: SetUp, bearer: SetUp, tmp_path: Path) -> None:
    secrets = [PASSWORD, basic(USER, PASSWORD), "token-in-a-header", WRONG, basic(USER, WRONG)]
    daemon = make_daemon()
    with daemon.config.open("a") as config:
        for kind, made in (("hosts", htpasswd), ("helpers", bearer)):
            store = stores(kind, made.address, daemon.directory, tmp_path)
            config.write(store.settings)
            store.save(PASSWORD)
    directory = daemon.directory / "hosts.d" / htpasswd.directory
    directory.mkdir()
    (directory / "hosts.toml").write_text(f'server = "http://{htpasswd.address}"\n[header]\nx-key = "token-in-a-header"\n')
    daemon.start({"PATH": f"{tmp_path}:{os.environ['PATH']}"})
    command = [sys.executable, "-m", "imgsvc.cli", "events", "--address", daemon.address]
    with (tmp_path / "events").open("wb") as out, subprocess.Popen(command, stdout=out) as listening:
        try:
            texts = []
            for made in (htpasswd, bearer):
                pull(daemon, made.name)
                texts.append(refusal(daemon, made.name, cri_pb2.AuthConfig(username=USER, password=WRONG))[1])
                texts.append(refusal(daemon, f"{made.address}/absent")[1])
                texts += [
                    daemon.cli("inspect", made.name).stdout,
                    daemon.cli("hosts", "explain", made.name, "--config", str(daemon.config)).stdout,
                ]
            done = daemon.cli("pull", htpasswd.name, "--creds", f"{USER}:{WRONG}")
            assert done.returncode == 1
            texts += [done.stdout, done.stderr, daemon.cli("config", "dump").stdout]
        finally:
            listening.terminate()
    status = daemon.runtime().Status(cri_pb2.StatusRequest(verbose=True), timeout=RPC_TIMEOUT)
    texts += [str(status), daemon.log, (tmp_path / "events").read_text()]
    assert daemon.stop() == 0
    texts.append(daemon.log)
    assert "CRI request" in "".join(texts), "sources are named"
    for secret in secrets:
        assert not [text for text in texts if secret in text]
    tokens = bearer.tokens
    assert tokens
    assert not any("eyJ" in text for text in texts), "no JWT either"


def test_a3_6_who_resolved_and_who_served_is_remembered(make_daemon: Callable[..., Daemon]) -> None:
    made = image_of("provenance")
    with FakeRegistry() as mirror, FakeRegistry() as origin:
        mirror.add(made, "app")
        origin.add(made, "app")
        daemon = make_daemon()
        directory = daemon.directory / "hosts.d" / (origin.address.replace(":", "_") + "_")
        directory.mkdir()
        (directory / "hosts.toml").write_text(f'server = "{origin.url}"\n[host."{mirror.url}"]\ncapabilities = ["pull"]\n')
        daemon.start()
        pull(daemon, f"{origin.address}/app")
        shown = inspected(daemon, f"{origin.address}/app")
        assert shown["resolvedBy"] == f"{origin.url}/v2", "a mirror without resolve decides no tag"
        assert {endpoint for layer in shown["layers"] for endpoint in layer["from"]} == {f"{mirror.url}/v2"}
        assert daemon.stop() == 0
        daemon.start()
        assert inspected(daemon, f"{origin.address}/app") == shown


@pytest.mark.parametrize("what", ["layer", "manifest", "config"])
def test_c_r9_wrong_bytes_of_one_mirror_are_replaced_by_those_of_another(make_daemon: Callable[..., Daemon], what: str) -> None:
    made = image_of("right")
    layer = max(made.blobs, key=lambda digest: len(made.blobs[digest]))
    victim = {"layer": layer, "manifest": made.digest, "config": made.config_digest}[what]
    with FakeRegistry() as liar, FakeRegistry() as honest:
        for mirror in (liar, honest):
            mirror.add(made, "library/app", "1")
        right = made.data if what == "manifest" else made.blobs[victim]
        forged = right[:-2] + bytes([right[-2] ^ 1]) + right[-1:]
        if what == "manifest":
            liar.manifests[f"library/app/{made.digest}"] = (made.media_type, forged)
        else:
            liar.blobs[str(victim)] = forged
        daemon = make_daemon()
        text = f'fallback = false\n[host."{liar.url}"]\ncapabilities = ["pull"]\n[host."{honest.url}"]\n'
        hosts_d(daemon.directory / "hosts.d", {"docker.io": text})
        daemon.start()

        assert pull(daemon, "app:1") == made.config_digest

        assert liar.seen(str(victim), "GET"), "it was asked first"
        for digest, data in {**made.blobs, made.digest: made.data}.items():
            assert (daemon.root / "content/blobs/sha256" / digest.hex).read_bytes() == data
        unpacked = sorted(
            p.name
            for p in below(daemon.root / "snapshots")
            if p.name in ("text", "more") and "trash" not in p.parts and stat.S_ISREG(p.stat().st_mode)
        )
        assert unpacked == ["more", "text"]
        asked = len(liar.seen(str(victim), "GET"))
        cri_pb2_remove(daemon, "app:1")
        assert daemon.cli("gc").returncode == 0
        assert pull(daemon, "app:1") == made.config_digest
        assert len(liar.seen(str(victim), "GET")) == asked, "whoever lied about a digest is not asked for it again"


def cri_pb2_remove(daemon: Daemon, name: str) -> None:
    daemon.images().RemoveImage(cri_pb2.RemoveImageRequest(image=cri_pb2.ImageSpec(image=name)), timeout=RPC_TIMEOUT)


def test_c_r4_layer_urls_are_followed_only_where_the_administrator_says_so(make_daemon: Callable[..., Daemon]) -> None:
    base = image_of("foreign")
    with FakeRegistry() as elsewhere, FakeRegistry() as origin:
        document = json.loads(base.data)
        victim = document["layers"][1]
        victim["urls"] = [f"{elsewhere.url}/layers/big"]
        data = base.blobs[victim["digest"]]
        made = BuiltDocument(base.media_type, json.dumps(document).encode(), base.blobs)
        origin.add(made, "library/app")
        elsewhere.rule(elsewhere.on("/layers/big", Reply(body=data)))
        plain, trusting = make_daemon(), make_daemon(settings="")
        settings = trusting.config.read_text().replace("[registry]\n", f'[registry]\nforeign_layer_hosts = ["{elsewhere.address}"]\n')
        trusting.config.write_text(settings)
        for daemon in (plain, trusting):
            hosts_d(daemon.directory / "hosts.d", {"docker.io": f'fallback = false\n[host."{origin.url}"]\ncredentials = "namespace"\n'})
            daemon.start()
        assert pull(plain, "app", AUTH) == base.config_digest
        assert elsewhere.requests == []
        assert pull(trusting, "app", AUTH) == base.config_digest
        assert inspected(trusting, "app")["layers"][1]["from"] == {elsewhere.url: len(data)}
        assert not [r for r in elsewhere.requests if r.authorization]
