"""Text from outside made fit for errors and logs: no secrets, no control characters, no kilobytes. Pure.

Source: distribution-spec "Error Codes" for the body.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final
from urllib.parse import parse_qsl, urlencode, urlsplit

from imgsvc.base.errors import ImgsvcError, printable
from imgsvc.base.oci import load_json_object

MAX_ERROR_BODY: Final = 64 * 1024  # [bytes]
_SHOWN_QUERY: Final = frozenset({"ns"})
_TITLE: Final = re.compile(rb"<title>([^<]*)", re.IGNORECASE)
_MIN_SECRET: Final = 4  # [characters] shorter ones would censor ordinary words


def shown_url(url: str) -> str:
    """A URL for humans: signed queries lose their values, user names vanish."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return printable(url, 80)
    query = urlencode([(key, value if key in _SHOWN_QUERY else "REDACTED") for key, value in parse_qsl(parts.query)], safe=":/")
    text = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
    return printable(f"{text}?{query}" if query else text, 400)


def scrubbed(text: str, secrets: Iterable[str]) -> str:
    """`text` without any of the secrets, printable."""
    for secret in sorted((s for s in secrets if len(s) >= _MIN_SECRET), key=len, reverse=True):
        text = text.replace(secret, "REDACTED")
    return printable(text, 300)


def registry_message(body: bytes, content_type: str, secrets: Iterable[str] = ()) -> str:
    """The registry's own words out of an error body: `CODE: message; …` when it is the specification's JSON, else its start."""
    if not body:
        return ""
    try:
        errors = load_json_object(body, "error body", limit=MAX_ERROR_BODY).get("errors")
    except ImgsvcError:
        errors = None
    if isinstance(errors, list):
        entries = [entry for entry in errors[:3] if isinstance(entry, dict)]
        words = "; ".join(": ".join(str(entry[key]) for key in ("code", "message") if entry.get(key)) for entry in entries)
        if words:
            return scrubbed(words, secrets)
    if "html" in content_type:
        title = _TITLE.search(body[:4096])
        return f'an HTML page "{scrubbed(_words(title[1])[:100], secrets)}"' if title else "an HTML page"
    return scrubbed(_words(body[:200]), secrets)


def _words(text: bytes) -> str:
    return " ".join(text.decode("utf-8", "replace").split())
