"""What a request to a host is and carries: the rules that a pull goes by and that `hosts explain` tells. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple
from urllib.parse import urlencode

from imgsvc.registry.hosts.hosts import FROM_NAMESPACE, Host, canonical_name, is_local


class Lookup(NamedTuple):
    """What to look a stored credential up by; directories: whose credentials.toml speak of it."""

    registry: str
    repository: str
    directories: tuple[str, ...]


def lookup(host: Host, namespace: str, repository: str, directories: Sequence[str]) -> Lookup:
    """Where the credential stored for a host is looked for, when a repository of a namespace is asked for there.

    directories: of the namespace. They are about it alone; a mirror gets only what names it.
    """
    if host.credential_policy == FROM_NAMESPACE:
        return Lookup(namespace, repository, tuple(directories))
    return Lookup(canonical_name(host.authority), host.repository(repository), ())


def takes_given(host: Host, namespace: str, bound_to: str) -> bool:
    """Whether a credential that the caller gave for the registry `bound_to`, "" for the image's own, goes to a host."""
    bound = canonical_name(bound_to) if bound_to else namespace
    return bound == canonical_name(host.authority) or (host.credential_policy == FROM_NAMESPACE and bound == namespace)


def cleartext_problem(host: Host, base: str) -> str:
    """Why no credential goes to a host that is spoken to at `base`, "" when one may."""
    if not base.startswith("http://") or host.insecure_credentials:
        return ""
    if host.try_tls_first:
        return "" if host.downgrade_is_safe else "the connection fell back to plain HTTP"
    if is_local(host.authority):
        return ""
    return "plain HTTP (insecure_credentials = true in hosts.toml allows it)"


def request_url(host: Host, base: str, namespace: str, path: str, query: Sequence[tuple[str, str]] = ()) -> str:
    """The URL of `path` below `base`; mirrors are told which registry is meant, as containerd does."""
    wanted = [*query, ("ns", namespace)] if host.sends_ns and not host.canonical else query
    return f"{base}{path}" + (f"?{urlencode(wanted, safe=':/')}" if wanted else "")
