"""Key providers of the tests, a command and a gRPC server. A packet of theirs is the options, reversed."""

from __future__ import annotations

import base64
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from google.protobuf.wrappers_pb2 import BytesValue

# Writes the request it got into the file named by its argument.
COMMAND = """
import base64, json, sys
request = json.load(sys.stdin)
json.dump(request, open(sys.argv[1], "w"))
packet = base64.b64decode(request["keyunwrapparams"]["annotation"])
print(json.dumps({"keyunwrapresults": {"optsdata": base64.b64encode(packet[::-1]).decode()}}))
"""


class Server:
    """A key provider service; `behave` answers the request's JSON."""

    def __init__(self, behave: Any, credentials: grpc.ServerCredentials | None = None) -> None:
        self.requests: list[dict[str, Any]] = []
        self.release = threading.Event()
        self._behave = behave
        self._server = grpc.server(ThreadPoolExecutor(2))
        method = grpc.unary_unary_rpc_method_handler(self._unwrap)
        handler = grpc.method_handlers_generic_handler("keyprovider.KeyProviderService", {"UnWrapKey": method})
        self._server.add_generic_rpc_handlers((handler,))
        port = self._server.add_secure_port("localhost:0", credentials) if credentials else self._server.add_insecure_port("localhost:0")
        self.address = f"localhost:{port}"
        self._server.start()

    def _unwrap(self, message: bytes, context: grpc.ServicerContext) -> bytes:
        request = json.loads(BytesValue.FromString(message).value)
        self.requests.append(request)
        return bytes(self._behave(self, request, context))

    def stop(self) -> None:
        self.release.set()
        self._server.stop(0).wait()


def reverse(_server: Server, request: dict[str, Any], _context: grpc.ServicerContext) -> bytes:
    packet = base64.b64decode(request["keyunwrapparams"]["annotation"])
    value = {"keyunwrapresults": {"optsdata": base64.b64encode(packet[::-1]).decode()}}
    return BytesValue(value=json.dumps(value).encode()).SerializeToString()
