"""Proxies from the environment, as Go programs read it. Pure.

Source: golang.org/x/net/http/httpproxy (documented rules): upper or lower case names, NO_PROXY with hosts, .suffixes,
ports, addresses, CIDR blocks and `*`; loopback is never proxied.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from urllib.parse import urlsplit

from imgsvc.base.numerals import whole_number
from imgsvc.registry.hosts.hosts import DIRECT, is_local


def proxy_for(url: str, configured: str, environ: Mapping[str, str]) -> str:
    """The proxy URL for a request, "" for none. `configured` is the host's own `proxy`, which outranks the environment."""
    if configured:
        return "" if configured == DIRECT else configured
    parts = urlsplit(url)
    name = f"{parts.scheme}_proxy"
    value = environ.get(name.upper()) or environ.get(name) or ""
    # A CGI program's HTTP_PROXY is a request header, not a setting (CVE-2016-5385).
    if not value or (name == "http_proxy" and "REQUEST_METHOD" in environ):
        return ""
    if is_local(parts.netloc) or _excluded(parts.hostname or "", _port(url), environ.get("NO_PROXY") or environ.get("no_proxy") or ""):
        return ""
    return value if "://" in value else f"http://{value}"


def _port(url: str) -> int:
    parts = urlsplit(url)
    return parts.port or (443 if parts.scheme == "https" else 80)


def _excluded(host: str, port: int, no_proxy: str) -> bool:
    return any(_matches(entry.strip().lower(), host.lower(), port) for entry in no_proxy.split(",") if entry.strip())


def _matches(entry: str, host: str, port: int) -> bool:
    if entry == "*":
        return True
    if (address := _address(host)) is not None:
        try:
            return address in ipaddress.ip_network(entry, strict=False)
        except ValueError:
            pass
    name, colon, wanted = entry.rpartition(":")
    if colon and (number := whole_number(wanted, 65535)) is not None:
        if number != port:
            return False
        entry = name
    entry = entry.strip("[]").removeprefix("*")
    return (host == entry.removeprefix(".") and not entry.startswith(".")) or host.endswith("." + entry.removeprefix("."))


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None
