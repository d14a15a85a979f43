"""An NRI plugin for tests: the real protocol, scripted by the test, and a list of what it was asked.

As a program (`python -m tests.runtime.nriplugin`) it is one that a daemon starts: it sets the environment variable that its
configuration names.
"""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Self

from imgsvc.api import nri_pb2 as nri
from imgsvc.base.concurrency import in_thread
from imgsvc.base.errors import ImgsvcError, Unimplemented
from imgsvc.runtime.nri.mux import PLUGIN_SERVICE, RUNTIME_SERVICE, Multiplexer
from imgsvc.runtime.ttrpc import Client, Server

PACKAGE: Final = "nri.pkg.api.v1alpha1"
METHODS: Final = {
    method.name: (getattr(nri, method.input_type.name), getattr(nri, method.output_type.name))
    for method in nri.DESCRIPTOR.services_by_name["Plugin"].methods
}
Script = Callable[[Any], Any]  # from a request to an answer, None for an empty one; raises to refuse


class ScriptedPlugin:
    """A plugin on a thread of its own, for a `with` block."""

    def __init__(self, address: Path | socket.socket, name: str = "test", index: str = "10", *, events: int = 0, **scripts: Script) -> None:
        """scripts: by method. events: the mask it subscribes with, 0 for all."""
        self._address = address
        self._identity = (index, name)
        self._events = events
        self.scripts = scripts
        self.refused = ""
        self.unknown: set[str] = set()  # methods it does not have
        self.asked: list[tuple[str, Any]] = []
        self.ready = threading.Event()
        self.ended = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)

    def start(self) -> None:
        """Connect, without waiting for anything."""
        self._thread.start()

    def __enter__(self) -> Self:
        self.start()
        assert self.ready.wait(30), "not synchronized"
        return self

    def __exit__(self, *_: object) -> None:
        self.die()
        self._thread.join(30)

    def die(self) -> None:
        """Break the connection."""
        if not self.ended.is_set():
            self._loop.call_soon_threadsafe(self._writer.close)

    def of(self, identity: str) -> list[str]:
        """Methods it was asked for about one pod or container, in order."""
        return [method for method, request in list(self.asked) if _subject(method, request) == identity]

    def last(self, method: str) -> Any:
        """The last request of a method."""
        return [request for name, request in self.asked if name == method][-1]

    def wait_for(self, identity: str, method: str) -> None:
        """Until it was asked for a method about a pod or container."""
        end = time.monotonic() + 30
        while method not in self.of(identity):
            assert time.monotonic() < end, self.of(identity)
            time.sleep(0.01)

    def update(self, *updates: nri.ContainerUpdate, evict: tuple[nri.ContainerEviction, ...] = ()) -> nri.UpdateContainersResponse:
        """UpdateContainers, of its own accord."""
        request = nri.UpdateContainersRequest(update=updates, evict=evict)
        call = self._client.call(f"{PACKAGE}.Runtime", "UpdateContainers", request, nri.UpdateContainersResponse)
        return asyncio.run_coroutine_threadsafe(call, self._loop).result(30)

    async def _run(self) -> None:
        self._loop = asyncio.get_running_loop()
        if isinstance(self._address, Path):
            reader, self._writer = await asyncio.open_unix_connection(self._address)
        else:
            reader, self._writer = await asyncio.open_unix_connection(sock=self._address)
        mux = Multiplexer(reader, self._writer)
        runtime, plugin = mux.connections[RUNTIME_SERVICE], mux.connections[PLUGIN_SERVICE]
        self._client = Client(runtime, runtime, "", "the runtime")
        methods = {(f"{PACKAGE}.Plugin", name): self._handler(name) for name in METHODS}
        running = [asyncio.create_task(mux.run()), asyncio.create_task(Server(plugin, plugin, methods).serve())]
        request = nri.RegisterPluginRequest(plugin_idx=self._identity[0], plugin_name=self._identity[1])
        try:
            await self._client.call(f"{PACKAGE}.Runtime", "RegisterPlugin", request, nri.Empty)
            await running[0]
        except ImgsvcError as error:
            self.refused = str(error)
        finally:
            self.ended.set()
            running[1].cancel()

    def _handler(self, method: str) -> Callable[[bytes], Any]:
        kind, answer = METHODS[method]

        async def handle(payload: bytes) -> bytes:
            if method in self.unknown:
                raise Unimplemented(method)
            request = kind.FromString(payload)
            self.asked.append((method, request))
            script = self.scripts.get(method)
            made: Any = await in_thread(script, request) if script else None
            if made is None:
                made = nri.ConfigureResponse(events=self._events) if method == "Configure" else answer()
            if method == "Synchronize" and request.more:
                made.more = True
            elif method == "Synchronize":
                self._loop.call_soon(self.ready.set)
            return bytes(made.SerializeToString())

        return handle


def _subject(method: str, request: Any) -> str:
    fields = request.DESCRIPTOR.fields_by_name
    return str(request.container.id if "container" in fields else request.pod.id if "pod" in fields else "")


def adjusted(**fields: Any) -> nri.CreateContainerResponse:
    """An answer to CreateContainer."""
    return nri.CreateContainerResponse(adjust=nri.ContainerAdjustment(**fields))


def main() -> None:
    """What a daemon starts."""
    config: list[str] = []

    def configure(request: nri.ConfigureRequest) -> None:
        config.append(request.config)

    def create(request: nri.CreateContainerRequest) -> nri.CreateContainerResponse:
        return adjusted(env=[nri.KeyValue(key="FROM", value=f"{os.environ['NRI_PLUGIN_NAME']}-{config[0]}")])

    sock = socket.socket(fileno=int(os.environ["NRI_PLUGIN_SOCKET"]))
    with ScriptedPlugin(sock, Configure=configure, CreateContainer=create) as plugin:
        plugin.ended.wait()


if __name__ == "__main__":
    main()
