"""What the use cases share: settings, records, seams, paths. Built once by the service."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from imgsvc.base.concurrency import KeyedLock
from imgsvc.base.errors import FailedPrecondition, InvalidArgument, from_os_error, printable
from imgsvc.runtime.events import Events
from imgsvc.runtime.host import Host
from imgsvc.runtime.interfaces import Images, NetworkPlugin, OCIRuntime
from imgsvc.runtime.nri.service import Nri
from imgsvc.runtime.paths import Paths
from imgsvc.runtime.records import ContainerRecord, Records, SandboxRecord
from imgsvc.runtime.settings import HandlerSettings, RuntimeSettings


@contextmanager
def os_errors(doing: str) -> Iterator[None]:
    """What the operating system refuses inside becomes an error of its category."""
    try:
        yield
    except OSError as error:
        raise from_os_error(error, doing, where=str(error.filename or "")) from error


@dataclass(frozen=True, slots=True)
class Core:
    """Shared by the use cases; never changed after the start.

    handlers: by name, for new pods. runtimes: by what they run as (SandboxRecord.runtime): the handlers, and those that only pods
    of an earlier configuration still need.
    """

    settings: RuntimeSettings
    paths: Paths
    records: Records
    images: Images
    handlers: Mapping[str, OCIRuntime]
    broken_handlers: Mapping[str, str]
    runtimes: Mapping[str, OCIRuntime]
    network: NetworkPlugin
    host: Host
    boot_id: str
    events: Events
    locks: KeyedLock
    stopping: set[str]
    nri: Nri

    def resolve_handler(self, name: str) -> str:
        """The configured handler a RuntimeClass asks for. Raises: InvalidArgument (unknown), FailedPrecondition (broken)."""
        wanted = name or self.settings.default_runtime_name
        if wanted in self.handlers:
            return wanted
        if wanted in self.broken_handlers:
            raise FailedPrecondition(f'runtime handler "{wanted}" is not usable: {self.broken_handlers[wanted]}')
        known = ", ".join(sorted(self.settings.handlers))
        raise InvalidArgument(f'no runtime handler "{printable(wanted, 80)}"', hint=f"configured are: {known}")

    def handler(self, name: str) -> OCIRuntime:
        """A handler for new pods by its resolved name. Raises: FailedPrecondition when it has left the configuration."""
        if name not in self.handlers:
            reason = self.broken_handlers.get(name, "it is no longer configured")
            raise FailedPrecondition(f'runtime handler "{name}" is not usable: {reason}')
        return self.handlers[name]

    def runtime_of(self, record: SandboxRecord | ContainerRecord) -> OCIRuntime:
        """What a pod, or a container in it, was made with. Raises: FailedPrecondition when that is gone."""
        return self.find_runtime(record) or self.handler(record.handler)

    def find_runtime(self, record: SandboxRecord | ContainerRecord) -> OCIRuntime | None:
        """As runtime_of; None when it is gone."""
        pod = record if isinstance(record, SandboxRecord) else self.records.sandboxes.get(record.sandbox_id)
        return (self.runtimes.get(pod.runtime) if pod else None) or self.handlers.get(record.handler)

    def handler_settings(self, name: str) -> HandlerSettings:
        """Configuration of a handler by its resolved name. Raises: FailedPrecondition when it has left the configuration."""
        if name not in self.settings.handlers:
            raise FailedPrecondition(f'runtime handler "{name}" is no longer configured')
        return self.settings.handlers[name]
