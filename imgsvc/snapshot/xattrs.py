"""Which extended attributes a layer may give its files; the others are this node's business. Pure."""

from __future__ import annotations

import stat
from typing import Final

_SECURITY: Final = (b"security.capability", b"security.ima")
_NAMESPACES: Final = (b"user.", b"system.posix_acl_")
_OF_OVERLAYFS: Final = b"user.overlay."


def may_have(name: bytes) -> bool:
    """Whether an image may set an attribute of this name on anything."""
    return not name.startswith(_OF_OVERLAYFS) and (name.startswith(_NAMESPACES) or name in _SECURITY)


def may_stand_on(name: bytes, mode: int) -> bool:
    """Whether Linux has an attribute of this name on a file of this type. Source: xattr(7), acl(5)."""
    if name.startswith(b"user."):
        return stat.S_ISREG(mode) or stat.S_ISDIR(mode)
    if name == b"system.posix_acl_default":
        return stat.S_ISDIR(mode)
    return not stat.S_ISLNK(mode)
