"""The streaming server's certificate, replaced without a restart."""

from __future__ import annotations

import asyncio
import logging
import os
import ssl
from typing import Final

from imgsvc.base.concurrency import in_thread
from imgsvc.base.errors import ImgsvcError, InvalidArgument

CHECK_S: Final = 60.0  # between two looks at the files

_log = logging.getLogger(__name__)


class Certificate:
    """A certificate and key in PEM files. The same SSLContext serves old and new: OpenSSL takes what is loaded last."""

    def __init__(self, cert_file: str, key_file: str) -> None:
        self._cert_file = cert_file
        self._key_file = key_file
        self._context: ssl.SSLContext | None = None
        self._seen: tuple[object, ...] = ()

    def load(self) -> ssl.SSLContext:
        """The context for a server. Blocking. Raises: InvalidArgument."""
        self._seen = self._stamp()
        self._context = self._new_context()
        return self._context

    def reload(self) -> bool:
        """Use replaced files for new connections; whether they were replaced. Blocking.

        Raises: InvalidArgument when they are not a certificate with its key; the old pair stays.
        """
        stamp = self._stamp()
        if stamp == self._seen or self._context is None:
            return False
        self._new_context()  # a pair that does not fit must not reach the context in use
        self._context.load_cert_chain(self._cert_file, self._key_file)
        self._seen = stamp
        return True

    async def follow(self) -> None:
        """Reload for ever, whenever the files change."""
        while True:
            await asyncio.sleep(CHECK_S)
            try:
                if await in_thread(self.reload):
                    _log.info("new streaming certificate in use")
            except (ImgsvcError, OSError) as error:
                _log.warning("the old streaming certificate stays in use: %s", error)

    def _new_context(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            context.load_cert_chain(self._cert_file, self._key_file)
        except (OSError, ssl.SSLError) as error:
            raise InvalidArgument(
                f"cannot use certificate and key: {error.strerror or error}",
                where=f"{self._cert_file}, {self._key_file}",
                hint="correct stream.tls_cert_file and stream.tls_key_file",
            ) from error
        return context

    def _stamp(self) -> tuple[object, ...]:
        stamps = []
        for path in (self._cert_file, self._key_file):
            try:
                status = os.stat(path)
            except OSError:
                stamps.append((path, 0, 0))  # loading says what is wrong
            else:
                stamps.append((path, status.st_mtime_ns, status.st_ino))
        return tuple(stamps)
