"""Asking one endpoint one thing: the right credential, challenges, redirects, and an error that explains itself.

What leaves with a request is decided here. On the endpoint itself: configured headers, client certificate, the
credential its policy allows. After the first redirect to another scheme, host or port: none of these, for good, even
when a later redirect leads back. From HTTPS to HTTP: nothing at all.

Source: distribution-spec "Determining support", "Error codes".
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Final, Protocol
from urllib.parse import urlsplit

import httpx

from imgsvc import __version__
from imgsvc.base import tracing
from imgsvc.base.concurrency import time_limit
from imgsvc.base.errors import ImgsvcError, InvalidArgument, Unavailable, printable
from imgsvc.registry.auth.authorizer import Answer, Authorizer, Peer, secrets_of
from imgsvc.registry.auth.claims import Claims
from imgsvc.registry.hosts.hosts import FROM_NAMESPACE, FROM_NOBODY, OWN, Capability, Host, Tls, canonical_name
from imgsvc.registry.http.exchange import Body, RequestFailed, Route, header_of, header_values, reach_behind, read_start, url_of
from imgsvc.registry.http.netguard import ANYWHERE, Reach, allowed_from
from imgsvc.registry.http.proxies import proxy_for
from imgsvc.registry.http.redact import MAX_ERROR_BODY, registry_message, scrubbed, shown_url
from imgsvc.registry.http.sender import Sender
from imgsvc.registry.interfaces import Attempt, Credential, CredentialKind, CredentialUse, RegistryObserver
from imgsvc.registry.observers import LoggingObserver
from imgsvc.registry.redirects import MAX_REDIRECTS, REDIRECTS, origin, refused, target
from imgsvc.registry.retry import kind_of_status, retry_after
from imgsvc.registry.rules import cleartext_problem, lookup, request_url, takes_given

log = logging.getLogger(__name__)

USER_AGENT: Final = f"imgsvc/{__version__}"
_MAX_ATTEMPTS: Final = 64  # kept of one operation, the latest; a long download over a bad line makes many
_NO_CREDENTIAL: Final = "there is no such repository, or it wants a credential: the pod's, that of --creds, or one of the node"
_MAX_WARNINGS: Final = 4  # of an answer that are told. Source: distribution-spec "Warnings"
_MAX_ROUNDS: Final = 3  # requests one call may cost: unauthenticated, authenticated, with a renewed credential
_REASON_TIMEOUT_S: Final = 5.0  # for the words to a refusal that is already certain
_GUESS_TIMEOUT_S: Final = 3.0  # for localhost to show which protocol it speaks


class CredentialSource(Protocol):
    """The node's own credentials. Source names are fit for logs."""

    async def find(self, registry: str, repository: str, *, directories: Sequence[str], renew: bool = False) -> Credential | None:
        """What is stored for a registry (`host[:port]` or docker.io); renew: bypass caches, the last one was refused.

        directories: whose credentials.toml speak of it, the most telling first.

        Raises: Unavailable when a source failed, after which the request goes without a credential and says so;
            others for wrong configuration of this registry, which ends the pull.
        """

    async def named(self, name: str, directories: Sequence[str]) -> Credential:
        """A named credential of the namespace's directories. Raises: InvalidArgument when there is none."""


class NoCredentials:
    """A node that has none."""

    async def find(self, registry: str, repository: str, *, directories: Sequence[str], renew: bool = False) -> Credential | None:
        """None."""
        return None

    async def named(self, name: str, directories: Sequence[str]) -> Credential:
        """Raises: InvalidArgument."""
        raise InvalidArgument(f'no credential named "{name}"', where=next(iter(directories), ""))


class RememberedCredentials:
    """Asks another source once per registry, for the length of one pull."""

    def __init__(self, source: CredentialSource) -> None:
        self._source = source
        self._found: dict[tuple[str, str], Credential | None] = {}
        self._lock = asyncio.Lock()

    async def find(self, registry: str, repository: str, *, directories: Sequence[str], renew: bool = False) -> Credential | None:
        """As CredentialSource.find; failures are not remembered."""
        async with self._lock:
            key = (registry, repository)
            if renew or key not in self._found:
                self._found[key] = await self._source.find(registry, repository, directories=directories, renew=renew)
            return self._found[key]

    async def named(self, name: str, directories: Sequence[str]) -> Credential:
        """As CredentialSource.named."""
        return await self._source.named(name, directories)


@dataclass(frozen=True, slots=True)
class Ask:
    """One request. path: below the endpoint's base, with a leading slash, or an absolute URL the endpoint named.

    scopes: what a token must allow. ok: statuses that are answers. body: bytes, or a stream with its `length` [bytes].
    is_bulk: the answer may be large; there is no body then.
    """

    method: str
    path: str
    phase: str
    scopes: tuple[str, ...] = ()
    query: tuple[tuple[str, str], ...] = ()
    headers: tuple[tuple[str, str], ...] = ()
    ok: frozenset[int] = frozenset({200})
    body: Body = b""
    length: int | None = None
    is_bulk: bool = False


@dataclass(slots=True)
class Session:
    """What several endpoints of one operation share."""

    namespace: str
    repository: str
    directories: tuple[str, ...]
    caller: Credential | None
    sender: Sender
    bulk: Sender  # for answers that may be large
    authorizer: Authorizer
    stored: CredentialSource
    environ: Mapping[str, str]
    downgraded: dict[str, None]  # bases of `http://` hosts with TLS options that turned out to speak plain HTTP
    attempts: list[Attempt] = field(default_factory=list)
    observer: RegistryObserver = field(default_factory=LoggingObserver)


class Endpoint:
    """One host of the configuration within one session."""

    def __init__(self, host: Host, session: Session) -> None:
        self.host = host
        self._session = session
        self._reach = Reach.PUBLIC
        self._credential: Credential | None = None
        self._unused: CredentialUse | None = None  # why no credential goes out
        self._is_credential_known = False
        self.claims: Claims | None = None  # of the token that went with the last request, where it was a JWT
        self._unexplained: tuple[Ask, Answer | None] | None = None  # the HEAD that was refused last, and what went with it

    @property
    def base(self) -> str:
        """The URL in use: HTTPS first where TLS options make an http:// host ambiguous."""
        if self.host.try_tls_first and self.host.url not in self._session.downgraded:
            return "https://" + self.host.url.removeprefix("http://")
        return self.host.url

    @property
    def repository(self) -> str:
        """What this host calls the session's repository."""
        return self.host.repository(self._session.repository)

    @property
    def identity(self) -> str:
        """A name for the credential that requests go out with, "" for none or before identify()."""
        return self._session.authorizer.identity(self._credential)

    async def identify(self) -> str:
        """Choose the credential and return its identity. Raises: what is wrong with its configuration."""
        await self._pick_credential()
        return self.identity

    def path(self, rest: str) -> str:
        """The path of something in that repository."""
        return f"/{self.repository}/{rest}"

    def scope(self, actions: str = "pull") -> str:
        """What a token must allow for `actions` there."""
        return f"repository:{self.repository}:{actions}"

    async def ask(self, ask: Ask) -> httpx.Response:
        """Send and return the answer, its body unread; the caller closes it. Every call is recorded as an Attempt.

        Raises: RequestFailed for everything else, with the registry's own words in it.
        """
        started = time.monotonic()
        try:
            response = await self._ask(ask)
        except RequestFailed as error:
            self.record(error.phase, error.status, started, error.what)
            raise
        self.record(ask.phase, response.status_code, started)
        for text in header_values(response, "warning")[:_MAX_WARNINGS]:
            self._warned(response, scrubbed(text, secrets_of(self._credential)))
        return response

    def _warned(self, response: httpx.Response, text: str) -> None:
        session = self._session
        session.observer.warned(session.namespace, session.repository, shown_url(url_of(response)), text)

    async def reason(self) -> RequestFailed | None:
        """The last refusal of a HEAD in the registry's own words: one GET of the same, sent as it was; None without any.

        Such a GET finds nothing to send, so it does not count as a pull where pulls are counted. It is not for the way to
        another host, only for the error that ends an operation.
        """
        if self._unexplained is None or Capability.PULL not in self.host.capabilities:
            return None
        (ask, answer), self._unexplained = self._unexplained, None
        ask = replace(ask, method="GET")
        try:
            async with time_limit(_REASON_TIMEOUT_S), aclosing(await self._send_with_fallback(ask, answer)) as response:
                if response.status_code < 400:
                    return None  # it does not know HEAD
                told = await self._status_error(response, ask)
        except (ImgsvcError, TimeoutError):
            return None  # the status of the HEAD says enough
        self.correct(told)
        return told

    def correct(self, error: RequestFailed) -> None:
        """What is known now about the last attempt here."""
        attempts = self._session.attempts
        for index in reversed(range(len(attempts))):
            if attempts[index].endpoint == self.base:
                attempts[index] = replace(attempts[index], status=error.status, error=error.what)
                break

    def record(self, phase: str, status: int, started: float, error: str = "") -> None:
        """Add an Attempt."""
        elapsed = time.monotonic() - started
        attempts = self._session.attempts
        attempts.append(Attempt(self.base, phase, status, elapsed, self.credential_use, error))
        del attempts[:-_MAX_ATTEMPTS]

    @property
    def credential_use(self) -> CredentialUse:
        """What requests carry. A credential counts whether or not the registry asked for it."""
        if self._credential and not self._unused:
            is_given = self._credential is self._session.caller
            return CredentialUse(CredentialKind.GIVEN if is_given else CredentialKind.STORED, self._credential.source)
        if configured := self.host.configured_identity(self.base):
            return CredentialUse(CredentialKind.CONFIGURED, configured)
        return self._unused or CredentialUse()

    async def _ask(self, ask: Ask) -> httpx.Response:
        credential = await self._pick_credential()
        answer = await self._session.authorizer.preempt(self._peer(), ask.scopes, credential)
        self._note(answer)
        response = await self._send_with_fallback(ask, answer)
        for _ in range(_MAX_ROUNDS - 1):
            if response.status_code != 401 or origin(url_of(response)) != origin(self.base):
                break  # what another host asks for is none of our credentials' business
            self._reach = reach_behind(response)
            try:
                next_answer = await self._session.authorizer.answer(self._peer(), ask.scopes, self._credential, response, answer)
                if next_answer is None or (answer and next_answer.value == answer.value):
                    next_answer = await self._renewed(ask, response) if answer else None
            except BaseException:
                await response.aclose()
                raise
            if next_answer is None or not isinstance(ask.body, bytes):
                break
            await response.aclose()
            answer = next_answer
            self._note(answer)
            response = await self._send_with_fallback(ask, answer)
        if response.status_code in ask.ok:
            return response
        self._unexplained = (ask, answer) if ask.method == "HEAD" else None
        async with aclosing(response):
            raise await self._status_error(response, ask)

    def _note(self, answer: Answer | None) -> None:
        self.claims = answer.claims if answer else None
        if answer and answer.withheld:
            self._unused = CredentialUse(CredentialKind.WITHHELD, reason=answer.withheld)

    async def _renewed(self, ask: Ask, refused: httpx.Response) -> Answer | None:
        """A stored credential may have been replaced since we read it (short-lived cloud tokens)."""
        session = self._session
        if self._credential is None or self._credential is session.caller or self.host.credential_policy not in (FROM_NAMESPACE, OWN):
            return None
        fresh = await self._stored(renew=True)
        if fresh is None or session.authorizer.identity(fresh) == session.authorizer.identity(self._credential):
            return None
        self._credential = fresh
        return await session.authorizer.answer(self._peer(), ask.scopes, fresh, refused, None)

    def _peer(self) -> Peer:
        return Peer(self.host, self.base, self._reach)

    async def _pick_credential(self) -> Credential | None:
        if not self._is_credential_known:
            self._credential, self._unused = await self._choose_credential()
            self._is_credential_known = True
        if self._credential and (reason := cleartext_problem(self.host, self.base)):
            self._credential, self._unused = None, CredentialUse(CredentialKind.WITHHELD, reason=reason)
        return self._credential

    async def _choose_credential(self) -> tuple[Credential | None, CredentialUse | None]:
        """The credential bound to this host by policy, and what to say when one exists but is not for it."""
        session, policy = self._session, self.host.credential_policy
        if policy == FROM_NOBODY:
            return None, CredentialUse(reason="configured")
        own = canonical_name(self.host.authority)
        note = None
        if session.caller is not None:
            if takes_given(self.host, session.namespace, session.caller.host):
                return session.caller, None
            bound = printable(session.caller.host or session.namespace, 80)
            note = CredentialUse(CredentialKind.WITHHELD, reason=f"{session.caller.source} is bound to {bound}")
        if policy not in (FROM_NAMESPACE, OWN):
            return await session.stored.named(policy, session.directories), None
        try:
            found = await self._stored()
        except Unavailable as error:
            # Another registry's secret is no substitute, and a private image will be refused with this reason beside it.
            log.warning("no credential for %s: %s", own, error)
            return None, CredentialUse(reason=printable(str(error), 200))
        return found, None if found else note

    async def _stored(self, *, renew: bool = False) -> Credential | None:
        session = self._session
        where = lookup(self.host, session.namespace, session.repository, session.directories)
        return await session.stored.find(where.registry, where.repository, directories=where.directories, renew=renew)

    async def _send_with_fallback(self, ask: Ask, answer: Answer | None) -> httpx.Response:
        """An http:// host with TLS options is tried with HTTPS; a server that evidently speaks HTTP gets HTTP."""
        is_guess = self.host.try_tls_first and self.base.startswith("https://")
        try:
            return await self._follow(ask, answer)
        except RequestFailed as error:
            # A man in the middle can force TLS to fail. Fall back on any TLS error only where no credential is at stake.
            if not is_guess or not (error.is_plain_http or (error.phase == "tls" and self.host.downgrade_is_safe)):
                raise
        self._session.downgraded[self.host.url] = None
        credential = await self._pick_credential()
        return await self._follow(ask, answer if credential else None)

    async def _follow(self, ask: Ask, answer: Answer | None) -> httpx.Response:
        url = self._url(ask)
        is_foreign = origin(url) != origin(self.base)
        for _ in range(MAX_REDIRECTS + 1):
            response = await (self._send_abroad(ask, url) if is_foreign else self._send(ask, url, answer, is_foreign=False))
            location = header_of(response, "location")
            if response.status_code not in REDIRECTS or not location or ask.method not in ("GET", "HEAD"):
                return response
            if not is_foreign:
                self._reach = reach_behind(response)
            await response.aclose()
            following = target(url, location, ask.phase)
            is_foreign = is_foreign or origin(following) != origin(url)
            url = following
        raise refused(f"more than {MAX_REDIRECTS} redirects", ask.phase, url)

    async def _send_abroad(self, ask: Ask, url: str) -> httpx.Response:
        """To a host that we were sent to: anonymously, with a token where it wants one, as registries do that have moved."""
        base = "{}://{}".format(*urlsplit(url)[:2])
        host = Host(base, self.host.origin, tls=self.host.tls.without_identity(), proxy=self.host.proxy, credentials=FROM_NOBODY)
        authorizer = self._session.authorizer
        answer = await authorizer.preempt(Peer(host, base, self._reach), ask.scopes, None)
        response = await self._send(ask, url, answer, is_foreign=True)
        if response.status_code != 401 or not ask.scopes:
            return response
        try:
            answer = await authorizer.answer(Peer(host, base, reach_behind(response)), ask.scopes, None, response, answer)
        except BaseException:
            await response.aclose()
            raise
        if answer is None:
            return response
        await response.aclose()
        return await self._send(ask, url, answer, is_foreign=True)

    async def _send(self, ask: Ask, url: str, answer: Answer | None, *, is_foreign: bool) -> httpx.Response:
        headers = [("User-Agent", USER_AGENT), ("Accept-Encoding", "identity"), *ask.headers]
        if not is_foreign:
            headers += [(tracing.HEADER, trace)] if (trace := tracing.parent()) else []
            configured = {name.lower() for name, _ in self.host.headers}
            headers = [(name, value) for name, value in headers if name.lower() not in configured]
            headers += self.host.headers
        if answer:
            headers = [(name, value) for name, value in headers if name.lower() != "authorization"]
            headers.append(("Authorization", answer.value))
        route = self._route(url, is_foreign)
        if ask.is_bulk:
            return await self._session.bulk.send(ask.method, url, headers, route=route, phase=ask.phase)
        return await self._session.sender.send(ask.method, url, headers, route=route, phase=ask.phase, body=ask.body, length=ask.length)

    def _route(self, url: str, is_foreign: bool) -> Route:
        tls = self.host.tls
        return Route(
            tls=tls.without_identity() if is_foreign else tls if url.startswith("https:") else Tls(),
            proxy=proxy_for(url, self.host.proxy, self._session.environ),
            connect_timeout=_GUESS_TIMEOUT_S if self.host.downgrade_is_safe and not self.host.dial_timeout else self.host.dial_timeout,
            reachable=allowed_from(self._reach) if is_foreign else ANYWHERE,
        )

    def _url(self, ask: Ask) -> str:
        if ask.path.startswith(("http://", "https://")):
            return ask.path
        return request_url(self.host, self.base, self._session.namespace, ask.path, ask.query)

    async def _status_error(self, response: httpx.Response, ask: Ask) -> RequestFailed:
        body = b"" if ask.method == "HEAD" else await read_start(response, MAX_ERROR_BODY)
        words = registry_message(body, header_of(response, "content-type"), secrets_of(self._credential))
        status = response.status_code
        wait = retry_after(header_of(response, "retry-after"), datetime.now(UTC))
        failure = kind_of_status(status, wait is not None)
        what, hint = f"{ask.method} answered {status}" + (f" ({words})" if words else ""), ""
        if status in (401, 403):
            challenge = header_of(response, "www-authenticate")
            if challenge:
                what += f", challenge {scrubbed(challenge, secrets_of(self._credential))}"
            hint = "is the credential right, and allowed to do this?" if self._credential else _NO_CREDENTIAL
        return RequestFailed(
            what,
            code=_code_of(status),
            failure=failure,
            phase=ask.phase,
            status=status,
            where=shown_url(url_of(response)),
            hint=hint,
            wait=wait,
            is_silent=ask.method == "HEAD",
        )


def _code_of(status: int) -> str:
    codes = {
        400: "INVALID_ARGUMENT",
        401: "UNAUTHENTICATED",
        403: "PERMISSION_DENIED",
        404: "NOT_FOUND",
        405: "UNIMPLEMENTED",
        408: "DEADLINE_EXCEEDED",
        410: "NOT_FOUND",
        413: "RESOURCE_EXHAUSTED",
        416: "OUT_OF_RANGE",
        429: "RESOURCE_EXHAUSTED",
        504: "DEADLINE_EXCEEDED",
    }
    return codes.get(status, "UNAVAILABLE" if status >= 500 else "FAILED_PRECONDITION")
