"""The connections of one handler to its shims: one for each, opened when it is needed and again after a break."""

from __future__ import annotations

from typing import Any, Final, TypeVar

from imgsvc.runtime.handlers.shim.bootstrap import NAMESPACE, Endpoint
from imgsvc.runtime.ttrpc import Client

R = TypeVar("R")

CALL_TIMEOUT_S: Final = 120.0
_TASKS: Final = {2: "containerd.task.v2.Task", 3: "containerd.task.v3.Task"}
_SANDBOX: Final = "containerd.runtime.sandbox.v1.Sandbox"


class Connections:
    """Calls to shims by their endpoint. Belongs to the event loop."""

    def __init__(self) -> None:
        self._clients: dict[str, Client] = {}

    async def task(self, endpoint: Endpoint, method: str, request: Any, answer: type[R], *, timeout_s: float | None = CALL_TIMEOUT_S) -> R:
        """One call of the task service, in the version the shim speaks. Raises: see Client.call."""
        client = await self.client(endpoint)
        return await client.call(_TASKS[endpoint.version], method, request, answer, timeout_s=timeout_s)

    async def sandbox(
        self, endpoint: Endpoint, method: str, request: Any, answer: type[R], *, timeout_s: float | None = CALL_TIMEOUT_S
    ) -> R:
        """One call of the sandbox service. Raises: Unimplemented (most shims have none); see Client.call."""
        client = await self.client(endpoint)
        return await client.call(_SANDBOX, method, request, answer, timeout_s=timeout_s)

    async def client(self, endpoint: Endpoint) -> Client:
        """The open connection to a shim. Raises: Unavailable (the socket has no listener)."""
        client = self._clients.get(endpoint.address)
        if client is None or client.closed.is_set():
            client = await Client.connect(endpoint.address, NAMESPACE)
            for address in [a for a, c in self._clients.items() if c.closed.is_set()]:
                del self._clients[address]
            self._clients[endpoint.address] = client
        return client

    async def close(self) -> None:
        """Close all of them; the shims stay."""
        for client in self._clients.values():
            await client.close()
