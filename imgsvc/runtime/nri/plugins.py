"""All NRI plugins: those that connect, those that are started with the daemon, and whose turn it is."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

from imgsvc.api import nri_pb2 as nri
from imgsvc.base.concurrency import all_of, ended, in_thread, stop_tasks
from imgsvc.base.errors import FailedPrecondition, ImgsvcError, printable
from imgsvc.base.programs import SAFE_PATH, kill_group, started_whole
from imgsvc.runtime.nri.messages import plugin_name
from imgsvc.runtime.nri.plugin import Change, Plugin
from imgsvc.runtime.settings import NriSettings

log = logging.getLogger(__name__)

_KNOCK_S: Final = 1.0
_MAX_CONFIG: Final = 1024 * 1024  # [bytes]

Snapshot = Callable[[], Awaitable[tuple[list[nri.PodSandbox], list[nri.Container]]]]
CarryOut = Callable[[list[nri.ContainerUpdate], str], Awaitable[None]]


class Plugins:
    """Belongs to the event loop."""

    def __init__(self, settings: NriSettings, snapshot: Snapshot, carry_out: CarryOut, change: Change) -> None:
        """snapshot: what there is. carry_out: what a plugin changes when it hears of that. change: UpdateContainers."""
        self._settings = settings
        self._snapshot = snapshot
        self._carry_out = carry_out
        self._change = change
        self._plugins: list[Plugin] = []
        self._turn = asyncio.Lock()
        self._server: asyncio.Server | None = None
        self._socket: tuple[int, int] | None = None
        self._joining: set[asyncio.Task[None]] = set()
        self._watching: set[asyncio.Task[None]] = set()

    @property
    def busy(self) -> bool:
        """Whether a plugin is connected or being synchronised."""
        return bool(self._plugins) or self._turn.locked()

    def describe(self) -> dict[str, Any]:
        """For Status(verbose)."""
        listening = self._settings.socket_path if self._server else ""
        return {"socket": listening, "plugins": [plugin.describe() for plugin in self._plugins]}

    async def start(self) -> None:
        """Start the plugins that are installed, wait until they are ready, and listen. What goes wrong is logged."""
        found = await in_thread(_installed, Path(self._settings.plugin_path), Path(self._settings.plugin_config_path))
        await all_of(*(self._launch(path, identity, config) for path, identity, config in found))
        if not self._settings.disable_connections:
            await self._listen(Path(self._settings.socket_path))

    async def close(self) -> None:
        """Stop listening and let go of all plugins; those that we started are ended."""
        if self._server is not None:
            self._server.close()
            with contextlib.suppress(OSError):
                path = Path(self._settings.socket_path)
                if self._socket == _identity(path):
                    path.unlink()
        await stop_tasks(*self._joining)
        await all_of(*(plugin.close() for plugin in self._plugins))
        self._plugins = []
        for task in [*self._watching]:
            await ended(task)

    async def relay(
        self,
        event: int,
        request: Callable[[], Any],
        take: Callable[[Any, str], object] = lambda answer, plugin: None,
        *,
        first: Callable[[], object] = lambda: None,
        last: Callable[[list[Plugin]], Awaitable[None]] | None = None,
    ) -> None:
        """Ask every plugin that wants to know, in turn.

        request: made for each of them, after what those before it have said. take: gets an answer and whose it is. first: at the
        moment from which on plugins that join hear of it otherwise. last: in the same turn, with all plugins.

        Raises: what the first plugin that refuses says.
        """
        async with self._turn:
            first()
            for plugin in list(self._plugins):
                if plugin.wants(event) and (answer := await plugin.ask(event, request())) is not None:
                    take(answer, plugin.name)
            if last is not None:
                await last(list(self._plugins))

    async def _listen(self, path: Path) -> None:
        try:
            if await in_thread(_answers, path):
                log.warning("NRI plugins cannot connect: another runtime listens on %s; set nri.socket_path, or nri.disable", path)
                return
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            self._server = await asyncio.start_unix_server(self._accept, path, start_serving=False)
            path.chmod(0o600)
            self._socket = _identity(path)
            await self._server.start_serving()
        except OSError as error:
            log.warning("NRI plugins cannot connect: %s: %s", path, error.strerror or error)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.ensure_future(self._join(Plugin(reader, writer, self._settings, self._change)))
        self._joining.add(task)
        task.add_done_callback(self._joining.discard)

    async def _launch(self, path: Path, identity: tuple[str, str], config: str) -> None:
        """Start a program with one end of a socket pair."""
        ours, theirs = socket.socketpair()
        try:
            environment = {
                "PATH": SAFE_PATH,
                "NRI_PLUGIN_IDX": identity[0],
                "NRI_PLUGIN_NAME": identity[1],
                "NRI_PLUGIN_SOCKET": str(theirs.fileno()),
            }
            starting = asyncio.create_subprocess_exec(
                path, stdin=asyncio.subprocess.DEVNULL, env=environment, pass_fds=(theirs.fileno(),), start_new_session=True
            )
            process = await started_whole(starting)
        except OSError as error:
            ours.close()
            log.error("NRI plugin %s cannot be started: %s", path, error.strerror)
            return
        finally:
            theirs.close()
        reader, writer = await asyncio.open_unix_connection(sock=ours)
        plugin = Plugin(reader, writer, self._settings, self._change, identity=identity, config=config)
        watching = asyncio.ensure_future(_end_with(plugin, process))
        self._watching.add(watching)
        watching.add_done_callback(self._watching.discard)
        await self._join(plugin)

    async def _join(self, plugin: Plugin) -> None:
        """Register, tell it what there is, and put it in its place."""
        try:
            await plugin.start()
            async with self._turn:
                updates = await plugin.synchronize(*await self._snapshot())
                self._plugins = sorted([*self._plugins, plugin], key=lambda known: known.name)
        except ImgsvcError as error:
            plugin.drop(str(error))
            await plugin.close()
            return
        except BaseException:
            await plugin.close()
            raise
        log.info("NRI plugin %s has joined", plugin.name)
        watching = asyncio.ensure_future(self._forget(plugin))
        self._watching.add(watching)
        watching.add_done_callback(self._watching.discard)
        try:
            await self._carry_out(updates, plugin.name)
        except ImgsvcError as error:
            log.error("what NRI plugin %s changes cannot be done: %s", plugin.name, error)

    async def _forget(self, plugin: Plugin) -> None:
        await plugin.closed.wait()
        if plugin in self._plugins:
            self._plugins.remove(plugin)
            log.warning("NRI plugin %s has left", plugin.name)
            await plugin.close()


async def _end_with(plugin: Plugin, process: asyncio.subprocess.Process) -> None:
    """End a plugin's program with its connection."""
    await plugin.closed.wait()
    if process.returncode is None:
        kill_group(process.pid)
    await process.wait()


def _installed(directory: Path, configs: Path) -> list[tuple[Path, tuple[str, str], str]]:
    """Programs to start, each with its identity and its configuration. Blocking."""
    found = []
    try:
        names = sorted(os.listdir(directory))
    except FileNotFoundError:
        return []
    except OSError as error:
        log.error("nri.plugin_path: %s: %s", directory, error.strerror)
        return []
    for name in names:
        path, identity = directory / name, plugin_name(name)
        if not path.is_file() or not os.access(path, os.X_OK):
            continue
        if identity is None:
            log.error("%s is not started: an NRI plugin's name begins with two digits and a dash", path)
            continue
        try:
            found.append((path, identity, _config(configs, *identity)))
        except ImgsvcError as error:
            log.error("NRI plugin %s is not started: %s", path, error)
    return found


def _config(directory: Path, index: str, name: str) -> str:
    for path in (directory / f"{index}-{name}.conf", directory / f"{name}.conf"):
        try:
            with path.open("rb") as stream:
                raw = stream.read(_MAX_CONFIG + 1)
            if len(raw) > _MAX_CONFIG:
                raise FailedPrecondition("its configuration is too long", where=str(path))
            return raw.decode()
        except FileNotFoundError:
            continue
        except (OSError, UnicodeDecodeError) as error:
            raise FailedPrecondition(f"its configuration cannot be read: {printable(str(error))}", where=str(path)) from error
    return ""


def _answers(path: Path) -> bool:
    """Whether a server answers on a socket. Blocking."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(_KNOCK_S)
        try:
            probe.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        except TimeoutError:
            return True
    return True


def _identity(path: Path) -> tuple[int, int]:
    status = path.lstat()
    return status.st_dev, status.st_ino
