"""Default paths of the daemon. Imports next to nothing: every command needs it."""

from __future__ import annotations

import os
from typing import Final

CONFIG_FILE: Final = "/etc/imgsvc/config.toml"
ROOT: Final = "/var/lib/imgsvc"
STATE: Final = "/run/imgsvc"
SOCKET_NAME: Final = "imgsvc.sock"  # in the state directory


def directories() -> tuple[str, str]:
    """Root and state by default: the machine's for root, the user's own otherwise (XDG base directories)."""
    if os.geteuid() == 0:
        return ROOT, STATE
    data = os.environ.get("XDG_DATA_HOME") or os.path.expanduser("~/.local/share")
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return f"{data}/imgsvc", f"{runtime}/imgsvc" if runtime else f"{data}/imgsvc/run"


def socket_address() -> str:
    """The socket of a daemon that runs on its defaults, as a gRPC target."""
    return f"unix://{directories()[1]}/{SOCKET_NAME}"


def socket_target(path: str) -> str:
    """A Unix socket as gRPC names it: a URI, so that a path outside ASCII, or with a "%", is escaped."""
    from urllib.parse import quote

    return f"unix://{quote(os.fsencode(path))}"
