"""`hosts explain`: which endpoints would be asked, in which order, and why. Reads files, never the network, runs no program."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

from imgsvc.base.errors import ImgsvcError, Unavailable
from imgsvc.base.reference import Reference
from imgsvc.registry.auth.credentials import NodeCredentials, named_credential
from imgsvc.registry.hosts.hostdirs import HostDirectories, Searched
from imgsvc.registry.hosts.hosts import FROM_NAMESPACE, FROM_NOBODY, OWN, Capability, Host, HostsConfig, trusted_token_hosts
from imgsvc.registry.http.proxies import proxy_for
from imgsvc.registry.http.redact import shown_url
from imgsvc.registry.http.tls import context_for
from imgsvc.registry.rules import cleartext_problem, lookup, request_url, takes_given

_OPERATIONS: Final = tuple(capability.value for capability in Capability)


@dataclass(frozen=True, slots=True)
class ExplainedEndpoint:
    """One endpoint. url: what a resolve would request. credential: where it would come from, in words, never its value."""

    url: str
    origin: str
    capabilities: tuple[str, ...]
    tls: str
    credential: str
    proxy: str
    headers: tuple[str, ...]
    token_hosts: tuple[str, ...]
    connect_timeout: float | None


@dataclass(frozen=True, slots=True)
class Explanation:
    """The whole answer. problem: why a pull would fail before anything is asked, "" otherwise."""

    reference: str
    namespace: str
    origin: str
    endpoints: tuple[ExplainedEndpoint, ...]
    searched: tuple[Searched, ...]
    warnings: tuple[str, ...]
    problem: str = ""

    def to_json(self) -> dict[str, Any]:
        """Stable keys for --json."""
        return asdict(self)


def explain(directories: HostDirectories, credentials: NodeCredentials, reference: Reference, environ: Mapping[str, str]) -> Explanation:
    """Explain one reference. Blocking: small files."""
    searched: list[Searched] = []
    try:
        config, searched = directories.search(reference.host, reference.repository)
    except ImgsvcError as error:
        return Explanation(str(reference), reference.host, error.where, (), tuple(searched), (), str(error))
    problems: list[str] = []
    endpoints = tuple(_endpoint(host, config, credentials, reference, environ, problems) for host in config.hosts)
    missing = tuple(f"{root}: configured in config_path, but there is no such directory" for root in directories.missing_roots())
    problem = f"pulling is blocked ({config.blocked})" if config.blocked else ""
    if not problem and not config.able(Capability.PULL):
        problem = "no endpoint has the capability pull"
    elif not problem and not reference.digest and not config.able(Capability.RESOLVE):
        problem = "no endpoint has the capability resolve, so only references with a digest can be pulled"
    problem = problem or next(iter(problems), "")
    return Explanation(str(reference), reference.host, config.origin, endpoints, tuple(searched), (*config.warnings, *missing), problem)


def render(explanation: Explanation) -> Iterator[str]:
    """Lines for people."""
    yield f"{explanation.reference}: registry {explanation.namespace}, configured by {explanation.origin or 'nothing'}"
    if explanation.problem:
        yield f"  PROBLEM: {explanation.problem}"
    for number, endpoint in enumerate(explanation.endpoints, start=1):
        yield f"  {number}. {endpoint.url}"
        yield f"     from         {endpoint.origin}"
        yield f"     asked for    {', '.join(endpoint.capabilities)}"
        yield f"     TLS          {endpoint.tls}"
        yield f"     credential   {endpoint.credential}"
        yield f"     proxy        {endpoint.proxy}"
        if endpoint.headers:
            yield f"     headers      {', '.join(endpoint.headers)}"
    for warning in explanation.warnings:
        yield f"  warning: {warning}"
    if explanation.searched:
        yield "  looked for configuration in"
    for place in explanation.searched:
        yield f"     {place.path}: {place.outcome}"


def _endpoint(
    host: Host,
    config: HostsConfig,
    credentials: NodeCredentials,
    reference: Reference,
    environ: Mapping[str, str],
    problems: list[str],
) -> ExplainedEndpoint:
    """problems: gets what is wrong with the files this host needs."""

    def tried(describe: Callable[[], str]) -> str:
        try:
            return describe()
        except ImgsvcError as error:
            problems.append(str(error))
            return f"UNUSABLE: {error}"

    path = f"/{host.repository(reference.repository)}/manifests/{reference.target}"
    url = request_url(host, host.url, config.namespace, path)
    proxy = proxy_for(host.url, host.proxy, environ)
    return ExplainedEndpoint(
        url=url,
        origin=host.origin,
        capabilities=tuple(name for name in _OPERATIONS if Capability(name) in host.capabilities),
        tls=tried(lambda: _tls(host)),
        credential=tried(lambda: _credential(host, config, credentials, reference)),
        proxy=f"{shown_url(proxy)} ({'hosts.toml' if host.proxy else 'environment'})" if proxy else "none",
        headers=tuple(dict.fromkeys(name for name, _ in host.headers)),
        token_hosts=tuple(sorted(trusted_token_hosts(host))),
        connect_timeout=host.dial_timeout,
    )


def _tls(host: Host) -> str:
    if host.url.startswith("http://") and not host.try_tls_first:
        return "off (plain HTTP)"
    context_for(host.tls)
    words = ["HTTPS first, then plain HTTP"] if host.try_tls_first else []
    words.append("certificate NOT verified" if host.tls.skip_verify else "certificate verified")
    words += [f"extra CA {name}" for name in host.tls.ca]
    words += [f"client certificate {name}" for name, _ in host.tls.client]
    return ", ".join(words)


def _credential(host: Host, config: HostsConfig, credentials: NodeCredentials, reference: Reference) -> str:
    policy = host.credential_policy
    if policy == FROM_NOBODY:
        return "none (configured)"
    # One with TLS options is spoken to over TLS first.
    if not host.try_tls_first and (problem := cleartext_problem(host, host.url)):
        return f"withheld: {problem}"
    if policy not in (FROM_NAMESPACE, OWN):
        return f"table [{policy}], {named_credential(policy, config.directories).source}"
    try:
        places = credentials.locate(*lookup(host, config.namespace, reference.repository, config.directories))
        stored = " else ".join(place.source for place in places) or "none stored"
    except Unavailable as error:
        return f"none ({error})"  # then the pull goes on without
    return f"the caller's, else {stored}" if takes_given(host, config.namespace, "") else stored
