"""The error taxonomy: one class per gRPC category, carried as text so that nothing here imports gRPC.

Every error says *what* failed, *where* (a URL, or file:line) and the way out (*hint*), in one line. Subclasses live
beside the code that raises them, carry fields, and build their text from those fields. Secrets never enter an error.

Source: google.rpc.Code for the names; docs/architecture.md ("Errors") for how the edge maps them.
"""

from __future__ import annotations

import errno
from typing import ClassVar, Final

_MAX_FOREIGN_TEXT: Final = 512  # [characters] of text that came from outside, per fragment


class ImgsvcError(Exception):
    """Base of all errors we raise on purpose.

    Attributes:
        code: gRPC status name, e.g. "NOT_FOUND".
        retryable: the same request may succeed later without any change.
        what, where, hint: the three parts of the message; where and hint may be empty.
        reason: a word that a CRI client looks for at the start of the message, e.g. "RegistryUnavailable"; mostly "".
    """

    code: ClassVar[str] = "INTERNAL"
    retryable: ClassVar[bool] = False
    reason: str = ""

    def __init__(self, what: str, *, where: str = "", hint: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.hint = hint

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        return f"{text}; {self.hint}" if self.hint else text


class Cancelled(ImgsvcError):
    """The caller left, or the work was stopped on request."""

    code = "CANCELLED"


class InvalidArgument(ImgsvcError):
    """A bad reference, configuration, specification or document."""

    code = "INVALID_ARGUMENT"


class DeadlineExceeded(ImgsvcError):
    """A stall or an overall limit."""

    code = "DEADLINE_EXCEEDED"
    retryable = True


class NotFound(ImgsvcError):
    """No such image, blob, snapshot, sandbox or container."""

    code = "NOT_FOUND"


class AlreadyExists(ImgsvcError):
    """A name or key that is taken."""

    code = "ALREADY_EXISTS"


class PermissionDenied(ImgsvcError):
    """403, a policy, or a missing decryption key."""

    code = "PERMISSION_DENIED"


class Unauthenticated(ImgsvcError):
    """401: no credential, or one that was refused."""

    code = "UNAUTHENTICATED"


class ResourceExhausted(ImgsvcError):
    """Disk full, map full, a limit on hostile input, or 429 past the budget."""

    code = "RESOURCE_EXHAUSTED"


class FailedPrecondition(ImgsvcError):
    """The request is valid but the state is not: a snapshot with children, a sandbox that is not ready."""

    code = "FAILED_PRECONDITION"


class Aborted(ImgsvcError):
    """Lost a race; safe to retry."""

    code = "ABORTED"
    retryable = True


class OutOfRange(ImgsvcError):
    """An offset beyond the end."""

    code = "OUT_OF_RANGE"


class Unimplemented(ImgsvcError):
    """A feature that this node or this version does not have."""

    code = "UNIMPLEMENTED"


class Internal(ImgsvcError):
    """A bug of ours."""

    code = "INTERNAL"


class Unavailable(ImgsvcError):
    """An ingest is locked; a registry or an OCI runtime is down."""

    code = "UNAVAILABLE"
    retryable = True


class DataLoss(ImgsvcError):
    """Bytes are not what their digest, size or MAC promised."""

    code = "DATA_LOSS"


def printable(text: str, limit: int = _MAX_FOREIGN_TEXT) -> str:
    """Foreign text made safe for a log line or a terminal: control characters escaped, length bounded [characters]."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text[:limit])
    return shown + "…" if len(text) > limit else shown


def from_os_error(error: OSError, doing: str, *, where: str = "") -> ImgsvcError:
    """The category of an OSError met while `doing` something to `where`; the caller raises it `from error`."""
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ResourceExhausted(f"{doing}: {reason}", where=where, hint="free space there, then try again")
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return ResourceExhausted(f"{doing}: {reason}", where=where, hint="raise the open files limit of the daemon")
    if error.errno == errno.ENOENT:
        return NotFound(f"{doing}: {reason}", where=where)
    if error.errno in (errno.EACCES, errno.EPERM):
        return PermissionDenied(f"{doing}: {reason}", where=where)
    if error.errno == errno.EIO:
        return DataLoss(f"{doing}: {reason}", where=where, hint="check the disk below it")
    return Internal(f"{doing}: {reason}", where=where)
