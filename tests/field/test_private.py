"""What took credentials is private, and stays so."""

from __future__ import annotations

import asyncio
from pathlib import Path

from imgsvc.concurrency import Threads
from imgsvc.metadb import MetaDB
from imgsvc.oci import Descriptor
from imgsvc.reference import Reference
from imgsvc.registry.interfaces import Credential, CredentialKind, CredentialUse
from imgsvc.verification.policy import Rule, load_policy
from imgsvc.verification.programs import Programs
from imgsvc.verification.service import Verification
from imgsvc.verification.signatures import Signatures
from tests.fakes.registry import FakeRegistry
from tests.registry.support import client_for, hosts_d
from tests.support.images import Entry, image, layer
from tests.verification.signing import Signer

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
