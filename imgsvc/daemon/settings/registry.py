"""From configuration to a registry client: mirrors, legacy tables, the node's credentials. For the daemon and the CLI."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Final

import httpx

from imgsvc.config import Loaded
from imgsvc.registry.auth.credentials import CredentialSettings, NodeCredentials, StoredCredential
from imgsvc.registry.client import RegistryClient, RegistrySettings
from imgsvc.registry.hosts.hostdirs import split_config_path
from imgsvc.registry.hosts.legacy import parse_legacy
from imgsvc.registry.http.exchange import Timeouts
from imgsvc.registry.interfaces import RegistryObserver


@dataclass(frozen=True, slots=True)
class Registries:
    """A client and the credentials it looks in. warnings: what the configuration should no longer say."""

    client: RegistryClient
    credentials: NodeCredentials
    warnings: tuple[str, ...]


# Everything the client goes by; all of it can change while it runs.
KEYS: Final = (
    "registry",
    "images.max_concurrent_downloads",
    "images.max_concurrent_downloads_per_image",
    "images.image_pull_progress_timeout",
)


def open_registries(loaded: Loaded, observer: RegistryObserver | None = None, bulk: httpx.AsyncBaseTransport | None = None) -> Registries:
    """Build the client; no I/O with registries. observer: told what it does. bulk: who fetches blobs. Raises: InvalidArgument for legacy tables that cannot be honoured."""
    settings, credentials, warnings = _settings(loaded)
    return Registries(RegistryClient(settings, credentials, observer, bulk), credentials, warnings)


def prepare(client: RegistryClient, loaded: Loaded) -> Callable[[], None]:
    """What puts other settings in force. Raises: as open_registries."""
    settings, credentials, _ = _settings(loaded)
    return partial(client.reload, settings, credentials)


def _settings(loaded: Loaded) -> tuple[RegistrySettings, NodeCredentials, tuple[str, ...]]:
    settings = loaded.config
    registry = settings.registry
    tables = {"mirrors": registry.mirrors, "configs": registry.configs, "auths": registry.auths, "headers": registry.headers}
    used = next((name for name, table in tables.items() if table), "mirrors")
    legacy = parse_legacy(tables, loaded.origin(f"registry.{used}"))
    ours = {
        host: StoredCredential(**asdict(c), source=loaded.origin(f"registry.credentials.hosts.{host}"))
        for host, c in registry.credentials.hosts.items()
    }
    credentials = NodeCredentials(
        CredentialSettings(
            files=registry.credentials.files,
            helpers=registry.credentials.helpers,
            hosts={**legacy.credentials, **ours},
            provider_config=registry.credentials.provider_config,
            provider_directory=registry.credentials.provider_bin_dir,
        )
    )
    stall = settings.images.image_pull_progress_timeout
    timeouts = Timeouts()
    client = RegistrySettings(
        roots=split_config_path(registry.config_path),
        inline=legacy.hosts,
        timeouts=Timeouts(timeouts.connect, timeouts.headers, min(timeouts.stall, stall) if stall else timeouts.stall),
        max_downloads=settings.images.max_concurrent_downloads,
        max_downloads_per_image=settings.images.max_concurrent_downloads_per_image,
        max_extra_connections=registry.max_extra_connections,
        foreign_layer_hosts=registry.foreign_layer_hosts,
        environ=dict(os.environ),
    )
    return client, credentials, legacy.warnings
