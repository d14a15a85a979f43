"""TLS settings of a host as an SSLContext, and what to do about a certificate that is not trusted."""

from __future__ import annotations

import re
import ssl
from datetime import UTC, datetime
from typing import Final

from imgsvc.errors import InvalidArgument, printable
from imgsvc.registry.hosts import Tls

_FRAME: Final = re.compile(r"^\[\w+(?:: \w+)?\] | ?\(_ssl\.c:\d+\)$", re.ASCII)


def context_for(tls: Tls) -> ssl.SSLContext:
    """Blocking: files. Raises: InvalidArgument naming the file that cannot be used."""
    context = ssl.create_default_context()
    if tls.skip_verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    name, hint = "", "a PEM file is expected"
    try:
        for name in tls.ca:
            context.load_verify_locations(name)
        for name, key in tls.client:
            hint = "a PEM file with a certificate and its key is expected" if not key else f"it and {key} must be a pair in PEM"
            # With a password given, OpenSSL does not ask the terminal for one.
            context.load_cert_chain(name, key or None, password="")
    except (ssl.SSLError, OSError) as error:
        raise InvalidArgument(f"certificate cannot be used: {printable(reason_of(error), 160)}", where=name, hint=hint) from error
    return context


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
