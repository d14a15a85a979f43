"""The trace that a call belongs to, handed on from a caller of the CRI to the registries that are asked for it.

imgsvc records no spans; a tracing backend sees the requests as the caller's own. Tasks inherit the context of the task that
starts them.

Source: W3C Trace Context (traceparent).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextvars import ContextVar

HEADER = "traceparent"

_FORM = re.compile(r"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}", re.ASCII)
_parent: ContextVar[str] = ContextVar(HEADER, default="")


def enter(metadata: Iterable[tuple[str, str | bytes]]) -> None:
    """Take over the trace that a call's metadata names; none, where that is not well formed."""
    value = next((value for key, value in metadata if key == HEADER), "")
    _parent.set(value if isinstance(value, str) and _FORM.fullmatch(value) else "")


def parent() -> str:
    """The header's value for requests made on behalf of the current call, "" for none."""
    return _parent.get()
