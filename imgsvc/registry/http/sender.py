"""The httpx client that every request passes: its hooks see them all, whichever transport answers.

Redirects, challenges, retries and proxies are decided in endpoint.py and above it, so httpx is told to do nothing of the kind.
"""

from __future__ import annotations

import http.cookiejar
from collections.abc import Sequence

import httpx

from imgsvc.registry.http.exchange import Body, Route, Timeouts, log_exchange, note_start, request_for


class _NoCookies(http.cookiejar.CookieJar):
    """A registry client has none, and keeps none of a server that hands them out."""

    def extract_cookies(self, response: object, request: object) -> None:
        """Nothing."""


class Sender:
    """Sends requests over one transport. timeouts: for those that begin from now on. Belongs to one event loop."""

    def __init__(self, transport: httpx.AsyncBaseTransport, timeouts: Timeouts) -> None:
        self.timeouts = timeouts
        self.client = httpx.AsyncClient(
            transport=transport,
            auth=httpx.Auth(),  # which adds nothing; without it a user name in a URL would become a credential
            cookies=_NoCookies(),
            trust_env=False,
            event_hooks={"request": [note_start], "response": [log_exchange]},
        )

    async def send(
        self,
        method: str,
        url: str,
        headers: Sequence[tuple[str, str]],
        *,
        route: Route,
        phase: str,
        body: Body = b"",
        length: int | None = None,
    ) -> httpx.Response:
        """Send one request and wait for the answer's head; the caller closes it. `length`: of a streamed body [bytes].

        Raises: RequestFailed; InvalidArgument when TLS files cannot be used; Unavailable when there is no process to be had.
        """
        request = request_for(method, url, headers, route=route, phase=phase, timeouts=self.timeouts, body=body, length=length)
        return await self.client.send(request, stream=True)

    async def close(self) -> None:
        """Close the transport."""
        await self.client.aclose()
