"""One NRI plugin: how it registers, what it is asked, and how long it may take."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any, Final

from google.protobuf.message import DecodeError

from imgsvc import __version__
from imgsvc.api import nri_pb2 as nri
from imgsvc.base.concurrency import stop_tasks, time_limit
from imgsvc.base.errors import DataLoss, DeadlineExceeded, FailedPrecondition, ImgsvcError, InvalidArgument, Unimplemented, printable
from imgsvc.runtime.nri.messages import batches, is_index
from imgsvc.runtime.nri.mux import PLUGIN_SERVICE, RUNTIME_SERVICE, Multiplexer
from imgsvc.runtime.settings import NriSettings
from imgsvc.runtime.ttrpc import MAX_FRAME, Client, Server

log = logging.getLogger(__name__)

_PACKAGE: Final = "nri.pkg.api.v1alpha1"
VERSION: Final = "v0.12.5"  # of containerd/nri, whose messages these are
_RUNTIME_NAME: Final = "imgsvc"
_MAX_BATCH: Final = MAX_FRAME * 3 // 4
_ALL_EVENTS: Final = (1 << (nri.EVENT_LAST - 1)) - 1
_SHUTDOWN_S: Final = 1.0
_MAX_NAME: Final = 64

_REQUESTS: Final[dict[int, tuple[str, Any]]] = {
    nri.EVENT_RUN_POD_SANDBOX: ("RunPodSandbox", nri.RunPodSandboxResponse),
    nri.EVENT_STOP_POD_SANDBOX: ("StopPodSandbox", nri.StopPodSandboxResponse),
    nri.EVENT_REMOVE_POD_SANDBOX: ("RemovePodSandbox", nri.RemovePodSandboxResponse),
    nri.EVENT_CREATE_CONTAINER: ("CreateContainer", nri.CreateContainerResponse),
    nri.EVENT_POST_CREATE_CONTAINER: ("PostCreateContainer", nri.PostCreateContainerResponse),
    nri.EVENT_START_CONTAINER: ("StartContainer", nri.StartContainerResponse),
    nri.EVENT_POST_START_CONTAINER: ("PostStartContainer", nri.PostStartContainerResponse),
    nri.EVENT_UPDATE_CONTAINER: ("UpdateContainer", nri.UpdateContainerResponse),
    nri.EVENT_POST_UPDATE_CONTAINER: ("PostUpdateContainer", nri.PostUpdateContainerResponse),
    nri.EVENT_STOP_CONTAINER: ("StopContainer", nri.StopContainerResponse),
    nri.EVENT_REMOVE_CONTAINER: ("RemoveContainer", nri.RemoveContainerResponse),
    nri.EVENT_UPDATE_POD_SANDBOX: ("UpdatePodSandbox", nri.UpdatePodSandboxResponse),
    nri.EVENT_POST_UPDATE_POD_SANDBOX: ("PostUpdatePodSandbox", nri.PostUpdatePodSandboxResponse),
    nri.EVENT_VALIDATE_CONTAINER_ADJUSTMENT: ("ValidateContainerAdjustment", nri.ValidateContainerAdjustmentResponse),
}
# Requests that have always had a method of their own; of the others, plugins of before NRI 0.12 hear by StateChange.
_ALWAYS: Final = {
    nri.EVENT_CREATE_CONTAINER,
    nri.EVENT_UPDATE_CONTAINER,
    nri.EVENT_STOP_CONTAINER,
    nri.EVENT_UPDATE_POD_SANDBOX,
    nri.EVENT_VALIDATE_CONTAINER_ADJUSTMENT,
}

Change = Callable[[nri.UpdateContainersRequest, str], Awaitable[nri.UpdateContainersResponse]]


class Plugin:
    """One connection. Belongs to the event loop."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        settings: NriSettings,
        change: Change,
        *,
        identity: tuple[str, str] | None = None,
        config: str = "",
    ) -> None:
        """change: carries out UpdateContainers. identity: (index, name) of one that we have started, with its configuration."""
        self.index, self.base = identity or ("", "")
        self._installed = identity is not None
        self._settings = settings
        self._config = config
        self._change = change
        self._events = 0
        self._old: set[int] = set()  # events it wants by StateChange
        self._registered: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        mux = Multiplexer(reader, writer)
        self._client = Client(mux.connections[PLUGIN_SERVICE], mux.connections[PLUGIN_SERVICE], "", "the NRI plugin")
        runtime = mux.connections[RUNTIME_SERVICE]
        methods = {
            (f"{_PACKAGE}.Runtime", "RegisterPlugin"): self._register,
            (f"{_PACKAGE}.Runtime", "UpdateContainers"): self._update_containers,
        }
        self._server = asyncio.create_task(self._serve(Server(runtime, runtime, methods)), name="nri-runtime")
        self._mux = asyncio.create_task(mux.run(), name="nri-mux")
        self.closed = self._client.closed

    @property
    def name(self) -> str:
        """INDEX-NAME."""
        return f"{self.index}-{self.base}"

    def wants(self, event: int) -> bool:
        """Whether it is still there and has subscribed to an event."""
        return not self.closed.is_set() and bool(self._events & (1 << (event - 1)))

    def describe(self) -> dict[str, Any]:
        """For Status(verbose)."""
        events = [_REQUESTS[event][0] for event in _REQUESTS if self._events & (1 << (event - 1))]
        return {"name": self.name, "installed": self._installed, "events": events}

    async def start(self) -> None:
        """Wait until it has registered, and configure it. Raises: DeadlineExceeded, Unavailable, InvalidArgument."""
        settings = self._settings
        try:
            async with time_limit(settings.plugin_registration_timeout):
                await self._registered
        except TimeoutError as error:
            raise DeadlineExceeded(f"it did not register within {settings.plugin_registration_timeout:g} s") from error
        self._client.peer = f"NRI plugin {self.name}"
        answer = await self._call(
            "Configure",
            nri.ConfigureRequest(
                config=self._config,
                runtime_name=_RUNTIME_NAME,
                runtime_version=__version__,
                registration_timeout=int(settings.plugin_registration_timeout * 1000),
                request_timeout=int(settings.plugin_request_timeout * 1000),
                nri_version=VERSION,
            ),
            nri.ConfigureResponse,
        )
        if answer.events & ~_ALL_EVENTS:
            raise InvalidArgument(f"it subscribes to events that there are none of: {answer.events & ~_ALL_EVENTS:#x}")
        self._events = answer.events or _ALL_EVENTS

    async def synchronize(self, pods: list[nri.PodSandbox], containers: list[nri.Container]) -> list[nri.ContainerUpdate]:
        """Tell it what there is; what it changes of that. Raises: DeadlineExceeded, Unavailable, what it answers."""
        parts = batches(pods, containers, _MAX_BATCH)
        updates: list[nri.ContainerUpdate] = []
        for number, (some_pods, some_containers) in enumerate(parts, 1):
            request = nri.SynchronizeRequest(pods=some_pods, containers=some_containers, more=number < len(parts))
            limit = self._settings.plugin_registration_timeout
            answer = await self._call("Synchronize", request, nri.SynchronizeResponse, timeout_s=limit)
            if request.more and not answer.more:
                raise FailedPrecondition("it cannot be told of pods in several messages, and one would be too long")
            updates += answer.update
        return updates

    async def ask(self, event: int, request: Any) -> Any:
        """Its answer to a request; None when it is dropped, because it does not answer or has gone.

        Raises: what it answers as an error.
        """
        try:
            return await self._ask(event, request)
        except (DeadlineExceeded, DataLoss) as error:
            self.drop(str(error))
        except ImgsvcError as error:
            if not self.closed.is_set():
                raise
            self.drop(str(error))
        return None

    async def _ask(self, event: int, request: Any) -> Any:
        method, answer = _REQUESTS[event]
        if event not in self._old:
            try:
                return await self._call(method, request, answer)
            except Unimplemented:
                if event in _ALWAYS:
                    raise
                self._old.add(event)
        change = nri.StateChangeEvent(event=nri.Event.ValueType(event), pod=request.pod)
        if "container" in request.DESCRIPTOR.fields_by_name:
            change.container.CopyFrom(request.container)
        await self._call("StateChange", change, nri.Empty)
        return answer()

    async def _call(self, method: str, request: Any, answer: Any, *, timeout_s: float = 0.0) -> Any:
        limit = timeout_s or self._settings.plugin_request_timeout
        return await self._client.call(f"{_PACKAGE}.Plugin", method, request, answer, timeout_s=limit)

    def drop(self, reason: str) -> None:
        """Ask it nothing any more."""
        log.warning("NRI plugin %s is dropped: %s", self.name if self.base else "that never registered", reason)
        self._events = 0
        self._server.cancel()
        self._mux.cancel()
        self.closed.set()

    async def close(self) -> None:
        """Say goodbye, and end the connection."""
        if not self.closed.is_set() and self._events:
            try:
                async with time_limit(_SHUTDOWN_S):
                    await self._call("Shutdown", nri.Empty(), nri.Empty)
            except (ImgsvcError, TimeoutError) as error:
                log.debug("NRI plugin %s did not say goodbye: %s", self.name, error)
        self._events = 0
        await stop_tasks(self._server, self._mux)
        await self._client.close()

    async def _serve(self, server: Server) -> None:
        try:
            await server.serve()
        except DataLoss as error:
            self.drop(str(error))
        if not self._registered.done():
            self._registered.set_exception(FailedPrecondition("it closed the connection before it had registered"))

    async def _register(self, payload: bytes) -> bytes:
        request = _read(nri.RegisterPluginRequest, payload)
        if self._registered.done():
            raise FailedPrecondition("this connection has a plugin already")
        if not self._installed:
            if not is_index(request.plugin_idx):
                raise self._refused(f'"{printable(request.plugin_idx, 40)}" is not an index of a plugin, which has two digits')
            if not request.plugin_name or len(request.plugin_name) > _MAX_NAME or not request.plugin_name.isprintable():
                raise self._refused(f'"{printable(request.plugin_name, _MAX_NAME)}" is not a name of a plugin')
            self.index, self.base = request.plugin_idx, request.plugin_name
        self._registered.set_result(None)
        return b""

    def _refused(self, reason: str) -> InvalidArgument:
        error = InvalidArgument(reason)
        self._registered.set_exception(error)
        return error

    async def _update_containers(self, payload: bytes) -> bytes:
        if not self._events:
            raise FailedPrecondition("register first")
        return (await self._change(_read(nri.UpdateContainersRequest, payload), self.name)).SerializeToString()


def _read(kind: Any, payload: bytes) -> Any:
    try:
        return kind.FromString(payload)
    except DecodeError as error:
        raise InvalidArgument("the request cannot be read") from error
