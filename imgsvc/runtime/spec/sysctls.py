"""Names of sysctls. Pure.

Dots separate the parts of a name and a slash is a dot within one (`net.ipv4.conf.eth0/100.rp_filter`); in a name
whose first separator is a slash it is the other way round. Source: sysctl(8); Kubernetes takes both, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

_SWAP: Final = str.maketrans("./", "/.")
_PER_INTERFACE: Final = (("net", "ipv4", "conf"), ("net", "ipv6", "conf"), ("net", "ipv4", "neigh"), ("net", "ipv6", "neigh"))
_ALWAYS_THERE: Final = frozenset({"all", "default", "lo"})


def canonical(name: str) -> str:
    """The form whose parts are separated by dots."""
    first = next((c for c in name if c in "./"), ".")
    return name.translate(_SWAP) if first == "/" else name


def parts(name: str) -> list[str]:
    """File names below /proc/sys."""
    return canonical(name).translate(_SWAP).split("/")


def of_interfaces(values: Mapping[str, str]) -> dict[str, str]:
    """Those of interfaces that a network namespace does not begin with: there is nothing to set before they are made."""
    return {name: value for name, value in values.items() if _is_of_interface(parts(name))}


def _is_of_interface(path: list[str]) -> bool:
    return tuple(path[:3]) in _PER_INTERFACE and len(path) > 3 and path[3] not in _ALWAYS_THERE
