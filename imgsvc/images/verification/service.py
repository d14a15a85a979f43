"""Answers whether an image may be used. Implements pull.Verifier, and the check before a container is created."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable
from typing import Final

from imgsvc.base.concurrency import SingleFlight, Threads
from imgsvc.base.errors import ImgsvcError, PermissionDenied
from imgsvc.base.metadb.database import MetaDB
from imgsvc.base.oci import Descriptor
from imgsvc.base.reference import Reference
from imgsvc.images.pull import Verifier
from imgsvc.images.records import Image
from imgsvc.images.verification.policy import Decision, Policy
from imgsvc.images.verification.programs import Programs
from imgsvc.images.verification.signatures import Signatures
from imgsvc.registry.interfaces import Credential, identity

log = logging.getLogger(__name__)

TABLE: Final = "verdicts"
REASON: Final = "SignatureValidationFailed"  # what the kubelet shows as the reason


class Refused(PermissionDenied):
    """The image may not be used. digest: the one that was asked about."""

    reason = REASON

    def __init__(self, name: str, digest: str, why: str) -> None:
        super().__init__(f"{name} ({digest}) is refused: {why}", hint="see docs/verification.md, or ask who keeps [verify] of this node")
        self.digest = digest


class Unverifiable(ImgsvcError):
    """Signatures are needed but cannot be looked up. `code` is the cause's, so that callers retry what may pass."""

    reason = REASON

    def __init__(self, name: str, digest: str, cause: ImgsvcError) -> None:
        super().__init__(f"{name} ({digest}) is refused: its signatures cannot be looked up: {cause}")
        self.digest = digest
        self.code = cause.code  # type: ignore[misc]  # an instance carries the category of its cause
        self.retryable = cause.retryable  # type: ignore[misc]  # as above


class Verification:
    """Asks policy and programs, and remembers who agreed to what.

    policy: reads the policy, for every question, so that changes count at once; None when there is none.
    """

    def __init__(
        self,
        *,
        policy: Callable[[], Policy] | None,
        programs: Programs,
        signatures: Signatures,
        db: MetaDB,
        threads: Threads,
        fail_closed: bool,
    ) -> None:
        self.go_by(policy, programs, fail_closed=fail_closed)
        self._signatures = signatures
        self._db = db
        self._threads = threads
        self._flights: SingleFlight[None] = SingleFlight()

    def go_by(self, policy: Callable[[], Policy] | None, programs: Programs, *, fail_closed: bool) -> None:
        """Ask these from the next question on. Verdicts are remembered by what was asked, so that old ones do not count."""
        self._policy = policy
        self._programs = programs
        self._fail_closed = fail_closed

    async def verify(self, reference: Reference, target: Descriptor, credential: Credential | None) -> None:
        """See pull.Verifier. Raises: Refused; Unverifiable when signatures are needed and could not be looked for."""
        policy = await self._threads.run(self._policy) if self._policy else None
        fingerprint = await self._fingerprint(policy)
        # Callers with one credential share the work; a verdict that needed a secret is not had by asking without it.
        key = f"{reference.name}@{target.digest}\0{fingerprint}\0{identity(credential)}"
        await self._flights.run(key, lambda: self._decide(reference, target, credential, policy, fingerprint))

    async def check(self, image: Image) -> None:
        """Check a stored image before it is used: it must be accepted under one of its names by the current policy.

        Asks again, with the node's own credentials, where no verdict is remembered. Raises: as verify.
        """
        policy = await self._threads.run(self._policy) if self._policy else None
        if policy is None and not self._fail_closed and not await self._threads.run(self._programs.any):
            return
        fingerprint = await self._fingerprint(policy)
        names = [Reference.parse(name) for name in image.repo_digests]
        if any(self._remembers(name, fingerprint) for name in names):
            return
        refusal: ImgsvcError = Refused(image.image_id, image.manifest.digest, "none of its names was accepted")
        for name in names:
            assert name.digest is not None
            target = image.manifest if name.digest == image.manifest.digest else Descriptor("", name.digest, 0)
            try:
                await self.verify(name, target, None)
                return
            except ImgsvcError as error:
                refusal = error
        raise refusal

    async def _decide(
        self, reference: Reference, target: Descriptor, credential: Credential | None, policy: Policy | None, fingerprint: str
    ) -> None:
        name = reference.with_digest(target.digest)
        if policy is not None:
            await self._ask_policy(reference, target, credential, policy, remembered=self._remembers(name, fingerprint))
        judgement = await self._programs.judge(str(reference), target)
        if not judgement.ok:
            raise Refused(str(reference), target.digest, judgement.reason)
        if self._fail_closed and policy is None and not judgement.asked:
            raise Refused(str(reference), target.digest, "verify.fail_closed is set, and there is neither a policy nor a verifier")
        if self._fail_closed and judgement.skipped:
            raise Refused(
                str(reference), target.digest, f"max_verifiers leaves out {judgement.skipped} verifiers, and verify.fail_closed is set"
            )
        if policy is not None or judgement.asked:
            await self._remember(name, fingerprint, judgement.reason)

    async def _ask_policy(
        self, reference: Reference, target: Descriptor, credential: Credential | None, policy: Policy, *, remembered: bool
    ) -> None:
        rule = policy.rule_for(reference.name)
        if rule.decision is Decision.DENY:
            raise Refused(str(reference), target.digest, f"the policy denies it ({rule.where})")
        if rule.decision is Decision.SIGNED and not remembered:
            try:
                missing = await self._signatures.missing(reference, target, credential, rule)
            except ImgsvcError as error:
                raise Unverifiable(str(reference), target.digest, error) from error
            if missing:
                raise Refused(str(reference), target.digest, f"{missing} ({rule.where})")

    async def _fingerprint(self, policy: Policy | None) -> str:
        """A fingerprint of everything a verdict depends on besides the image."""
        programs = await self._threads.run(self._programs.fingerprint)
        text = f"{policy.fingerprint if policy else ''}\0{programs}\0{self._fail_closed}"
        return hashlib.sha256(text.encode()).hexdigest()

    def _remembers(self, name: Reference, fingerprint: str) -> bool:
        with self._db.read() as txn:
            record = txn.get(TABLE, _key(name))
        return record is not None and record["policy"] == fingerprint

    async def _remember(self, name: Reference, fingerprint: str, said: str) -> None:
        record = {"name": str(name), "policy": fingerprint, "at": time.time(), "said": said}
        await self._db.awrite(lambda txn: txn.put(TABLE, _key(name), record))


def as_verifier(verification: Verification) -> Verifier:
    """Lets mypy prove that the contract is met."""
    return verification


def _key(name: Reference) -> str:
    """One verdict per name and digest: a change of the policy replaces it, so that old ones do not pile up."""
    return hashlib.sha256(str(name).encode()).hexdigest()
