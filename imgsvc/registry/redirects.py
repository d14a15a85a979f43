"""Where an answer's Location leads, and what is never followed. Pure.

Source: RFC 9110 15.4; distribution-spec for registries that hand blobs out from elsewhere.
"""

from __future__ import annotations

from typing import Final
from urllib.parse import urljoin, urlsplit

from imgsvc.registry.http.exchange import RequestFailed
from imgsvc.registry.http.netguard import is_host_name
from imgsvc.registry.http.redact import shown_url
from imgsvc.registry.retry import Failure

MAX_REDIRECTS: Final = 10
REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})


def origin(url: str) -> tuple[str, str, int]:
    """Scheme, host and port: credentials for one of these are for no other."""
    parts = urlsplit(url)
    return parts.scheme, parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)


def target(url: str, location: str, phase: str) -> str:
    """Where a Location header of `url` leads, a URL without a fragment. Raises: RequestFailed for what is not followed."""
    try:
        found = urljoin(url, location)
        parts = urlsplit(found)
        _ = parts.port
    except ValueError:
        raise refused("redirect to something that is not a URL", phase, url) from None
    is_text = found.isascii() and found.isprintable() and " " not in found
    if parts.scheme not in ("http", "https") or not parts.hostname or not is_text or not is_host_name(parts.hostname):
        raise refused("redirect to something that is not an HTTP URL", phase, url)
    if url.startswith("https://") and parts.scheme != "https":
        raise refused("redirect from HTTPS to HTTP", phase, found)
    if parts.username is not None:
        raise refused("redirect to a URL with credentials in it", phase, found)
    return parts._replace(fragment="").geturl()


def refused(what: str, phase: str, url: str) -> RequestFailed:
    """The error for a redirect that is not followed."""
    return RequestFailed(what, code="PERMISSION_DENIED", failure=Failure.DEFINITE, phase=phase, where=shown_url(url))
