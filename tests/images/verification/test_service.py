"""The whole question: policy, signatures in a registry, programs, remembered verdicts (C-E4, C-E5)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from imgsvc.base.concurrency import Threads
from imgsvc.base.errors import ImgsvcError, InvalidArgument
from imgsvc.base.metadb.database import MetaDB
from imgsvc.base.oci import Descriptor, Digest, Manifest, parse_config, parse_document
from imgsvc.base.reference import Reference
from imgsvc.images.records import build_image
from imgsvc.images.verification.policy import load_policy
from imgsvc.images.verification.programs import Programs
from imgsvc.images.verification.service import Refused, Unverifiable, Verification
from imgsvc.images.verification.signatures import Signatures
from imgsvc.registry.client import RegistryClient, RegistrySettings
from imgsvc.registry.interfaces import PullFailed
from tests.images.verification.signing import Signer, attachment, refer, tag_for
from tests.support.images import BuiltDocument, Entry, image, layer
from tests.support.registries import ScriptedRegistry, free_port

SLSA = "https://slsa.dev/provenance/v1"


def app(content: bytes = b"one") -> BuiltDocument:
    return image([layer([Entry("f", content)])])


def target(document: BuiltDocument) -> Descriptor:
    return Descriptor(document.media_type, document.digest, len(document.data))


@dataclass(slots=True)
class Node:
    """What one verification is made of."""

    directory: Path
    registry: ScriptedRegistry
    signer: Signer

    @property
    def reference(self) -> Reference:
        return Reference.parse(f"{self.registry.address}/app:1")

    def write(self, decision: str = "signed", extra: str = "", default: str = "deny") -> None:
        """A policy for the registry."""
        (self.directory / "k.pub").write_bytes(self.signer.pem)
        keys = 'keys = ["k.pub"]\n' if decision == "signed" else ""
        rule = f'[[rule]]\nprefix = "{self.registry.address}"\ndecision = "{decision}"\n{keys}{extra}'
        (self.directory / "policy.toml").write_text(f'version = 1\ndefault = "{default}"\n{rule}')

    @asynccontextmanager
    async def verification(self, *, fail_closed: bool = False) -> AsyncIterator[Verification]:
        threads, db = Threads(2, "test"), MetaDB(self.directory / "db", sync=False)
        client = RegistryClient(RegistrySettings(roots=(str(self.directory / "hosts.d"),), environ={}))
        file = self.directory / "policy.toml"
        try:
            yield Verification(
                policy=(lambda: load_policy(file)) if file.exists() else None,
                programs=Programs(self.directory / "bin", 10, 10.0, threads),
                signatures=Signatures(client),
                db=db,
                threads=threads,
                fail_closed=fail_closed,
            )
        finally:
            await client.close()
            db.close()
            threads.close()

    def ask(self, document: BuiltDocument, *, fail_closed: bool = False, reference: Reference | None = None) -> ImgsvcError | None:
        """The refusal, None when the image may be used."""

        async def run() -> ImgsvcError | None:
            async with self.verification(fail_closed=fail_closed) as verification:
                try:
                    await verification.verify(reference or self.reference, target(document), None)
                except ImgsvcError as error:
                    return error
                return None

        return asyncio.run(run())


@pytest.fixture
def node(tmp_path: Path, scripted: ScriptedRegistry) -> Node:
    return Node(tmp_path, scripted, Signer())


def test_a_signature_under_its_tag(node: Node) -> None:
    node.write()
    node.registry.serve(node.signer.signature(app().digest), "app", tag_for(app().digest, "sig"))

    assert node.ask(app()) is None


def test_a_signature_by_referrers(node: Node) -> None:
    node.write()
    refer(node.registry, "app", app(), node.signer.bundle(app()))

    assert node.ask(app()) is None


@pytest.mark.parametrize("break_it", ["unsigned", "stripped", "other key", "moved tag", "other image's", "attestation only"])
def test_c_e5_what_is_not_signed_is_refused_with_the_reason_the_kubelet_shows(node: Node, break_it: str) -> None:
    node.write()
    signature, tag = node.signer.signature(app().digest), tag_for(app().digest, "sig")
    wanted = app()
    match break_it:
        case "other key":
            node.registry.serve(Signer().signature(app().digest), "app", tag)
        case "stripped":
            node.registry.serve(attachment("application/vnd.oci.image.layer.v1.tar", b""), "app", tag)
        case "moved tag":
            node.registry.serve(signature, "app", tag)
            wanted = app(b"another")
        case "other image's":
            node.registry.serve(node.signer.signature(app(b"another").digest), "app", tag)
        case "attestation only":
            refer(node.registry, "app", app(), node.signer.bundle(app(), SLSA))

    refusal = node.ask(wanted)

    assert isinstance(refusal, Refused)
    assert refusal.code == "PERMISSION_DENIED"
    assert refusal.reason == "SignatureValidationFailed"


def test_attestations_are_needed_on_top(node: Node) -> None:
    node.write(extra=f'attestations = ["{SLSA}"]\n')
    node.registry.serve(node.signer.signature(app().digest), "app", tag_for(app().digest, "sig"))

    refusal = node.ask(app())
    assert refusal is not None
    assert SLSA in str(refusal)

    refer(node.registry, "app", app(), Signer().bundle(app(), SLSA), node.signer.bundle(app(), SLSA))
    assert node.ask(app()) is None


def test_one_broken_signature_does_not_hide_a_good_one(node: Node) -> None:
    node.write()
    tag = tag_for(app().digest, "sig")
    node.registry.answers[f"/v2/app/manifests/{tag}"] = ("application/vnd.oci.image.manifest.v1+json", b"{nonsense")
    refer(node.registry, "app", app(), Signer().bundle(app()), node.signer.bundle(app()))

    assert node.ask(app()) is None


def test_a_referrer_counts_only_for_its_own_subject(node: Node) -> None:
    node.write()
    stranger = node.signer.bundle(app(b"another"))
    refer(node.registry, "app", app(), stranger)

    assert isinstance(node.ask(app()), Refused)


def test_the_name_it_was_signed_under_can_be_asked_for(node: Node) -> None:
    node.write(extra="same_name = true\n")
    tag = tag_for(app().digest, "sig")
    node.registry.serve(node.signer.signature(app().digest, f"{node.registry.address}/other"), "app", tag)
    assert isinstance(node.ask(app()), Refused)

    node.registry.serve(node.signer.signature(app().digest, f"{node.registry.address}/app"), "app", tag)
    assert node.ask(app()) is None


def test_rules_default_and_fail_closed(node: Node) -> None:
    elsewhere = Reference.parse("docker.io/library/app")
    assert node.ask(app()) is None
    assert isinstance(node.ask(app(), fail_closed=True), Refused)

    node.write("allow")
    assert node.ask(app(), fail_closed=True) is None
    assert isinstance(node.ask(app(), reference=elsewhere), Refused)

    node.write("deny", default="allow")
    assert isinstance(node.ask(app()), Refused)
    assert node.ask(app(), reference=elsewhere) is None


def test_a_broken_policy_refuses_everything(node: Node) -> None:
    (node.directory / "policy.toml").write_text('version = 1\ndefault = "alow"\n')

    assert isinstance(node.ask(app()), InvalidArgument)


def test_a_registry_that_cannot_be_asked_refuses(node: Node) -> None:
    node.write()
    gone = Reference.parse(f"127.0.0.1:{free_port()}/app:1")
    (node.directory / "policy.toml").write_text(
        f'version = 1\ndefault = "deny"\n[[rule]]\nprefix = "{gone.host}"\ndecision = "signed"\nkeys = ["k.pub"]\n'
    )

    refusal = node.ask(app(), reference=gone)

    assert isinstance(refusal, Unverifiable)
    assert (refusal.reason, refusal.code, refusal.retryable) == ("SignatureValidationFailed", "UNAVAILABLE", True)
    assert str(refusal.__cause__) in str(refusal)
    assert isinstance(refusal.__cause__, PullFailed)


def test_c_e4_programs_and_policy_both_have_to_agree(node: Node) -> None:
    node.write("allow")
    (node.directory / "bin").mkdir()
    verifier = node.directory / "bin" / "v"
    verifier.write_text("#!/bin/sh\necho no; exit 1\n")
    verifier.chmod(0o755)

    refusal = node.ask(app())

    assert isinstance(refusal, Refused)
    assert "v refused it (exit code 1): no" in str(refusal)


def stored(document: BuiltDocument, *names: str) -> Any:
    """An image record as a pull leaves it."""
    manifest = parse_document(document.data, document.media_type, "test")
    assert isinstance(manifest, Manifest)
    config = parse_config(document.blobs[manifest.config.digest], "test")
    from dataclasses import replace

    record = build_image(
        target(document), manifest, config, ["s"] * len(manifest.layers), [False] * len(manifest.layers), [], {}, artifact=False
    )
    return replace(record, repo_digests=names)


def test_c_e5_a_ready_image_starts_without_network_until_the_policy_changes(node: Node) -> None:
    node.write()
    node.registry.serve(node.signer.signature(app().digest), "app", tag_for(app().digest, "sig"))
    record = stored(app(), str(node.reference.with_digest(app().digest)))

    async def check() -> ImgsvcError | None:
        async with node.verification() as verification:
            try:
                await verification.check(record)
            except ImgsvcError as error:
                return error
            return None

    assert node.ask(app()) is None
    node.registry.answers.clear()
    node.registry.requests.clear()
    assert asyncio.run(check()) is None
    assert node.registry.requests == []

    node.signer = Signer()
    node.write()
    assert isinstance(asyncio.run(check()), Refused)


def test_c_e5_an_image_nobody_vouched_for_does_not_start(node: Node) -> None:
    node.write()
    record = stored(app(), str(node.reference.with_digest(app().digest)))

    async def check() -> None:
        async with node.verification() as verification:
            await verification.check(record)

    with pytest.raises(Refused):
        asyncio.run(check())


def test_without_policy_and_programs_nothing_is_asked(node: Node) -> None:
    record = stored(app())

    async def check() -> None:
        async with node.verification() as verification:
            await verification.check(record)

    asyncio.run(check())
    assert Digest.of(app().data) == record.manifest.digest
    assert node.registry.requests == []
