"""TLS settings of a host as an SSLContext, and what to do about a certificate that is not trusted."""

from __future__ import annotations

import contextlib
import os
import re
import ssl
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Final

from imgsvc.base.errors import InvalidArgument, printable
from imgsvc.registry.hosts.hosts import Tls

_FRAME: Final = re.compile(r"^\[\w+(?:: \w+)?\] | ?\(_ssl\.c:\d+\)$", re.ASCII)


class TlsFiles:
    """The files that TLS settings name, as this process can read them."""

    def place(self, name: str) -> str:
        """A path to read a file's contents at."""
        return name

    def stamp(self, name: str) -> tuple[int, int, int]:
        """What tells whether a file was replaced."""
        try:
            return stamp_of(os.stat(name))
        except OSError:
            return (0, 0, 0)


class HandedFiles(TlsFiles):
    """Files that another process has opened for this one, which may not read them itself. Kept in memory by name."""

    def __init__(self) -> None:
        self._copies: dict[str, tuple[tuple[int, int, int], int]] = {}  # stamp, memfd

    def take(self, names: Sequence[str], fds: Sequence[int]) -> None:
        """Copy what is new, and close the descriptors."""
        for name, fd in zip(names, fds, strict=True):
            with open(fd, "rb", buffering=0) as file:
                stamp = stamp_of(os.fstat(fd))
                if self.stamp(name) != stamp:
                    copy = os.memfd_create("imgsvc-tls", os.MFD_CLOEXEC)  # the last one may be being read; there are few
                    with contextlib.suppress(OSError):  # a directory: then there is no certificate in it
                        os.write(copy, file.readall() or b"")
                    self._copies[name] = (stamp, copy)

    def place(self, name: str) -> str:
        """See TlsFiles."""
        return f"/proc/self/fd/{self._copies[name][1]}"

    def stamp(self, name: str) -> tuple[int, int, int]:
        """See TlsFiles."""
        return self._copies[name][0] if name in self._copies else (0, 0, 0)


def stamp_of(status: os.stat_result) -> tuple[int, int, int]:
    """As TlsFiles.stamp."""
    return (status.st_ino, status.st_mtime_ns, status.st_size)


def names_in(tls: Tls) -> tuple[str, ...]:
    """The files of some settings."""
    return (*tls.ca, *(name for pair in tls.client for name in pair if name))


def opened_files(tls: Tls) -> list[int]:
    """Descriptors of names_in, for the caller to close. Raises: InvalidArgument naming the file that cannot be read."""
    fds: list[int] = []
    for name in names_in(tls):
        try:
            fds.append(os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK))
        except OSError as error:
            for fd in fds:
                os.close(fd)
            raise _unusable(error, name, "a PEM file is expected") from error
    return fds


def context_for(tls: Tls, files: TlsFiles | None = None) -> ssl.SSLContext:
    """Blocking: files. Raises: InvalidArgument naming the file that cannot be used."""
    files = files or TlsFiles()
    context = ssl.create_default_context()
    if tls.skip_verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    name, hint = "", "a PEM file is expected"
    try:
        for name in tls.ca:
            context.load_verify_locations(files.place(name))
        for name, key in tls.client:
            hint = "a PEM file with a certificate and its key is expected" if not key else f"it and {key} must be a pair in PEM"
            # With a password given, OpenSSL does not ask the terminal for one.
            context.load_cert_chain(files.place(name), files.place(key) if key else None, password="")
    except (ssl.SSLError, OSError) as error:
        raise _unusable(error, name, hint) from error
    return context


def _unusable(error: OSError, name: str, hint: str) -> InvalidArgument:
    return InvalidArgument(f"certificate cannot be used: {printable(reason_of(error), 160)}", where=name, hint=hint)


def reason_of(error: OSError) -> str:
    """In words. Python has no name for some of OpenSSL's reasons: "[SSL] tlsv1 alert no application protocol (_ssl.c:1006)"."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return error.verify_message
    if isinstance(error, ssl.SSLError):
        return (error.reason or _FRAME.sub("", error.args[-1] if error.args else str(error))).lower().replace("_", " ")
    return error.strerror or str(error)


def hint_about(reason: str) -> str:
    """The way out for a certificate that is not trusted for this reason of OpenSSL's."""
    if "expired" in reason or "not yet valid" in reason:
        return f"the registry needs another certificate, or this node's clock is wrong: it says {datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    if "mismatch" in reason:
        return "use a name in hosts.toml that the certificate is for"
    return 'add its CA with ca = "…" in hosts.toml'
