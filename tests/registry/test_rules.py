"""The pure parts: challenges, retries, health, ranges, addresses, proxies, redaction."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import jwt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from imgsvc.base.errors import ImgsvcError
from imgsvc.registry.auth.challenge import check_realm, choose, parse_challenges, parse_token, scopes_for, usable_for
from imgsvc.registry.auth.claims import claims_of
from imgsvc.registry.http.netguard import Reach, allowed_from, reach_of
from imgsvc.registry.http.proxies import proxy_for
from imgsvc.registry.http.redact import registry_message, scrubbed, shown_url
from imgsvc.registry.ranges import MIN_SPAN, Plan, Span, Tuner, partial_problem
from imgsvc.registry.retry import Action, Failure, Health, decide, kind_of_status, retry_after


@pytest.mark.parametrize(
    "headers, expected",
    [
        (["Basic realm=x"], [("basic", {"realm": "x"})]),
        (['BEARER Realm="https://a/t?x=1,2",service="s"'], [("bearer", {"realm": "https://a/t?x=1,2", "service": "s"})]),
        (['Bearer realm="a\\"b" , scope = "repository:x:pull,push"'], [("bearer", {"realm": 'a"b', "scope": "repository:x:pull,push"})]),
        (['Basic realm="x", Bearer realm="y"'], [("basic", {"realm": "x"}), ("bearer", {"realm": "y"})]),
        (["Basic realm=x", 'Bearer realm="y"'], [("basic", {"realm": "x"}), ("bearer", {"realm": "y"})]),
        (["Negotiate", "Negotiate dG9rZW4="], [("negotiate", {}), ("negotiate", {})]),
        (['Negotiate dG9rZW4=, Basic realm="x"'], [("negotiate", {}), ("basic", {"realm": "x"})]),
        (['Bearer realm="first",realm="second"'], [("bearer", {"realm": "first"})]),
        (["", ",,,"], []),
    ],
)
def test_challenges(headers: list[str], expected: list[tuple[str, dict[str, str]]]) -> None:
    assert [(c.scheme, dict(c.parameters)) for c in parse_challenges(headers)] == expected


@given(st.lists(st.text(alphabet='Bearsic =",\\\n\tx', max_size=40), max_size=3))
def test_any_challenge_text_is_survived(headers: list[str]) -> None:
    choose(parse_challenges(headers), has_secret=True)


def test_bearer_is_preferred_and_basic_needs_a_secret() -> None:
    both = parse_challenges(['Basic realm="x", Bearer realm="https://y"'])
    basic = parse_challenges(["Basic"])
    chosen = choose(both, has_secret=True)
    assert chosen is not None
    assert chosen.scheme == "bearer"
    assert choose(basic, has_secret=False) is None
    assert choose(basic, has_secret=True) is not None


@pytest.mark.parametrize(
    "asked, wanted, expected",
    [
        ("", ["repository:a:pull"], ("repository:a:pull",)),
        ("repository:a:pull", ["repository:a:pull,push"], ("repository:a:pull,push",)),
        ("repository:a:pull repository:b:pull", ["repository:a:pull"], ("repository:a:pull", "repository:b:pull")),
        ("repository:proj/a:pull", ["repository:a:pull"], ("repository:proj/a:pull",)),
        ("repository:a:pull,push", ["repository:a:pull,push", "repository:from:pull"], ("repository:a:pull,push", "repository:from:pull")),
        ("nonsense \x00:x", ["repository:a:pull"], ("repository:a:pull",)),
    ],
)
def test_scopes(asked: str, wanted: list[str], expected: tuple[str, ...]) -> None:
    challenge = parse_challenges([f'Bearer realm="x",scope="{asked}"'])[0]
    assert scopes_for(challenge, wanted) == expected


@pytest.mark.parametrize(
    "realm, endpoint, verdict",
    [
        ("https://r.test/token", "https://r.test/v2", "ok"),
        ("https://r.test:8443/token", "https://r.test/v2", "ok"),
        ("https://auth.r.test/token", "https://r.test/v2", "withheld"),
        ("https://r.test.evil/token", "https://r.test/v2", "withheld"),
        ("http://r.test/token", "https://r.test/v2", "refused"),
        ("http://r.test/token", "http://r.test/v2", "ok"),
        ("https://u@r.test/token", "https://r.test/v2", "refused"),
        ("https://r.test:x/token", "https://r.test/v2", "refused"),
        ("https://r.test/ token", "https://r.test/v2", "refused"),
        ("", "https://r.test/v2", "refused"),
        ("//r.test/token", "https://r.test/v2", "refused"),
    ],
)
def test_c_r5_realms(realm: str, endpoint: str, verdict: str) -> None:
    try:
        found = "withheld" if check_realm(realm, endpoint, frozenset({"r.test"})) else "ok"
    except ImgsvcError:
        found = "refused"
    assert found == verdict


@pytest.mark.parametrize(
    "body, lifetime",
    [
        (b'{"token":"a"}', 60),
        (b'{"access_token":"a","expires_in":300}', 300),
        (b'{"token":"a","expires_in":-5}', 60),
        (b'{"token":"a","expires_in":true}', 60),
        (b'{"token":"a","expires_in":1e300}', 86400),
    ],
)
def test_a4_5_token_lifetimes(body: bytes, lifetime: float) -> None:
    token = parse_token(body, "t")
    assert token.lifetime == lifetime
    assert 0 < usable_for(token) < lifetime
    assert "'a'" not in repr(token)


def signed(**claims: object) -> str:
    return jwt.encode(claims, "k" * 32)


ISSUED = int(time.time())


@pytest.mark.parametrize(
    "claims, answered, lifetime",
    [
        ({"iat": ISSUED, "exp": ISSUED + 30}, {}, 30),
        ({"iat": ISSUED, "exp": ISSUED + 30}, {"expires_in": 300}, 30),
        ({"iat": ISSUED, "exp": ISSUED + 900}, {"expires_in": 300}, 300),
        ({"iat": ISSUED, "exp": ISSUED + 900}, {}, 60),
        ({"iat": 1000, "exp": 1030}, {"expires_in": 300}, 30),  # a clock that is not ours
        ({"exp": 1000}, {"expires_in": 300}, 1),
        ({"iat": 30, "exp": 20}, {}, 1),
        ({"exp": 1e300}, {"expires_in": 300}, 300),
        ({"sub": "robot"}, {"expires_in": 300}, 300),
    ],
)
def test_a_token_is_not_used_for_longer_than_it_says_itself(
    claims: dict[str, object], answered: dict[str, object], lifetime: float
) -> None:
    token = parse_token(json.dumps({"token": signed(**claims), **answered}).encode(), "t")
    assert token.lifetime == lifetime
    assert 0 < usable_for(token) < lifetime


@pytest.mark.parametrize(
    "claims, told",
    [
        ({"sub": "robot", "exp": 0}, 'for "robot", until 1970-01-01T00:00:00Z'),
        ({"sub": ""}, "without a subject, without an end"),
        ({"sub": ["a"], "exp": "soon", "iat": True}, "without a subject, without an end"),
        ({"sub": "a\x1b" + "b" * 1000}, 'for "a'),
    ],
)
def test_a_token_is_told_of_without_its_value(claims: dict[str, object], told: str) -> None:
    found = str(claims_of(signed(**claims)))
    assert found.startswith(told)
    assert "\x1b" not in found
    assert len(found) < 200


@pytest.mark.parametrize(
    "token", ["", "opaque", "eyJ", "eyJh.a.b", "eyJ.e30.", "eyJhbGciOiJub25lIn0.WzFd.", "eyJhbGciOiJub25lIn0." + "W1tb" * 15000 + "."]
)
def test_a_token_that_is_no_jwt_says_nothing(token: str) -> None:
    assert claims_of(token) is None


@pytest.mark.parametrize("body", [b"", b"[]", b'{"token":1}', b'{"token":"a\\nX: y"}', b'{"token":""}', b'{"token":"a b"}'])
def test_unusable_tokens(body: bytes) -> None:
    with pytest.raises(ImgsvcError):
        parse_token(body, "t")


ME = "an identity"
NOW = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.mark.parametrize(
    "value, seconds",
    [
        ("3", 3),
        (" 0 ", 0),
        ("1000000000", 300),
        ("9" * 400, 300),
        ("-1", None),
        ("1.5", None),
        ("", None),
        ("x", None),
        (format_datetime(NOW + timedelta(seconds=30), usegmt=True), 30),
        (format_datetime(NOW - timedelta(seconds=30), usegmt=True), None),
        (format_datetime(NOW + timedelta(days=30), usegmt=True), 300),
        ("Thu, 99 Foo 2026 99:99:99 GMT", None),
    ],
)
def test_retry_after(value: str, seconds: float | None) -> None:
    assert retry_after(value, NOW) == seconds


@pytest.mark.parametrize(
    "failure, tries, is_last, parked, budget, action",
    [
        (Failure.DEFINITE, 1, True, 0, True, Action.NEXT_HOST),
        (Failure.LIED, 1, True, 0, True, Action.NEXT_HOST),
        (Failure.BROKEN, 1, False, 0, True, Action.RETRY),
        (Failure.BROKEN, 2, False, 0, True, Action.NEXT_HOST),
        (Failure.BROKEN, 3, True, 0, True, Action.RETRY),
        (Failure.BROKEN, 4, True, 0, True, Action.NEXT_HOST),
        (Failure.BROKEN, 1, True, 0, False, Action.NEXT_HOST),
        (Failure.UNREACHABLE, 1, False, 0, True, Action.NEXT_HOST),
        (Failure.UNREACHABLE, 1, True, 0, True, Action.RETRY),
        (Failure.LIMITED, 1, False, 5, True, Action.NEXT_HOST),
        (Failure.LIMITED, 1, True, 5, True, Action.RETRY),
        (Failure.LIMITED, 1, True, 500, True, Action.NEXT_HOST),
    ],
)
def test_decisions(failure: Failure, tries: int, is_last: bool, parked: float, budget: bool, action: Action) -> None:
    decision = decide(failure, tries, is_last=is_last, parked_for=parked, jitter=0.5, has_budget=budget)
    assert decision.action is action
    if action is Action.RETRY:
        assert decision.delay >= parked
        assert decision.delay > 0


def test_statuses() -> None:
    assert kind_of_status(429, has_retry_after=False) is Failure.LIMITED
    assert kind_of_status(503, has_retry_after=True) is Failure.LIMITED
    assert kind_of_status(503, has_retry_after=False) is Failure.BROKEN
    assert kind_of_status(404, has_retry_after=False) is Failure.DEFINITE


def test_a3_2_the_circuit_opens_probes_once_and_closes() -> None:
    health = Health()
    for _ in range(3):
        assert not health.refusal(0, ME, is_last=False)
        health.unreachable(0)
    assert "circuit open" in health.refusal(1, ME, is_last=False)
    assert not health.refusal(1, ME, is_last=True), "the last host is always asked"
    assert not health.refusal(11, ME, is_last=False), "the probe"
    assert "probing" in health.refusal(11, ME, is_last=False)
    health.unreachable(11)
    assert "circuit open" in health.refusal(25, ME, is_last=False), "longer the second time"
    health.succeeded()
    assert not health.refusal(25, ME, is_last=False)


def test_parking_grows_without_a_number() -> None:
    health = Health()
    health.limited(0, 3, ME)
    assert health.parked_for(1, ME) == 2
    assert "rate limited" in health.refusal(1, ME, is_last=True)
    assert not health.refusal(3, ME, is_last=True)
    waits = []
    for at in (10, 100, 200):
        health.limited(at, None, ME)
        waits.append(health.parked_for(at, ME))
    assert waits == sorted(waits)
    assert waits[0] < waits[-1] <= 60


def test_the_retry_budget_runs_out_and_grows_back() -> None:
    health = Health()
    taken = sum(health.take_retry(0, ME) for _ in range(100))
    assert taken == 20
    assert health.take_retry(10, ME)


def test_a_plan_covers_everything_once() -> None:
    plan = Plan([(0, 10 * MIN_SPAN), (20 * MIN_SPAN, MIN_SPAN)])
    first, second = plan.take(), plan.take()
    assert first is not None
    assert second is not None
    assert (first.position, first.end, second.left) == (0, 10 * MIN_SPAN, MIN_SPAN)
    half = plan.take()
    assert half is not None
    assert (first.end, half.position, half.end) == (5 * MIN_SPAN, 5 * MIN_SPAN, 10 * MIN_SPAN)
    first.position = 4 * MIN_SPAN
    plan.finish(first)
    again = plan.take()
    assert again is not None
    assert (again.position, again.end) == (4 * MIN_SPAN, 5 * MIN_SPAN)
    for span in (half, second, again):
        span.position = span.end
        plan.finish(span)
    assert plan.left == 0
    assert plan.take() is None


def test_small_rests_are_not_split() -> None:
    plan = Plan([(0, 2 * MIN_SPAN - 1)])
    assert plan.take() is not None
    assert plan.take() is None


def test_tuning_stops_where_more_brings_nothing() -> None:
    tuner = Tuner()
    tuner.sample(1, 100)
    assert tuner.target == 2
    tuner.sample(1, 100)
    assert tuner.target == 2, "not measured with two yet"
    tuner.sample(2, 200)
    tuner.sample(4, 210)
    assert tuner.target == 2
    tuner.sample(2, 900)
    assert tuner.target == 2, "settled"
    slow = Tuner(most=4)
    slow.sample(1, 10)
    slow.sample(2, 20)
    slow.sample(4, 40)
    assert slow.target == 4
    slow.limit(3)
    assert slow.target == 3


@pytest.mark.parametrize(
    "header, is_fine",
    [
        ("bytes 10-19/100", True),
        ("bytes 10-19/*", True),
        ("bytes 0-9/100", False),
        ("bytes 10-18/100", False),
        ("bytes 10-19/101", False),
        ("bytes */100", False),
        ("10-19/100", False),
        ("", False),
        ("bytes 10-19/100, bytes 0-9/100", False),
    ],
)
def test_content_range(header: str, is_fine: bool) -> None:
    assert (partial_problem(header, 10, 20, 100) == "") == is_fine
    assert Span(3, 9).left == 6


@pytest.mark.parametrize(
    "address, reach",
    [
        ("8.8.8.8", Reach.PUBLIC),
        ("10.1.2.3", Reach.PRIVATE),
        ("fd00::1", Reach.PRIVATE),
        ("100.64.0.1", Reach.PRIVATE),
        ("127.0.0.1", Reach.LOOPBACK),
        ("::1", Reach.LOOPBACK),
        ("::ffff:127.0.0.1", Reach.LOOPBACK),
        ("64:ff9b::7f00:1", Reach.LOOPBACK),
        ("2002:7f00:1::", Reach.LOOPBACK),
        ("169.254.169.254", Reach.LINK_LOCAL),
        ("::ffff:169.254.169.254", Reach.LINK_LOCAL),
        ("fe80::1%eth0", Reach.LINK_LOCAL),
        ("0.0.0.0", Reach.SPECIAL),
        ("224.0.0.1", Reach.SPECIAL),
        ("not an address", Reach.SPECIAL),
    ],
)
def test_addresses(address: str, reach: Reach) -> None:
    assert reach_of(address) is reach


def test_where_servers_may_send_us() -> None:
    assert Reach.LOOPBACK not in allowed_from(Reach.PUBLIC)
    assert Reach.LINK_LOCAL not in allowed_from(Reach.LOOPBACK)
    assert Reach.LOOPBACK in allowed_from(Reach.LOOPBACK)


@pytest.mark.parametrize(
    "url, environ, expected",
    [
        ("https://r.test/v2", {"HTTPS_PROXY": "http://p:1"}, "http://p:1"),
        ("https://r.test/v2", {"https_proxy": "p:1"}, "http://p:1"),
        ("http://r.test/v2", {"HTTPS_PROXY": "http://p:1"}, ""),
        ("http://r.test/v2", {"HTTP_PROXY": "http://p:1"}, "http://p:1"),
        ("http://r.test/v2", {"HTTP_PROXY": "http://p:1", "REQUEST_METHOD": "GET"}, ""),
        ("https://localhost:5000/v2", {"HTTPS_PROXY": "http://p:1"}, ""),
        ("https://127.0.0.2/v2", {"HTTPS_PROXY": "http://p:1"}, ""),
        ("https://r.test/v2", {"HTTPS_PROXY": "http://p:1", "NO_PROXY": "*"}, ""),
        ("https://r.test/v2", {"HTTPS_PROXY": "http://p:1", "NO_PROXY": "r.test"}, ""),
        ("https://a.r.test/v2", {"HTTPS_PROXY": "http://p:1", "no_proxy": "x, r.test"}, ""),
        ("https://a.r.test/v2", {"HTTPS_PROXY": "http://p:1", "NO_PROXY": ".r.test"}, ""),
        ("https://r.test/v2", {"HTTPS_PROXY": "http://p:1", "NO_PROXY": ".r.test"}, "http://p:1"),
        ("https://notr.test/v2", {"HTTPS_PROXY": "http://p:1", "NO_PROXY": "r.test"}, "http://p:1"),
        ("https://r.test:5000/v2", {"HTTPS_PROXY": "http://p:1", "NO_PROXY": "r.test:5000"}, ""),
        ("https://r.test:5001/v2", {"HTTPS_PROXY": "http://p:1", "NO_PROXY": "r.test:5000"}, "http://p:1"),
        ("https://10.1.2.3/v2", {"HTTPS_PROXY": "http://p:1", "NO_PROXY": "10.0.0.0/8"}, ""),
        ("https://11.1.2.3/v2", {"HTTPS_PROXY": "http://p:1", "NO_PROXY": "10.0.0.0/8"}, "http://p:1"),
        ("https://[2001:db8::1]/v2", {"HTTPS_PROXY": "http://p:1", "NO_PROXY": "2001:db8::/32"}, ""),
    ],
)
def test_a5_4_proxies_from_the_environment(url: str, environ: dict[str, str], expected: str) -> None:
    assert proxy_for(url, "", environ) == expected


def test_a5_4_a_hosts_own_proxy_outranks_the_environment() -> None:
    environ = {"HTTPS_PROXY": "http://env:1", "NO_PROXY": "*"}
    assert proxy_for("https://r.test", "http://own:1", environ) == "http://own:1"
    assert proxy_for("https://r.test", "direct", {"HTTPS_PROXY": "http://env:1"}) == ""


def test_redaction() -> None:
    assert shown_url("https://u:p@h/x?sig=abc&ns=docker.io") == "https://h/x?sig=REDACTED&ns=docker.io"
    assert scrubbed("it is s3cret!\x1b[0m", ["s3cret"]) == "it is REDACTED!\\x1b[0m"
    assert registry_message(b'{"errors":[{"code":"A","message":"b","detail":{}}]}', "") == "A: b"
    assert registry_message(b"<html>x", "text/html") == "an HTML page"
    page = b"<html><head><TITLE>400 The plain HTTP request\n was sent to HTTPS port</title>"
    assert registry_message(page, "text/html") == 'an HTML page "400 The plain HTTP request was sent to HTTPS port"'
    assert len(registry_message(b"x" * 60_000, "text/plain")) < 400
