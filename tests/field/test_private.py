"""What took credentials is private, and stays so."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import httpx
import pytest

from imgsvc.api import cri_pb2
from imgsvc.base.concurrency import Threads
from imgsvc.base.metadb.database import MetaDB
from imgsvc.base.oci import OCI_INDEX, OCI_MANIFEST, Descriptor, Digest
from imgsvc.base.reference import Reference
from imgsvc.images.verification.policy import Rule, load_policy
from imgsvc.images.verification.programs import Programs
from imgsvc.images.verification.service import Verification
from imgsvc.images.verification.signatures import Signatures
from imgsvc.registry.interfaces import Credential, CredentialKind, CredentialUse
from tests.fakes.registry import FakeRegistry, Reply, Request
from tests.images.verification.signing import Signer
from tests.registry.support import client_for, hosts_d
from tests.support.daemon import Daemon
from tests.support.images import BuiltDocument, Entry, descriptor, image, index, layer
from tests.support.registries import free_port

APP = image([layer([Entry("f", b"one")])])


def test_S4_headers_of_hosts_toml_are_credentials(tmp_path: Path) -> None:
    async def main() -> tuple[CredentialUse, CredentialUse]:
        with FakeRegistry() as fake:
            fake.add(APP, "app", "1")
            uses = []
            for header in ('authorization = "Bearer secret"', 'user-agent = "node"'):
                hosts_d(tmp_path, {fake.address: f'server = "{fake.url}"\n[header]\n{header}\n'})
                async with client_for(tmp_path) as client:
                    uses.append((await client.resolve(Reference.parse(f"{fake.address}/app:1"))).attempts[-1].credential)
            return uses[0], uses[1]

    secret, harmless = asyncio.run(main())

    assert (secret.kind, secret.taken) == (CredentialKind.CONFIGURED, True)
    assert "secret" not in str(secret)
    assert not harmless.taken


def test_A2_how_a_credential_was_used_is_told_and_not_read_from_text() -> None:
    assert not CredentialUse().taken
    assert not CredentialUse(reason="configured").taken
    assert not CredentialUse(CredentialKind.WITHHELD, reason="plain HTTP").taken
    assert CredentialUse(CredentialKind.GIVEN, "none").taken, "a name decides nothing"
    told = [CredentialUse(), CredentialUse(reason="configured"), CredentialUse(CredentialKind.STORED, "config.json")]
    assert [str(use) for use in told] == ["none", "none (configured)", "config.json"]


class Waiting(Signatures):
    """Says nothing before it was asked twice."""

    def __init__(self) -> None:
        self.asked: list[Credential | None] = []
        self.both = asyncio.Event()

    async def missing(self, reference: Reference, target: Descriptor, credential: Credential | None, rule: Rule) -> str:
        self.asked.append(credential)
        if len(self.asked) == 2:
            self.both.set()
        await asyncio.wait_for(self.both.wait(), 20)
        return ""


def test_A4_a_verdict_is_shared_by_those_with_one_credential_only(tmp_path: Path) -> None:
    (tmp_path / "k.pub").write_bytes(Signer().pem)
    file = tmp_path / "policy.toml"
    file.write_text('version = 1\ndefault = "deny"\n[[rule]]\nprefix = "docker.io"\ndecision = "signed"\nkeys = ["k.pub"]\n')

    async def main() -> int:
        threads, db, signatures = Threads(2, "test"), MetaDB(tmp_path / "db", sync=False), Waiting()
        try:
            verification = Verification(
                policy=lambda: load_policy(file),
                programs=Programs(tmp_path / "bin", 10, 10.0, threads),
                signatures=signatures,
                db=db,
                threads=threads,
                fail_closed=False,
            )
            target = Descriptor(APP.media_type, APP.digest, len(APP.data))
            name = Reference.parse("docker.io/library/app:1")
            users = [Credential("CRI request", user, "secret") for user in ("one", "two")]
            await asyncio.gather(*(verification.verify(name, target, user) for user in users))
        finally:
            db.close()
            threads.close()
        return len(signatures.asked)

    assert asyncio.run(main()) == 2


SECRET = image([layer([Entry("secret", b"one")]), layer([Entry("two", b"two" * 5000)])], Cmd=["secret"])
RIGHT, WRONG = ("user", "right"), ("user", "wrong")


BOTH = index({"linux/amd64": SECRET})


@dataclass(slots=True)
class Scene:
    """A node with a mirror, a registry that wants a password, and one that anybody may fill, both pulled through; and one more
    that wants a password and is not.
    """

    daemon: Daemon
    port: int
    private: FakeRegistry
    public: FakeRegistry
    closed: FakeRegistry

    def pull(self, name: str, who: tuple[str, str] | None = None) -> grpc.StatusCode:
        """By CRI."""
        auth = cri_pb2.AuthConfig(username=who[0], password=who[1]) if who else None
        request = cri_pb2.PullImageRequest(image=cri_pb2.ImageSpec(image=name), auth=auth)
        try:
            self.daemon.images().PullImage(request, timeout=60)
        except grpc.RpcError as error:
            code: grpc.StatusCode = error.code()
            return code
        return grpc.StatusCode.OK

    def prepull(self, name: str, who: tuple[str, str] | None = None) -> bool:
        """By a pre-pull file of the administrator's."""
        file = self.daemon.directory / "prepull.toml"
        text = f'version = 1\n[[image]]\nreference = "{name}"\n'
        if who:
            password = self.daemon.directory / "password"
            password.write_text(who[1])
            text += f'username = "{who[0]}"\npassword_file = "{password}"\n'
        file.write_text(text)
        return self.daemon.cli("prepull", "-f", str(file), "--retries", "0").returncode == 0

    def get(self, registry: FakeRegistry, repository: str, what: str) -> httpx.Response:
        """From the mirror."""
        url = f"http://127.0.0.1:{self.port}/v2/{repository}/{what}?ns={registry.address}"
        return httpx.get(url, trust_env=False, timeout=60)

    def obtainable(self, registry: FakeRegistry, repository: str, *, tag: str = "1") -> set[str]:
        """Parts of SECRET that the mirror hands to anybody under that name, after asking for the tag."""
        self.get(registry, repository, f"manifests/{tag}")
        paths = [f"manifests/{SECRET.digest}", *(f"blobs/{digest}" for digest in (SECRET.digest, *SECRET.blobs))]
        return {path for path in paths if self.get(registry, repository, path).status_code == 200}


@pytest.fixture
def scene(make_daemon: Callable[..., Daemon]) -> Iterator[Scene]:
    with FakeRegistry() as private, FakeRegistry() as public, FakeRegistry() as closed:
        private.add(SECRET, "secret", "1")
        private.add(BOTH, "both", "1")
        closed.add(BOTH, "both", "1")
        right = "Basic " + base64.b64encode(":".join(RIGHT).encode()).decode()

        def door(request: Request) -> Reply | None:
            if request.authorization == right:
                return None
            return Reply(401, {"WWW-Authenticate": 'Basic realm="private"'}, b"{}")

        for registry in (private, closed):
            registry.rule(door)
        port = free_port()
        namespaces = f'["{private.address}", "{public.address}"]'
        daemon = make_daemon(settings=f'[mirror]\naddress = "127.0.0.1:{port}"\npull_through = {namespaces}\n')
        for registry in (private, public, closed):
            directory = daemon.directory / "hosts.d" / registry.address
            directory.mkdir()
            (directory / "hosts.toml").write_text(f'server = "{registry.url}"\n')
        daemon.start()
        yield Scene(daemon, port, private, public, closed)


def sparse(media_type: str, **members: object) -> BuiltDocument:
    """A document that names what it does not bring."""
    data = json.dumps({"schemaVersion": 2, "mediaType": media_type, **members}).encode()
    return BuiltDocument(media_type, data, {})


def sparse_forms() -> dict[str, BuiltDocument]:
    """What an attacker who knows digests can offer."""
    secret = json.loads(SECRET.data)
    entry = {**descriptor(OCI_MANIFEST, SECRET.data), "platform": {"os": "linux", "architecture": "amd64"}}
    config = SECRET.blobs[SECRET.config_digest]
    own = json.loads(config) | {"created": "2001-01-01T00:00:00Z"}
    raw = json.dumps(own).encode()
    bait = layer([Entry("bait", b"bait")])
    baits = [descriptor(bait.media_type, bait.blob)] * len(secret["layers"])
    config_type = secret["config"]["mediaType"]
    layers = sparse(OCI_MANIFEST, config=descriptor(config_type, raw), layers=secret["layers"])
    chain = sparse(OCI_MANIFEST, config=descriptor(config_type, raw), layers=baits)
    return {
        "index": sparse(OCI_INDEX, manifests=[entry]),
        "config": sparse(OCI_MANIFEST, config=secret["config"], layers=baits),
        "layers": BuiltDocument(layers.media_type, layers.data, {Digest.of(raw): raw}),
        "chain": BuiltDocument(chain.media_type, chain.data, {Digest.of(raw): raw, bait.digest: bait.blob}),
    }


def test_S3_what_took_credentials_is_had_by_nobody_who_only_names_it(scene: Scene) -> None:
    name = f"{scene.private.address}/secret:1"
    assert [scene.pull(name, who) for who in (None, WRONG, RIGHT)] == [*[grpc.StatusCode.UNAUTHENTICATED] * 2, grpc.StatusCode.OK]
    for form, document in sparse_forms().items():
        scene.public.add(document, form, "1")
        assert scene.pull(f"{scene.public.address}/{form}:1") is not grpc.StatusCode.OK, form
        assert scene.obtainable(scene.public, form) == set(), form
        assert scene.pull(f"{scene.public.address}/{form}:1", RIGHT) is not grpc.StatusCode.OK, (
            f"{form}, with another registry's credentials"
        )
    assert scene.obtainable(scene.private, "secret") == set(), "private under its own name, whatever else was pulled"
    assert [scene.pull(name, who) for who in (None, WRONG)] == [grpc.StatusCode.UNAUTHENTICATED] * 2


def test_S3_who_shows_private_bytes_may_use_them_and_public_bytes_cost_no_request(scene: Scene) -> None:
    name = f"{scene.private.address}/secret:1"
    assert scene.pull(name, RIGHT) is grpc.StatusCode.OK
    for copy in ("copy", "second"):
        scene.public.add(SECRET, copy, "1")
        assert scene.pull(f"{scene.public.address}/{copy}:1") is grpc.StatusCode.OK

    assert len(scene.public.seen("/copy/blobs/")) == len(SECRET.blobs), "one sample of each layer, and the config"
    assert scene.public.seen("/second/blobs/") == []
    assert len(scene.obtainable(scene.public, "copy")) == 2 + len(SECRET.blobs)
    assert scene.obtainable(scene.private, "secret") == set(), "another repository's pull loosens nothing"


WAYS: dict[str, Callable[[Scene, FakeRegistry, tuple[str, str] | None], bool]] = {
    "CRI, index": lambda scene, at, who: scene.pull(f"{at.address}/both:1", who) is grpc.StatusCode.OK,
    "CRI, index by digest": lambda scene, at, who: scene.pull(f"{at.address}/both@{BOTH.digest}", who) is grpc.StatusCode.OK,
    "CRI, manifest by digest": lambda scene, at, who: scene.pull(f"{at.address}/both@{SECRET.digest}", who) is grpc.StatusCode.OK,
    "pre-pull, index": lambda scene, at, who: scene.prepull(f"{at.address}/both:1", who),
    "pre-pull, manifest by digest": lambda scene, at, who: scene.prepull(f"{at.address}/both@{SECRET.digest}", who),
}
PARTS = (f"manifests/{BOTH.digest}", f"manifests/{SECRET.digest}", "manifests/1", *(f"blobs/{digest}" for digest in SECRET.blobs))


@pytest.mark.parametrize("door", ["private", "closed"], ids=["pulled through", "mirror only"])
def test_S3_nothing_private_is_had_without_the_right_credentials(scene: Scene, door: str) -> None:
    """{anonymous, wrong, right} × {index, manifest, blob} × {absent, present} × {CRI, pre-pull, mirror, pull-through}."""
    registry: FakeRegistry = getattr(scene, door)
    strangers = {"nobody": None, "wrong": WRONG}

    def leaks() -> list[str]:
        taken = [f"{way}, {who}" for way, take in WAYS.items() for who, whom in strangers.items() if take(scene, registry, whom)]
        for who, whom in {**strangers, "right": RIGHT}.items():  # a mirror gives nothing private to any client without a certificate
            url = f"http://127.0.0.1:{scene.port}/v2/both/"
            answers = {part: httpx.get(f"{url}{part}?ns={registry.address}", auth=whom, trust_env=False, timeout=60) for part in PARTS}
            taken += [f"mirror, {part}, {who}" for part, answer in answers.items() if answer.status_code == 200]
        return taken

    assert leaks() == [], "absent"
    for way, take in WAYS.items():
        assert take(scene, registry, RIGHT), way
    assert leaks() == [], "present"
    before = len(registry.seen("/blobs/", "GET"))
    for way, take in WAYS.items():
        assert take(scene, registry, RIGHT), way
    assert len(registry.seen("/blobs/", "GET")) == before, "who has shown its rights once is not sent blobs again"
