"""Resolving and following mirrors: who is asked what, in which order, and what a failure says."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from imgsvc.base.errors import FailedPrecondition, InvalidArgument
from imgsvc.base.oci import OCI_MANIFEST
from imgsvc.base.reference import Reference
from imgsvc.registry.interfaces import Credential, PullFailed
from tests.fakes.registry import FakeRegistry, Reply, Request
from tests.registry.support import Bytes, blob, client_for, fails, hosts_d, image_of, pull, run

BUSYBOX = Reference.parse("busybox")


def test_the_first_able_mirror_answers_and_is_remembered(tmp_path: Path) -> None:
    async def main() -> None:
        with FakeRegistry() as first, FakeRegistry() as second:
            image = image_of()
            for fake in (first, second):
                fake.add(image, "library/busybox")
            hosts_d(tmp_path, {"docker.io": f'[host."{first.url}"]\n[host."{second.url}"]\n'})
            async with client_for(tmp_path) as client:
                resolved = await client.resolve(BUSYBOX)
                _, sources = await pull(client, "busybox")
            assert resolved.descriptor.digest == image.digest
            assert resolved.endpoint == f"{first.url}/v2"
            assert [a.status for a in resolved.attempts] == [200]
            assert all(set(source.by_endpoint) == {f"{first.url}/v2"} for source in sources.values())
            assert not second.requests

    run(main())


def test_a3_5_ns_goes_to_mirrors_only_and_can_be_switched_off(tmp_path: Path) -> None:
    async def main() -> None:
        with FakeRegistry() as quiet, FakeRegistry() as told, FakeRegistry() as own:
            own.add(image_of(), "app")
            hosts_d(tmp_path, {own.address: f'[host."{quiet.url}"]\nns = false\n[host."{told.url}"]\n'})
            async with client_for(tmp_path) as client:
                await client.resolve(Reference.parse(f"{own.address}/app"))
            assert "ns" not in quiet.requests[0].query
            assert told.requests[0].query["ns"] == [own.address]
            assert own.requests
            assert not any("ns" in request.query for request in own.requests)

    run(main())


def test_a2_9_a_rewritten_repository_is_pulled_pushed_and_named_in_scopes(tmp_path: Path) -> None:
    async def main() -> None:
        with FakeRegistry() as mirror:
            mirror.add(image_of(b"1", b"2"), "hub/official/app")
            mirror.rule(mirror.on("/uploads/", Reply(201)))
            mirror.rule(mirror.on("/token", Reply(200, body=b'{"token": "t"}')))
            challenge = {"WWW-Authenticate": f'Bearer realm="{mirror.url}/token",service="s"'}
            mirror.rule(lambda request: None if request.authorization or "/token" in request.path else Reply(401, challenge))
            text = f'server = "{mirror.url}"\nrewrite = "hub/official"\n'
            hosts_d(tmp_path, {"r.test/library": text})
            async with client_for(tmp_path) as client:
                await pull(client, "r.test/library/app")
                repository = client.repository(Reference.parse("r.test/library/copy"))
                assert not await repository.push_blob(blob(b"new"), Bytes(b"new"), mount_from="library/app"), "mounted"
            assert {r.path for r in mirror.seen("manifests", "HEAD")} == {"/v2/hub/official/app/manifests/latest"}
            assert not mirror.seen("library")
            assert {r.query["scope"][0] for r in mirror.seen("/token")} >= {"repository:hub/official/app:pull"}
            assert mirror.seen("uploads", "POST")[0].query["from"] == ["hub/official/app"]

    run(main())


@pytest.mark.parametrize("status", [401, 403, 404, 429, 500])
def test_a3_1_every_kind_of_failure_falls_through_and_is_listed(tmp_path: Path, status: int) -> None:
    async def main() -> None:
        with FakeRegistry() as bad, FakeRegistry() as good:
            bad.rule(lambda _: Reply(status))
            good.add(image_of(), "library/busybox")
            hosts_d(tmp_path, {"docker.io": f'server = "{good.url}"\n[host."{bad.url}"]\n'})
            async with client_for(tmp_path) as client:
                resolved = await client.resolve(BUSYBOX)
            assert resolved.endpoint == f"{good.url}/v2"
            assert status in {a.status for a in resolved.attempts}

    run(main())


def test_a4_4_the_words_to_a_refused_head_are_asked_for_when_all_is_lost_and_only_then(tmp_path: Path) -> None:
    async def main() -> None:
        with FakeRegistry() as mirror, FakeRegistry() as quiet, FakeRegistry() as own:
            challenge = {"WWW-Authenticate": f'Bearer realm="{own.url}/token",service="s"'}
            own.rule(
                own.on(
                    "/v2/secret", Reply(401, challenge, b'{"errors":[{"code":"UNAUTHORIZED","message":"no such project, or not yours"}]}')
                )
            )
            own.rule(own.on("/token", Reply(200, body=b'{"token": "t"}')))
            own.add(image_of(), "app")
            table = f'[host."{mirror.url}"]\n[host."{quiet.url}"]\ncapabilities = ["resolve"]\n'
            hosts_d(tmp_path, {own.address: table})
            async with client_for(tmp_path) as client:
                await client.resolve(Reference.parse(f"{own.address}/app"))
                assert not any(fake.seen(method="GET") for fake in (mirror, quiet, own)), "the mirror's 404 is nobody's concern"
                with pytest.raises(PullFailed) as gone:
                    await client.resolve(Reference.parse(f"{own.address}/absent"))
                with pytest.raises(PullFailed) as refused:
                    await client.resolve(Reference.parse(f"{own.address}/secret"))
            assert gone.value.code == "NOT_FOUND"
            assert "GET answered 404 (MANIFEST_UNKNOWN: not known here)" in gone.value.what.partition("(tried")[0]
            assert [a.status for a in gone.value.attempts] == [404, 404, 404]
            assert "UNAUTHORIZED: no such project, or not yours" in refused.value.what
            assert len(own.seen("/v2/secret", "GET")) == 1
            assert len(own.seen("/token")) == 2, "both of the HEAD: the token might have been a stale one"
            assert not quiet.seen(method="GET"), "it may not be asked for content"

    run(main())


def test_a_server_that_speaks_something_else_is_named_so(tmp_path: Path) -> None:
    async def main() -> None:
        async def alert(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            """As OpenSSL does to HTTP on its port."""
            await reader.read(1)
            writer.write(b"\x15\x03\x01\x00\x02\x02\x46")
            writer.close()

        async with await asyncio.start_server(alert, "127.0.0.1") as server, client_for(tmp_path) as client:
            port = server.sockets[0].getsockname()[1]
            hosts_d(tmp_path, {"r.test": f'server = "http://127.0.0.1:{port}"\n'})
            with pytest.raises(PullFailed, match="not HTTP") as caught:
                await client.resolve(Reference.parse("r.test/app"))
        assert "https://" in caught.value.hint
        assert len(caught.value.attempts) == 1

    run(main())


def test_a4_7_a_proxy_that_is_down_and_a_credential_that_is_missing_or_wrong_are_named(tmp_path: Path) -> None:
    async def main() -> None:
        with FakeRegistry() as own:
            own.rule(lambda _: Reply(401, {"WWW-Authenticate": 'Basic realm="r"'}))
            hosts_d(tmp_path, {"proxied.test": f'server = "{own.url}"\nproxy = "http://u:secret@127.0.0.1:1"\n'})
            found = []
            async with client_for(tmp_path) as client:
                for host, credential in (("proxied.test", None), (own.address, None), (own.address, Credential("a pod", "u", "secret"))):
                    with pytest.raises(PullFailed) as caught:
                        await client.resolve(Reference.parse(f"{host}/app"), credential)
                    found.append(str(caught.value))
        down, missing, wrong = found
        assert "proxy http://127.0.0.1:1: Connection refused" in down
        assert "hosts explain" in down
        assert "credential none" in missing
        assert "--creds" in missing
        assert "credential a pod" in wrong
        assert "is the credential right" in wrong
        assert not any("secret" in text for text in found)

    run(main())


def test_a5_1_a_rate_limited_head_is_not_followed_by_a_get(tmp_path: Path) -> None:
    async def main() -> None:
        with FakeRegistry() as own:
            own.rule(lambda _: Reply(429, {"Retry-After": "3600"}))
            async with client_for(tmp_path) as client:
                with pytest.raises(PullFailed):
                    await client.resolve(Reference.parse(f"{own.address}/app"))
            assert [request.method for request in own.requests] == ["HEAD"]

    run(main())


def test_a2_6_a_failure_lists_every_endpoint_with_its_cause(tmp_path: Path) -> None:
    with FakeRegistry() as absent, FakeRegistry() as forbidden:
        body = b'{"errors":[{"code":"DENIED","message":"quota of team blue"}]}'
        forbidden.rule(lambda _: Reply(403, {"Content-Type": "application/json"}, body))
        hosts_d(tmp_path, {"docker.io": f'server = "{absent.url}"\n[host."http://127.0.0.1:1"]\n[host."{forbidden.url}"]\n'})

        async def main() -> None:
            async with client_for(tmp_path) as client:
                await client.resolve(BUSYBOX)

        error = fails(main())
    assert isinstance(error, PullFailed)
    assert error.code == "PERMISSION_DENIED"
    assert "quota of team blue" in str(error)
    assert {a.endpoint for a in error.attempts} == {"http://127.0.0.1:1/v2", f"{absent.url}/v2", f"{forbidden.url}/v2"}
    assert {a.phase for a in error.attempts} >= {"connect", "resolve"}


def test_not_found_at_the_registry_itself_outranks_a_dead_mirror(tmp_path: Path) -> None:
    with FakeRegistry() as own:
        hosts_d(tmp_path, {own.address: '[host."http://127.0.0.1:1"]\n'})

        async def main() -> None:
            async with client_for(tmp_path) as client:
                await client.resolve(Reference.parse(f"{own.address}/app"))

        assert fails(main()).code == "NOT_FOUND"


@pytest.mark.parametrize("capability", ["resolve", "pull"])
def test_a2_7_capabilities_hold_for_every_operation(tmp_path: Path, capability: str) -> None:
    async def main() -> None:
        with FakeRegistry() as limited, FakeRegistry() as full:
            image = image_of()
            for fake in (limited, full):
                fake.add(image, "library/busybox")
            hosts_d(tmp_path, {"docker.io": f'server = "{full.url}"\n[host."{limited.url}"]\ncapabilities = ["{capability}"]\n'})
            async with client_for(tmp_path) as client:
                await pull(client, "busybox")
            methods = {request.method for request in limited.requests}
            assert methods == ({"HEAD"} if capability == "resolve" else {"GET"})
            if capability == "pull":
                assert {r.method for r in full.requests} == {"HEAD"}

    run(main())


@pytest.mark.parametrize("capability", ["push", "referrers"])
def test_a2_7_hosts_for_other_things_see_nothing_of_a_pull(tmp_path: Path, capability: str) -> None:
    async def main() -> None:
        with FakeRegistry() as other, FakeRegistry() as full:
            full.add(image_of(), "library/busybox")
            hosts_d(tmp_path, {"docker.io": f'server = "{full.url}"\n[host."{other.url}"]\ncapabilities = ["{capability}"]\n'})
            async with client_for(tmp_path) as client:
                await pull(client, "busybox")
            assert not other.requests

    run(main())


def test_a_digest_may_be_looked_up_where_tags_may_not(tmp_path: Path) -> None:
    async def main() -> None:
        with FakeRegistry() as mirror:
            image = image_of()
            mirror.add(image, "library/busybox")
            hosts_d(tmp_path, {"docker.io": f'fallback = false\n[host."{mirror.url}"]\ncapabilities = ["pull"]\n'})
            async with client_for(tmp_path) as client:
                resolved = await client.resolve(Reference.parse(f"busybox@{image.digest}"))
                assert resolved.descriptor.digest == image.digest
                with pytest.raises(PullFailed) as caught:
                    await client.resolve(BUSYBOX)
            assert caught.value.code == "FAILED_PRECONDITION"

    run(main())


@pytest.mark.parametrize(
    "without, expected_gets",
    [({"Docker-Content-Digest"}, 1), ({"Content-Type"}, 1), (set(), 0)],
)
def test_get_follows_a_head_that_says_too_little(tmp_path: Path, without: set[str], expected_gets: int) -> None:
    async def main() -> None:
        with FakeRegistry() as fake:
            image = image_of()
            fake.add(image, "library/busybox")

            def strip(request: Request) -> Reply:
                reply = fake.honest(request)
                return Reply(reply.status, {k: v for k, v in reply.headers.items() if k not in without}, reply.body)

            fake.rule(fake.on("/manifests/", strip))
            hosts_d(tmp_path, {"docker.io": f'server = "{fake.url}"\n'})
            async with client_for(tmp_path) as client:
                resolved = await client.resolve(BUSYBOX)
            assert resolved.descriptor.digest == image.digest
            assert resolved.descriptor.media_type == OCI_MANIFEST
            assert len(fake.seen(method="GET")) == expected_gets
            assert (resolved.document == image.data) == bool(expected_gets)

    run(main())


def test_get_follows_a_head_that_is_not_supported(tmp_path: Path) -> None:
    async def main() -> None:
        with FakeRegistry() as fake:
            fake.add(image_of(), "library/busybox")
            fake.rule(fake.on("/manifests/", Reply(405), "HEAD"))
            hosts_d(tmp_path, {"docker.io": f'server = "{fake.url}"\n'})
            async with client_for(tmp_path) as client:
                assert (await client.resolve(BUSYBOX)).document is not None

    run(main())


def test_a4_4_the_reason_behind_a_403_on_head_is_fetched(tmp_path: Path) -> None:
    with FakeRegistry() as fake:
        body = b'{"errors":[{"code":"DENIED","message":"licence expired"}]}'
        fake.rule(fake.on("/manifests/", Reply(403, {}, body)))
        hosts_d(tmp_path, {"docker.io": f'server = "{fake.url}"\n'})

        async def main() -> None:
            async with client_for(tmp_path) as client:
                await client.resolve(BUSYBOX)

        assert "DENIED: licence expired" in str(fails(main()))


def test_a2_4_a_web_page_instead_of_a_manifest_names_the_url(tmp_path: Path) -> None:
    with FakeRegistry() as fake:
        fake.rule(lambda _: Reply(200, {"Content-Type": "text/html; charset=utf-8"}, b"<html>portal</html>"))
        hosts_d(tmp_path, {"docker.io": f'server = "{fake.url}/v2/project"\n'})

        async def main() -> None:
            async with client_for(tmp_path) as client:
                await client.resolve(BUSYBOX)

        error = fails(main())
    assert f"{fake.url}/v2/project/v2/library/busybox/manifests/latest" in str(error)
    assert "override_path" in str(error)


def test_a2_4_override_path_leads_into_a_project(tmp_path: Path) -> None:
    async def main() -> None:
        with FakeRegistry() as fake:
            fake.add(image_of(), "project/library/busybox")
            hosts_d(tmp_path, {"docker.io": f'fallback = false\n[host."{fake.url}/v2/project"]\noverride_path = true\n'})
            async with client_for(tmp_path) as client:
                await pull(client, "busybox")

    run(main())


def test_changed_files_take_effect_on_the_next_pull(tmp_path: Path) -> None:
    async def main() -> None:
        with FakeRegistry() as old, FakeRegistry() as new:
            for fake in (old, new):
                fake.add(image_of(), "library/busybox")
            hosts_d(tmp_path, {"docker.io": f'server = "{old.url}"\n'})
            async with client_for(tmp_path) as client:
                assert (await client.resolve(BUSYBOX)).endpoint == f"{old.url}/v2"
                hosts_d(tmp_path, {"docker.io": f'server = "{new.url}"\n'})
                assert (await client.resolve(BUSYBOX)).endpoint == f"{new.url}/v2"
                hosts_d(tmp_path, {"docker.io": "server = \n"})
                with pytest.raises(InvalidArgument):
                    await client.resolve(BUSYBOX)

    run(main())


def test_blocked_namespaces_are_refused_without_a_request(tmp_path: Path) -> None:
    with FakeRegistry() as fake:
        hosts_d(tmp_path, {"docker.io": f'blocked = true\nserver = "{fake.url}"\n'})

        async def main() -> None:
            async with client_for(tmp_path) as client:
                await client.resolve(BUSYBOX)

        error = fails(main())
    assert isinstance(error, FailedPrecondition)
    assert error.where.endswith("hosts.toml:1:1")
    assert not fake.requests


def test_resolving_is_one_flight_per_reference_and_identity(tmp_path: Path) -> None:
    async def main() -> None:
        with FakeRegistry() as fake:
            fake.add(image_of(), "library/busybox")
            fake.rule(fake.on("/manifests/", lambda r: replace(fake.honest(r), delay=0.2)))
            hosts_d(tmp_path, {"docker.io": f'server = "{fake.url}"\n'})
            async with client_for(tmp_path) as client:
                people = [None, None, None, Credential("CRI request", "a", "secret-a"), Credential("CRI request", "b", "secret-b")]
                await asyncio.gather(*(client.resolve(BUSYBOX, who) for who in people))
            assert len(fake.requests) == 3

    run(main())


def test_a_compressed_manifest_is_decoded_within_bounds(tmp_path: Path) -> None:
    async def main(bomb: bool) -> None:
        with FakeRegistry() as fake:
            image = image_of()
            fake.add(image, "library/busybox")

            def zipped(request: Request) -> Reply | None:
                if request.method == "HEAD":
                    return None
                body = gzip.compress(b"\0" * 100_000 if bomb else image.data)
                return Reply(200, {"Content-Type": OCI_MANIFEST, "Content-Encoding": "gzip"}, body)

            fake.rule(fake.on("/manifests/", zipped))
            hosts_d(tmp_path, {"docker.io": f'server = "{fake.url}"\n'})
            async with client_for(tmp_path) as client:
                await pull(client, "busybox")

    run(main(bomb=False))
    assert fails(main(bomb=True)).code == "RESOURCE_EXHAUSTED"


def test_a2_12_plain_http_on_a_tls_port_is_said(tmp_path: Path) -> None:
    with FakeRegistry() as fake:
        hosts_d(tmp_path, {"docker.io": f'server = "https://{fake.address}"\n'})

        async def main() -> None:
            async with client_for(tmp_path) as client:
                await client.resolve(BUSYBOX)

        error = fails(main())
    assert "plain HTTP on a TLS port" in str(error)
    assert "http://" in error.hint


def test_localhost_without_configuration_speaks_http(tmp_path: Path) -> None:
    async def main() -> None:
        with FakeRegistry() as fake:
            fake.add(image_of(), "app")
            async with client_for(tmp_path) as client:
                await pull(client, f"{fake.address}/app")
                assert (await client.resolve(Reference.parse(f"{fake.address}/app"))).endpoint == f"http://{fake.address}/v2"

    run(main())


def test_a_document_that_is_not_what_its_own_header_says(tmp_path: Path) -> None:
    with FakeRegistry() as fake:
        image = image_of()
        headers = {"Content-Type": OCI_MANIFEST, "Docker-Content-Digest": str(image_of(b"other").digest)}
        fake.rule(fake.on("/manifests/", lambda r: Reply(405) if r.method == "HEAD" else Reply(200, headers, image.data)))
        hosts_d(tmp_path, {"docker.io": f'server = "{fake.url}"\n'})

        async def main() -> None:
            async with client_for(tmp_path) as client:
                await client.resolve(BUSYBOX)

        assert fails(main()).code == "DATA_LOSS"


def test_wrong_digest_for_a_digest_is_not_accepted(tmp_path: Path) -> None:
    with FakeRegistry() as fake:
        other, wanted = image_of(b"other"), image_of(b"wanted")
        fake.manifests[f"library/busybox/{wanted.digest}"] = (OCI_MANIFEST, other.data)
        hosts_d(tmp_path, {"docker.io": f'server = "{fake.url}"\n'})

        async def main() -> None:
            async with client_for(tmp_path) as client:
                await client.resolve(Reference.parse(f"busybox@{wanted.digest}"))

        error = fails(main())
    assert error.code == "DATA_LOSS"


def test_a3_2_a_dead_mirror_is_left_alone_after_a_while(tmp_path: Path) -> None:
    async def main() -> None:
        with FakeRegistry() as own:
            own.add(image_of(), "library/busybox")
            hosts_d(tmp_path, {"docker.io": f'server = "{own.url}"\n[host."http://127.0.0.1:1"]\n'})
            async with client_for(tmp_path) as client:
                phases = [(await client.resolve(BUSYBOX)).attempts[0] for _ in range(5)]
            assert [attempt.phase for attempt in phases] == ["connect"] * 3 + ["skipped"] * 2
            assert "circuit open" in phases[-1].error

    run(main())


def test_a5_4_a_proxy_of_its_own_and_of_the_environment(tmp_path: Path) -> None:
    async def main() -> None:
        with FakeRegistry() as proxy, FakeRegistry() as tunnelled:
            proxy.add(image_of(), "library/busybox")
            hosts_d(tmp_path, {"docker.io": f'server = "http://mirror.invalid"\nproxy = "http://user:pw@{proxy.address}"\n'})
            async with client_for(tmp_path) as client:
                assert (await client.resolve(BUSYBOX)).endpoint == "http://mirror.invalid/v2"
            assert proxy.requests[0].headers["host"] == "mirror.invalid"
            assert proxy.requests[0].headers["proxy-authorization"].startswith("Basic ")
            tunnelled.rule(lambda _: Reply(403))
            hosts_d(tmp_path, {"docker.io": 'server = "https://mirror.invalid"\n'})
            async with client_for(tmp_path, environ={"HTTPS_PROXY": tunnelled.url}) as client:
                with pytest.raises(PullFailed) as caught:
                    await client.resolve(BUSYBOX)
            assert f"proxy http://{tunnelled.address}: 403" in str(caught.value)
            assert tunnelled.requests[0].method == "CONNECT"

    run(main())


def test_warnings_of_a_registry_are_logged_without_tricks(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with FakeRegistry() as fake:
        fake.add(image_of(), "library/busybox")
        fake.rule(lambda r: replace(fake.honest(r), headers={**fake.honest(r).headers, "Warning": '299 - "moves \x1b[31msoon"'}))
        hosts_d(tmp_path, {"docker.io": f'server = "{fake.url}"\n'})

        async def main() -> None:
            async with client_for(tmp_path) as client:
                await client.resolve(BUSYBOX)

        with contextlib.suppress(PullFailed):
            run(main())
    assert "\x1b" not in caplog.text


def test_helpers_are_asked_once_per_pull(tmp_path: Path) -> None:
    class Counting:
        asked = 0

        async def find(self, registry: str, repository: str, *, directories: Sequence[str], renew: bool = False) -> Credential | None:
            self.asked += 1
            return Credential("test", "u", "p")

        async def named(self, name: str, directories: Sequence[str]) -> Credential:
            raise NotImplementedError

    async def main() -> None:
        source = Counting()
        with FakeRegistry() as fake:
            image = image_of(b"1", b"2", b"3")
            fake.add(image, "app")
            async with client_for(tmp_path, credentials=source) as client:
                await pull(client, f"{fake.address}/app")
        assert source.asked == 2, "one for resolving, one for everything after it"

    run(main())
