"""LayerDecryptor: keys, schemes, verdicts and stream processors behind the Decryptor protocol."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from imgsvc.base.concurrency import CancelToken, SingleFlight, Threads, in_thread
from imgsvc.base.errors import FailedPrecondition, ImgsvcError, Unimplemented
from imgsvc.base.oci import Descriptor
from imgsvc.decrypt import jwe, keyprovider, pgp, pkcs7, pkcs11
from imgsvc.decrypt.aesctr import pack_secret
from imgsvc.decrypt.authorise import Verdicts, chain_fingerprint, key_fingerprint, question
from imgsvc.decrypt.external import start_chain
from imgsvc.decrypt.interfaces import ChainRun, Decryptor, KeyMissing, KeyWrapper, LayerKey, Recipient
from imgsvc.decrypt.keydir import KeyDirectory, signature, tree_signature
from imgsvc.decrypt.keys import KeyRing
from imgsvc.decrypt.packets import is_encrypted, plain_type
from imgsvc.decrypt.processors import Chain, Processor, check_processors, plan_chain
from imgsvc.decrypt.unwrap import layer_recipients, unwrap_layer

NODE: Final = "node"  # the key model: keys belong to the node
_OUTSIDE: Final = ("pkcs11", keyprovider.SCHEME_PREFIX)  # schemes whose keys this node does not hold
_HELPERS: Final = 8  # unwrappings at once; each may wait for a token or a key provider


@dataclass(frozen=True, slots=True)
class Settings:
    """How layers are decrypted.

    keys_path: directory (or one file) of private keys. password_files: key file, relative to keys_path -> its passphrase's file.
    key_model: "node", or "" for no decryption by imgsvc and no payload for stream processors.
    keyprovider_config, ocicrypt_config: what OCICRYPT_KEYPROVIDER_CONFIG and OCICRYPT_CONFIG name.
    provider_parameters: key provider -> parameters it is sent.
    """

    keys_path: Path | None
    salt: bytes = field(repr=False)
    key_model: str = NODE
    password_files: Mapping[str, Path] = field(default_factory=dict)
    keyprovider_config: Path | None = None
    ocicrypt_config: str = ""
    provider_parameters: Mapping[str, tuple[bytes, ...]] = field(default_factory=dict, repr=False)
    helper_timeout_s: float = 30.0
    processors: tuple[Processor, ...] = ()


def build_wrappers(
    ring: KeyRing,
    *,
    keyprovider_config: Path | None,
    ocicrypt_config: str,
    provider_parameters: Mapping[str, Sequence[bytes]],
    timeout_s: float,
    cancel: CancelToken | None = None,
) -> tuple[list[KeyWrapper], str]:
    """Every scheme with the keys at hand, cheap ones first; and what is wrong with the key providers' configuration.

    Trouble there is a reason among others when nothing opens; it never hides a key that does. Blocking.
    """
    providers: tuple[keyprovider.Provider, ...] = ()
    problem = ""
    try:
        providers = keyprovider.load_providers(keyprovider_config)
    except ImgsvcError as error:
        problem = str(error)
    wrappers = [jwe.wrapper(ring), pkcs7.wrapper(ring), pgp.wrapper(ring), pkcs11.wrapper(ring, ocicrypt_config, timeout_s, cancel)]
    wrappers += [keyprovider.wrapper(p, provider_parameters.get(p.name, ()), timeout_s, cancel) for p in providers]
    return wrappers, problem


def key_hint(ring: KeyRing) -> str:
    """Where keys are expected, and which files there gave none."""
    if not ring.source:
        return "no directory of decryption keys is configured ([decrypt] keys_path)"
    skipped = f"; skipped there: {', '.join(ring.skipped[:8])}" if ring.skipped else ""
    return f"put a private key of one of these recipients into {ring.source} (keys there now: {len(ring)}{skipped})"


class LayerDecryptor:
    """The node's decryption. Belongs to one event loop; blocking work hops to threads here. Raises InvalidArgument when built
    with a table of processors that cannot work.
    """

    def __init__(self, settings: Settings, environment: Mapping[str, str] | None = None) -> None:
        check_processors(settings.processors)
        self._settings = settings
        self._environment = dict(os.environ if environment is None else environment)
        self._directory = KeyDirectory(settings.keys_path, settings.password_files)
        self._verdicts = Verdicts()
        self._flights: SingleFlight[LayerKey] = SingleFlight()
        # Of its own: key providers that hang must not use up the shared pool.
        self._threads = Threads(_HELPERS, "decrypt")

    def encrypted(self, descriptor: Descriptor) -> bool:
        """See Decryptor."""
        return is_encrypted(descriptor.media_type)

    def processed(self, descriptor: Descriptor) -> bool:
        """See Decryptor."""
        return bool(self._chain(descriptor).steps)

    async def unwrap(self, descriptor: Descriptor) -> LayerKey:
        """See Decryptor."""
        chain = self._chain(descriptor)
        if chain.steps:
            return await in_thread(self._processor_key, chain, descriptor)
        if self._settings.key_model != NODE:
            raise Unimplemented(
                f'no decoder for "{descriptor.media_type}": decryption is switched off',
                where=f"encrypted layer {descriptor.digest}",
                hint='set [decrypt] key_model = "node", or configure a stream processor for the type',
            )
        asked = question(descriptor)
        ring, generation = await in_thread(self._state)
        known = self._verdicts.get(asked, generation)
        if known is None:
            known = await self._flights.run(f"{asked} {generation}", lambda: self._unwrap(descriptor, asked, ring, generation))
        if isinstance(known, KeyMissing):
            raise KeyMissing(known.digest, known.trials, hint=known.hint, lasting=True)
        return known

    async def open_chain(self, descriptor: Descriptor, source: int) -> ChainRun:
        """See Decryptor."""
        chain = self._chain(descriptor)
        if not chain.steps:
            raise FailedPrecondition(f'no stream processor accepts "{descriptor.media_type}"', where=f"layer {descriptor.digest}")
        node = self._settings.key_model == NODE
        return await start_chain(chain, descriptor, source, send_payload=node, environment=self._environment)

    def recipients(self, descriptor: Descriptor) -> list[Recipient]:
        """See Decryptor."""
        return recipients(descriptor)

    async def close(self) -> None:
        """See Decryptor."""
        self._threads.close(wait=False)

    def _chain(self, descriptor: Descriptor) -> Chain:
        return plan_chain(self._settings.processors, descriptor.media_type)

    def _state(self) -> tuple[KeyRing, object]:
        """The keys, and all a verdict depends on. Blocking."""
        settings = self._settings
        ring, generation = self._directory.load()
        files = [str(settings.keyprovider_config or ""), settings.ocicrypt_config]
        return ring, (generation, *(signature(name) for name in files if name))

    async def _unwrap(self, descriptor: Descriptor, asked: str, ring: KeyRing, generation: object) -> LayerKey:
        """One run for all callers that ask at once. The last caller to leave cancels it, with the helper programs it started."""
        cancel = CancelToken()
        return await self._threads.run_cancellable(cancel, self._decide, descriptor, asked, ring, generation, cancel)

    def _decide(self, descriptor: Descriptor, asked: str, ring: KeyRing, generation: object, cancel: CancelToken) -> LayerKey:
        settings = self._settings
        wrappers, problem = build_wrappers(
            ring,
            keyprovider_config=settings.keyprovider_config,
            ocicrypt_config=settings.ocicrypt_config,
            provider_parameters=settings.provider_parameters,
            timeout_s=settings.helper_timeout_s,
            cancel=cancel,
        )
        try:
            found = unwrap_layer(descriptor, wrappers, hint=key_hint(ring), provider_problem=problem)
        except KeyMissing as error:
            self._verdicts.put(asked, generation, error, lasting=error.lasting)
            raise
        fingerprint = key_fingerprint(settings.salt, found.options)
        key = LayerKey(pack_secret(found.options), fingerprint, found.scheme, plain_type(descriptor.media_type))
        self._verdicts.put(asked, generation, key, lasting=not found.scheme.startswith(_OUTSIDE))
        return key

    def _processor_key(self, chain: Chain, descriptor: Descriptor) -> LayerKey:
        """Authorisation to run the chain. What it can open is known only when it runs, so its fingerprint covers what it depends on:
        the programs, and every file or directory its arguments and environment name (a key directory, say). Blocking.
        """
        names: list[str] = []
        for step in chain.steps:
            entry = step.processor
            values = [entry.path, *entry.args, *entry.env]
            names += [text for value in values for text in (value, value.rpartition("=")[2]) if text.startswith("/")]
        state = [[s.processor.id, s.processor.path, s.processor.args, s.processor.env] for s in chain.steps]
        files = [tree_signature(name) for name in dict.fromkeys(names)]
        text = json.dumps([question(descriptor), state, files])
        scheme = f"stream processor {chain.steps[0].processor.id}"
        return LayerKey(None, chain_fingerprint(self._settings.salt, text), scheme, chain.result)


def recipients(descriptor: Descriptor) -> list[Recipient]:
    """See Decryptor.recipients; needs no decryptor. Empty for a plain layer."""
    if not is_encrypted(descriptor.media_type):
        return []
    none = KeyRing()
    wrappers = [jwe.wrapper(none), pkcs7.wrapper(none), pgp.wrapper(none), pkcs11.wrapper(none, "", 0, None)]
    return layer_recipients(descriptor, wrappers)


def layer_decryptor(settings: Settings) -> Decryptor:
    """The decryptor, as its protocol."""
    return LayerDecryptor(settings)
