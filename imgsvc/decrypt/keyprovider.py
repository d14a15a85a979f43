"""Key providers: a program or a gRPC service that unwraps a layer key with keys this node never sees.

Only the provider's own parameters go to it, never private keys of the node. Everything is bounded in time and size.
Source: ocicrypt docs/keyprovider.md and its JSON protocol.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import grpc
from google.protobuf.message import DecodeError
from google.protobuf.wrappers_pb2 import BytesValue

from imgsvc.base.concurrency import CancelToken
from imgsvc.base.errors import Cancelled, ImgsvcError, InvalidArgument, printable
from imgsvc.base.oci import MIB, load_json_object
from imgsvc.base.programs import run_blocking
from imgsvc.decrypt.interfaces import KeyWrapper, NotOpened
from imgsvc.decrypt.keydir import read_bounded
from imgsvc.decrypt.keys import KeyFileError

SCHEME_PREFIX: Final = "provider."
MAX_ANSWER: Final = MIB  # [bytes]; an answer is the base64 of about 200
_METHOD: Final = "/keyprovider.KeyProviderService/UnWrapKey"


@dataclass(frozen=True, slots=True)
class GrpcTls:
    """Client side TLS of a gRPC provider. All paths are PEM files; empty means the system's roots, or no client certificate."""

    root_ca_file: str = ""
    cert_file: str = ""
    key_file: str = ""
    server_name: str = ""


@dataclass(frozen=True, slots=True)
class Provider:
    """One configured provider: a command (argv) or, when that is empty, a gRPC address `host:port` or `unix:///path`."""

    name: str
    command: tuple[str, ...] = ()
    address: str = ""
    tls: GrpcTls | None = None


def load_providers(path: Path | None) -> tuple[Provider, ...]:
    """The providers of an ocicrypt key provider configuration; none when the file is not there. Raises: InvalidArgument."""
    if path is None or not path.exists():
        return ()
    where = str(path)
    try:
        value = load_json_object(read_bounded(where), where, limit=MIB)
    except KeyFileError as error:
        raise InvalidArgument(str(error), where=where) from error
    entries = value.get("key-providers") or {}
    if not isinstance(entries, dict):
        raise InvalidArgument("key-providers is not an object", where=where)
    return tuple(_provider(name, entry, f'{where}: key provider "{printable(name, 60)}"') for name, entry in entries.items())


def _provider(name: str, entry: object, where: str) -> Provider:
    if not isinstance(entry, dict):
        raise InvalidArgument("not an object", where=where)
    command, address, tls = entry.get("cmd"), entry.get("grpc"), entry.get("grpc-tls")
    if isinstance(command, dict) and isinstance(command.get("path"), str):
        arguments = command.get("args") or []
        if not isinstance(arguments, list) or not all(isinstance(a, str) for a in arguments):
            raise InvalidArgument("cmd.args is not a list of strings", where=where)
        return Provider(name, (command["path"], *arguments))
    if isinstance(address, str) and address:
        return Provider(name, (), address, _tls(tls, where) if tls else None)
    raise InvalidArgument('neither "cmd" with a path nor "grpc"', where=where)


def _tls(value: object, where: str) -> GrpcTls:
    names = {"root-ca-file": "root_ca_file", "cert-file": "cert_file", "key-file": "key_file", "server-name": "server_name"}
    if not isinstance(value, dict) or not all(isinstance(value.get(n, ""), str) for n in names):
        raise InvalidArgument("grpc-tls is not an object of strings", where=where)
    if value.get("insecure-skip-verify"):
        raise InvalidArgument(
            "grpc-tls.insecure-skip-verify is not supported: layer keys would go to any server that answers",
            where=where,
            hint="name the server's certificate or its CA as root-ca-file, and its name as server-name",
        )
    return GrpcTls(**{field_name: value.get(name, "") for name, field_name in names.items()})


@dataclass(frozen=True, slots=True)
class ProviderWrapper:
    """Asks one provider. parameters: what the configuration gives this provider; timeout_s: per question."""

    provider: Provider
    parameters: Sequence[bytes] = field(default=(), repr=False)
    timeout_s: float = 30.0
    cancel: CancelToken | None = None

    @property
    def scheme(self) -> str:
        """See KeyWrapper."""
        return SCHEME_PREFIX + self.provider.name

    def unwrap(self, packet: bytes) -> bytes:
        """See KeyWrapper."""
        request = _request(self.provider.name, self.parameters, packet)
        try:
            answer = self._run(request) if self.provider.command else self._call(request)
            options = _options(answer)
        except Cancelled:
            raise
        except ImgsvcError as error:
            raise NotOpened(f"the key provider failed: {error}", lasting=False) from error
        if not options:
            raise NotOpened("the key provider has no key for it", lasting=False)
        return options

    def recipients(self, packet: bytes) -> list[str]:
        """Only the provider understands its packets."""
        return [f"key provider {printable(self.provider.name, 60)}"]

    def _run(self, request: bytes) -> bytes:
        done = run_blocking(self.provider.command, request, timeout_s=self.timeout_s, limit=MAX_ANSWER, cancel=self.cancel)
        if done.status:
            raise InvalidArgument(
                f"exit status {done.status}: {printable(done.said) or 'no text on stderr'}", where=self.provider.command[0]
            )
        return done.stdout

    def _call(self, request: bytes) -> bytes:
        message = BytesValue(value=request).SerializeToString()
        try:
            with _channel(self.provider) as channel:
                call = channel.unary_unary(_METHOD, request_serializer=bytes, response_deserializer=bytes)
                # A future, so that a cancelled pull does not wait for the deadline.
                future = call.future(message, timeout=self.timeout_s)
                while True:
                    try:
                        return _message(future.result(timeout=0.1))
                    except grpc.FutureTimeoutError:
                        if self.cancel:
                            self.cancel.check()
        except grpc.RpcError as error:
            status, text = error.code(), error.details()
            raise InvalidArgument(f"{status.name}: {printable(str(text))}", where=self.provider.address) from error


def wrapper(provider: Provider, parameters: Sequence[bytes], timeout_s: float, cancel: CancelToken | None) -> KeyWrapper:
    """The wrapper, as its protocol."""
    return ProviderWrapper(provider, parameters, timeout_s, cancel)


def _channel(provider: Provider) -> grpc.Channel:
    """Raises: InvalidArgument when a TLS file cannot be read."""
    options: list[tuple[str, Any]] = [("grpc.max_receive_message_length", MAX_ANSWER), ("grpc.enable_http_proxy", 0)]
    if provider.tls is None:
        return grpc.insecure_channel(provider.address, options=options)
    if provider.tls.server_name:
        options.append(("grpc.ssl_target_name_override", provider.tls.server_name))
    try:
        root, key, certificate = (
            read_bounded(name) if name else None for name in (provider.tls.root_ca_file, provider.tls.key_file, provider.tls.cert_file)
        )
    except KeyFileError as error:
        raise InvalidArgument(f"TLS file: {error}", where=provider.address) from error
    return grpc.secure_channel(provider.address, grpc.ssl_channel_credentials(root, key, certificate), options=options)


def _request(name: str, parameters: Sequence[bytes], packet: bytes) -> bytes:
    given = {name: [base64.b64encode(p).decode() for p in parameters]} if parameters else {}
    return json.dumps(
        {
            "op": "keyunwrap",
            "keywrapparams": {"ec": None, "optsdata": None},
            "keyunwrapparams": {"dc": {"Parameters": given}, "annotation": base64.b64encode(packet).decode()},
        }
    ).encode()


def _options(answer: bytes) -> bytes:
    """The private options of an answer; empty when it says nothing. Raises: InvalidArgument without quoting the answer."""
    try:
        results = load_json_object(answer, "answer", limit=MAX_ANSWER).get("keyunwrapresults")
        text = results.get("optsdata") if isinstance(results, dict) else None
        return base64.b64decode(text, validate=True) if isinstance(text, str) else b""
    except (ImgsvcError, ValueError) as error:
        raise InvalidArgument("its answer is not the JSON of the key provider protocol") from error.with_traceback(None)


def _message(data: bytes) -> bytes:
    """The JSON in a message of the service: each has one field, number 1, bytes, which is also what BytesValue is."""
    try:
        return BytesValue.FromString(data).value
    except DecodeError as error:
        raise InvalidArgument("its answer is not a message of the key provider protocol") from error
