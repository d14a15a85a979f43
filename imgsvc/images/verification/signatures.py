"""Finding what cosign attached to an image: by referrers, and by the tags it used before there were referrers.

Signatures are fetched from the image's own repository, through its mirrors and with the credentials of the pull.
What is found is hostile input: bounded in number and size, and one broken signature never hides a good one.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from typing import Final

from imgsvc.base.errors import DataLoss, ImgsvcError, InvalidArgument, ResourceExhausted
from imgsvc.base.oci import MAX_DOCUMENT, Descriptor, Manifest, parse_document
from imgsvc.base.reference import Reference
from imgsvc.images.verification import cosign
from imgsvc.images.verification.cosign import Claim
from imgsvc.images.verification.policy import Rule
from imgsvc.registry.interfaces import Credential, Fetcher, PullFailed, Registry

log = logging.getLogger(__name__)

MAX_MANIFESTS: Final = 64  # signature manifests of one image that are looked at
MAX_PAYLOADS: Final = 256  # signatures and attestations of one image that are looked at
_ABSENT: Final = ("NOT_FOUND", "UNIMPLEMENTED")


class Signatures:
    """Looks for claims about images in a registry."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    async def missing(self, reference: Reference, target: Descriptor, credential: Credential | None, rule: Rule) -> str:
        """What `rule` needs and the image does not have; "" when nothing is missing.

        Raises: PullFailed when the registry could not say, and what it did say was not enough.
        """
        needed = {"", *rule.attestations}
        trouble: list[ImgsvcError] = []
        seen = 0
        async for claim in self._claims(reference, target, credential, rule, trouble):
            seen += 1
            if rule.same_name and claim.predicate == "" and not _same_name(claim.name, reference):
                continue
            needed.discard(claim.predicate)
            if not needed:
                return ""
        if trouble:
            raise trouble[0]
        what = ["signature" if predicate == "" else f"attestation {predicate}" for predicate in sorted(needed)]
        suffix = f" made under the name {reference.name}" if seen and rule.same_name and "" in needed else ""
        return f"no {' and no '.join(what)} by {' or '.join(key.name for key in rule.keys)}{suffix}"

    async def _claims(
        self, reference: Reference, target: Descriptor, credential: Credential | None, rule: Rule, trouble: list[ImgsvcError]
    ) -> AsyncIterator[Claim]:
        fetcher = self._registry.fetcher(reference, credential)
        left = MAX_PAYLOADS
        async for manifest in self._manifests(reference, target, credential, fetcher, trouble):
            for layer in manifest.layers:
                left -= 1
                if left < 0:
                    log.warning("%s has more than %d signatures; the rest is not looked at", reference, MAX_PAYLOADS)
                    return
                if (claim := await _claim(fetcher, layer, rule, target, trouble)) is not None:
                    yield claim

    async def _manifests(
        self, reference: Reference, target: Descriptor, credential: Credential | None, fetcher: Fetcher, trouble: list[ImgsvcError]
    ) -> AsyncIterator[Manifest]:
        for suffix in ("sig", "att"):
            tag = f"{target.digest.algorithm}-{target.digest.hex}.{suffix}"
            try:
                found = await self._registry.resolve(Reference(reference.host, reference.repository, tag), credential)
            except PullFailed as error:
                if error.code not in _ABSENT:
                    trouble.append(error)
                continue
            if (manifest := await _manifest(fetcher, found.descriptor, found.document, trouble)) is not None:
                yield manifest
        try:
            referrers = await self._registry.repository(reference, credential).referrers(target.digest)
        except PullFailed as error:
            if error.code not in _ABSENT:
                trouble.append(error)
            return
        wanted = [r for r in referrers if r.artifact_type == cosign.SIGNATURE_ARTIFACT or r.artifact_type.startswith(cosign.BUNDLE_PREFIX)]
        for descriptor in wanted[:MAX_MANIFESTS]:
            manifest = await _manifest(fetcher, descriptor, None, trouble)
            if manifest is not None and manifest.subject is not None and manifest.subject.digest == target.digest:
                yield manifest


async def _manifest(fetcher: Fetcher, descriptor: Descriptor, known: bytes | None, trouble: list[ImgsvcError]) -> Manifest | None:
    try:
        data = known if known is not None else await fetcher.document(descriptor, limit=MAX_DOCUMENT)
        document = parse_document(data, descriptor.media_type, f"signature {descriptor.digest}")
    except (InvalidArgument, ResourceExhausted, DataLoss) as error:
        log.warning("unusable signature: %s", error)
        return None
    except PullFailed as error:
        trouble.append(error)
        return None
    return document if isinstance(document, Manifest) else None


async def _claim(fetcher: Fetcher, layer: Descriptor, rule: Rule, target: Descriptor, trouble: list[ImgsvcError]) -> Claim | None:
    keys = list(rule.keys)
    kind = layer.media_type
    signature = layer.annotations.get(cosign.SIGNATURE_ANNOTATION, "")
    if kind not in (cosign.SIMPLE_SIGNING, cosign.DSSE) and not kind.startswith(cosign.BUNDLE_PREFIX):
        return None
    try:
        payload = layer.data if layer.data is not None else await fetcher.document(layer, limit=cosign.MAX_PAYLOAD)
        if kind == cosign.SIMPLE_SIGNING:
            return cosign.simple_signing(payload, signature, keys, target.digest)
        return cosign.envelope(payload, keys, target.digest) if kind == cosign.DSSE else cosign.bundle(payload, keys, target.digest)
    except (InvalidArgument, ResourceExhausted, DataLoss) as error:
        log.warning("unusable signature: %s", error)
    except PullFailed as error:
        trouble.append(error)
    return None


def _same_name(name: str, reference: Reference) -> bool:
    try:
        return Reference.parse(name).name == reference.name
    except InvalidArgument:
        return False
