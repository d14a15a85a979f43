"""Answering challenges: Basic and Bearer, with a token cache. The rules about hostile challenges are in challenge.py.

A token is cached per (endpoint, realm, service, scopes, identity): one identity's token never serves another, and what
one endpoint obtained is never shown to a second one.
"""

from __future__ import annotations

import base64
import logging
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Final, TypeVar
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

import httpx

from imgsvc.base.concurrency import SingleFlight
from imgsvc.base.errors import ImgsvcError, printable
from imgsvc.registry.auth.challenge import (
    MAX_TOKEN_BODY,
    Challenge,
    Token,
    check_realm,
    choose,
    parse_challenges,
    parse_token,
    scopes_for,
    usable_for,
)
from imgsvc.registry.auth.claims import Claims, claims_of
from imgsvc.registry.hosts.hosts import Host, trusted_token_hosts
from imgsvc.registry.http.exchange import RequestFailed, Route, header_of, header_values, read_body, read_start, url_of
from imgsvc.registry.http.netguard import ANYWHERE, Reach, allowed_from
from imgsvc.registry.http.proxies import proxy_for
from imgsvc.registry.http.redact import MAX_ERROR_BODY, registry_message, shown_url
from imgsvc.registry.http.sender import Sender
from imgsvc.registry.interfaces import Credential, RegistryObserver, identity
from imgsvc.registry.observers import LoggingObserver
from imgsvc.registry.redirects import MAX_REDIRECTS, REDIRECTS, origin, refused, target
from imgsvc.registry.retry import Failure, kind_of_status, retry_after

log = logging.getLogger(__name__)

_CLIENT_ID: Final = "imgsvc"
_MAX_CACHED: Final = 1024  # tokens and known challenges
_TOKEN_USER: Final = "<token>"  # noqa: S105  # docker's user name for an identity token
# POST (oauth2) is refused so by GCR (404), Artifactory (401), ACR (400) and others (405, redirects): they want GET.
_NO_POST: Final = frozenset({400, 401, 404, 405}) | REDIRECTS


_K = TypeVar("_K")
_V = TypeVar("_V")


@dataclass(frozen=True, slots=True)
class Peer:
    """The registry that challenges: its configuration, the base URL in use, and where it was found to live."""

    host: Host
    base: str
    reach: Reach


@dataclass(frozen=True, slots=True, repr=False)
class Answer:
    """An Authorization header value. withheld: why the credential did not go into it; "" when it did. claims: of the token in it."""

    value: str
    withheld: str = ""
    claims: Claims | None = None


class Authorizer:
    """Remembers how each endpoint wants to be spoken to. Belongs to one event loop."""

    def __init__(self, sender: Sender, environ: Mapping[str, str], observer: RegistryObserver | None = None) -> None:
        self._observer = observer or LoggingObserver()
        self._sender = sender
        self._environ = environ
        self._known: OrderedDict[tuple[str, ...], tuple[Challenge, Reach]] = OrderedDict()
        self._tokens: OrderedDict[tuple[str, ...], tuple[Token, float]] = OrderedDict()
        self._get_only: OrderedDict[str, None] = OrderedDict()
        self._flights: SingleFlight[tuple[Token, float]] = SingleFlight()

    def identity(self, credential: Credential | None) -> str:
        """A name for a credential that says nothing about it and differs between any two; "" without credentials."""
        return identity(credential)

    async def preempt(self, peer: Peer, wanted: Sequence[str], credential: Credential | None) -> Answer | None:
        """What to send without being asked, learnt from an earlier challenge."""
        if credential and credential.registry_token:
            return Answer(f"Bearer {credential.registry_token}", claims=claims_of(credential.registry_token))
        known = self._known.get(self._key(peer, wanted, credential))
        # Where the registry was found to live goes with what it asked for: nothing has been sent to it this time.
        return await self._respond(replace(peer, reach=known[1]), known[0], wanted, credential) if known else None

    async def answer(
        self, peer: Peer, wanted: Sequence[str], credential: Credential | None, refused: httpx.Response, sent: Answer | None
    ) -> Answer | None:
        """An answer to a 401 that was given to `sent`; None when there is none. Raises: RequestFailed when the token service fails."""
        if credential and credential.registry_token:
            return None
        key = self._key(peer, wanted, credential)
        challenge = choose(parse_challenges(header_values(refused, "www-authenticate")), has_secret=credential is not None)
        if challenge is None:
            self._known.pop(key, None)
            return None
        if sent:
            for name, (token, _) in list(self._tokens.items()):
                if sent.value == f"Bearer {token.value}":
                    del self._tokens[name]
        _remember(self._known, key, (challenge, peer.reach))
        return await self._respond(peer, challenge, wanted, credential)

    async def _respond(self, peer: Peer, challenge: Challenge, wanted: Sequence[str], credential: Credential | None) -> Answer | None:
        if challenge.scheme == "basic":
            return Answer(_basic(credential)) if credential else None
        scopes = scopes_for(challenge, wanted)
        note = _checked_realm(peer, challenge)
        if note and credential:
            credential = None
        else:
            note = ""
        key = self._token_key(peer, challenge, scopes, credential)
        cached = self._tokens.get(key)
        if cached is None or time.monotonic() >= cached[1]:
            cached = await self._flights.run("\0".join(key), lambda: self._fetch_to_keep(key, peer, challenge, scopes, credential))
        return Answer(f"Bearer {cached[0].value}", note, cached[0].claims)

    def _key(self, peer: Peer, wanted: Sequence[str], credential: Credential | None) -> tuple[str, ...]:
        return (peer.base, self.identity(credential), *wanted)

    def _token_key(self, peer: Peer, challenge: Challenge, scopes: Sequence[str], credential: Credential | None) -> tuple[str, ...]:
        parameters = challenge.parameters
        return (peer.base, parameters["realm"], parameters.get("service", ""), self.identity(credential), *scopes)

    async def _fetch_to_keep(
        self, key: tuple[str, ...], peer: Peer, challenge: Challenge, scopes: Sequence[str], credential: Credential | None
    ) -> tuple[Token, float]:
        """A new token and until when it is good. Cached before the flight ends, so that no caller in between asks again."""
        began, outcome = time.monotonic(), "CANCELLED"
        try:
            token = await self._fetch(peer, challenge, scopes, credential)
            outcome = "ok"
        except RequestFailed as error:
            outcome = error.code
            raise
        finally:
            self._observer.token(outcome, time.monotonic() - began)
        what = f"a token {token.claims}" if token.claims else "a token that is no JWT"
        log.debug("%s gave %s, used for %.0f s", shown_url(challenge.parameters["realm"]), what, usable_for(token))
        cached = (token, time.monotonic() + usable_for(token))
        _remember(self._tokens, key, cached)
        return cached

    async def _fetch(self, peer: Peer, challenge: Challenge, scopes: Sequence[str], credential: Credential | None) -> Token:
        realm, service = challenge.parameters["realm"], challenge.parameters.get("service", "")
        form = _oauth_form(service, scopes, credential)
        if form and (realm not in self._get_only or "refresh_token" in form):
            response = await self._post(peer, realm, form)
            async with aclosing(response):
                if response.status_code == 200:
                    return await _read_token(response)
                if response.status_code not in _NO_POST or "refresh_token" in form:
                    raise await _token_error(response, realm, scopes, credential)
        async with aclosing(await self._get(peer, realm, service, scopes, credential)) as response:
            if response.status_code != 200:
                raise await _token_error(response, realm, scopes, credential)
            if form:
                _remember(self._get_only, realm, None)
            return await _read_token(response)

    async def _post(self, peer: Peer, realm: str, form: dict[str, str]) -> httpx.Response:
        body = urlencode(form, errors="surrogateescape").encode()
        headers = [("Content-Type", "application/x-www-form-urlencoded")]
        return await self._send("POST", realm, peer, headers, body)

    async def _get(self, peer: Peer, realm: str, service: str, scopes: Sequence[str], credential: Credential | None) -> httpx.Response:
        query = [("service", service)] if service else []
        query += [("scope", scope) for scope in scopes]
        if credential:
            query += [("account", credential.username)]
        parts = urlsplit(realm)
        url = urlunsplit(parts._replace(query=urlencode([*parse_qsl(parts.query), *query], errors="surrogateescape"), fragment=""))
        return await self._send("GET", url, peer, [("Authorization", _basic(credential))] if credential else [], b"")

    async def _send(self, method: str, url: str, peer: Peer, headers: list[tuple[str, str]], body: bytes) -> httpx.Response:
        """To the token service. It may redirect a GET, but only on its own host: credentials go with it."""
        for _ in range(MAX_REDIRECTS + 1):
            response = await self._send_once(method, url, peer, headers, body)
            location = header_of(response, "location")
            if method != "GET" or response.status_code not in REDIRECTS or not location:
                return response
            following = target(url, location, "auth")
            if origin(following) != origin(url):
                return response
            await response.aclose()
            url = following
        raise refused(f"more than {MAX_REDIRECTS} redirects", "auth", url)

    async def _send_once(self, method: str, url: str, peer: Peer, headers: list[tuple[str, str]], body: bytes) -> httpx.Response:
        ours, theirs = urlsplit(peer.base), urlsplit(url)
        is_same_name = ours.hostname == theirs.hostname
        if (ours.scheme, ours.netloc) == (theirs.scheme, theirs.netloc):
            headers = [*peer.host.headers, *headers]
        route = Route(
            tls=peer.host.tls if is_same_name else peer.host.tls.without_identity(),
            proxy=proxy_for(url, peer.host.proxy, self._environ),
            connect_timeout=peer.host.dial_timeout,
            reachable=ANYWHERE if (theirs.hostname or "") in peer.host.token_hosts else allowed_from(peer.reach),
        )
        standard = [("User-Agent", _CLIENT_ID), ("Accept", "application/json"), ("Accept-Encoding", "identity")]
        return await self._sender.send(method, url, [*standard, *headers], route=route, phase="auth", body=body)


def _checked_realm(peer: Peer, challenge: Challenge) -> str:
    try:
        return check_realm(challenge.parameters["realm"], peer.base, trusted_token_hosts(peer.host))
    except ImgsvcError as error:
        raise RequestFailed(
            error.what, code="PERMISSION_DENIED", failure=Failure.DEFINITE, phase="auth", status=401, where=shown_url(peer.base)
        ) from error


def _oauth_form(service: str, scopes: Sequence[str], credential: Credential | None) -> dict[str, str]:
    """The form of distribution's oauth2 POST; {} without credentials."""
    if credential is None:
        return {}
    form = {"client_id": _CLIENT_ID, "service": service, "scope": " ".join(scopes)}
    refresh = credential.identity_token or (credential.password if credential.username in ("", _TOKEN_USER) else "")
    if refresh:
        return {"grant_type": "refresh_token", **form, "refresh_token": refresh}
    return {"grant_type": "password", **form, "access_type": "offline", "username": credential.username, "password": credential.password}


def _basic(credential: Credential) -> str:
    secret = credential.password or credential.identity_token
    user = credential.username or _TOKEN_USER
    return "Basic " + base64.b64encode(f"{user}:{secret}".encode("utf-8", "surrogateescape")).decode("ascii")


async def _read_token(response: httpx.Response) -> Token:
    where = shown_url(url_of(response))
    try:
        return parse_token(await read_body(response, MAX_TOKEN_BODY), where)
    except RequestFailed:
        raise
    except ImgsvcError as error:
        raise RequestFailed(error.what, code=error.code, failure=Failure.LIED, phase="auth", status=200, where=where) from error


async def _token_error(response: httpx.Response, realm: str, scopes: Sequence[str], credential: Credential | None) -> RequestFailed:
    body = await read_start(response, MAX_ERROR_BODY)
    words = registry_message(body, header_of(response, "content-type"), secrets_of(credential))
    status = response.status_code
    codes = {401: "UNAUTHENTICATED", 403: "PERMISSION_DENIED", 429: "RESOURCE_EXHAUSTED"}
    code = codes.get(status, "UNAVAILABLE" if status >= 500 else "UNAUTHENTICATED")
    what = f"token service answered {status}" + (f" ({words})" if words else "") + f" for scope {printable(' '.join(scopes), 160)}"
    if 300 <= status < 400:
        what = f"token service answered {status}: a redirect to another host, which is not followed"
    failure = kind_of_status(status, bool(header_of(response, "retry-after")))
    wait = retry_after(header_of(response, "retry-after"), datetime.now(UTC))
    hint = "is the credential right, and allowed to do this?" if credential and status in (401, 403) else ""
    return RequestFailed(what, code=code, failure=failure, phase="auth", status=status, where=shown_url(realm), hint=hint, wait=wait)


def secrets_of(credential: Credential | None) -> tuple[str, ...]:
    """Strings that must not show up in any text."""
    if credential is None:
        return ()
    basic = _basic(credential).removeprefix("Basic ") if credential.username or credential.identity_token else ""
    return tuple(s for s in (credential.password, credential.identity_token, credential.registry_token, basic) if s)


def _remember(cache: OrderedDict[_K, _V], key: _K, value: _V) -> None:
    cache[key] = value
    cache.move_to_end(key)
    if len(cache) > _MAX_CACHED:
        cache.popitem(last=False)
