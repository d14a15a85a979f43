"""What one registry, identity or image does leaves others their share."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from imgsvc.base import concurrency
from imgsvc.base.reference import Reference
from imgsvc.registry.client import RegistryClient
from imgsvc.registry.interfaces import Credential, PullFailed
from imgsvc.registry.retry import Health
from imgsvc.registry.slots import FairSlots
from tests.fakes.registry import FakeRegistry, Reply
from tests.registry.support import MemorySink, blob, client_for, hosts_d, image_of, noise, run
from tests.support import cri
from tests.support.daemon import Daemon
from tests.support.images import Entry, image, layer
from tests.support.waiting import until

APP = Reference.parse("docker.io/library/app")
ALICE = Credential("CRI request", "alice", "secret")
SLOW = [noise(64 * 1024, seed) for seed in range(6)]
QUICK = noise(64 * 1024, 7)


@asynccontextmanager
async def trickling(tmp_path: Path, fake: FakeRegistry) -> AsyncIterator[tuple[RegistryClient, list[asyncio.Task[object]]]]:
    """Two images of three layers on their way at 1.5 KB/s."""
    for data in (*SLOW, QUICK):
        fake.add_blob(data)
    fake.rule(fake.on("/slow", lambda r: Reply(200, {}, fake.honest(r).body, rate=1500)))
    async with client_for(tmp_path) as client:
        tasks: list[asyncio.Task[object]] = []
        for number, data in enumerate(SLOW):
            fetcher = client.fetcher(Reference.parse(f"docker.io/slow/image{number // 3}"))
            tasks.append(asyncio.create_task(fetcher.download(blob(data), MemorySink(len(data)))))
        try:
            await until(lambda: len(fake.seen("/slow")) == len(SLOW), 10)
            yield client, tasks
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def fetch_quick(client: RegistryClient, name: str) -> None:
    await asyncio.wait_for(client.fetcher(Reference.parse(name)).download(blob(QUICK), MemorySink(len(QUICK))), 20)


def test_S7_a_slow_registry_holds_up_no_other(tmp_path: Path) -> None:
    async def main() -> None:
        async with trickling(tmp_path, slow) as (client, tasks):
            await fetch_quick(client, "quick.example/app")
            assert not any(task.done() for task in tasks)

    with FakeRegistry() as slow, FakeRegistry() as quick:
        quick.add_blob(QUICK)
        hosts_d(
            tmp_path, {name: f'fallback = false\n[host."{fake.url}"]\n' for name, fake in (("docker.io", slow), ("quick.example", quick))}
        )
        run(main())


def test_S7_slow_transfers_lose_their_places_and_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(concurrency, "TRICKLE_WINDOW_S", 0.2)

    async def main() -> None:
        async with trickling(tmp_path, slow) as (client, tasks):
            await fetch_quick(client, "app")
            assert not any(task.done() for task in tasks)
            assert len(slow.seen("/slow")) == len(SLOW), "nothing was asked for again"

    with FakeRegistry() as slow:
        hosts_d(tmp_path, {"docker.io": f'fallback = false\n[host."{slow.url}"]\n'})
        run(main())


def test_S7_places_that_are_lost_and_left_are_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(concurrency, "TRICKLE_WINDOW_S", 0.01)

    async def main() -> None:
        slots, release = FairSlots(per_node=2, per_image=1), asyncio.Event()
        held: list[str] = []

        async def hold(registry: str, image: str) -> None:
            async with slots.slot(registry, image, lambda: 0):
                held.append(image)
                await release.wait()

        tasks = [asyncio.create_task(hold("r", str(number))) for number in range(6)]
        await until(lambda: len(held) == 4, 5)
        others = [asyncio.create_task(hold(name, name)) for name in "abc"]
        await until(lambda: len(held) == 7, 5)
        release.set()
        await asyncio.gather(*tasks, *others)
        assert len(held) == 9
        release.clear()
        held.clear()
        again = [asyncio.create_task(hold("r", str(number))) for number in range(3)]
        await until(lambda: len(held) == 3, 5)
        release.set()
        await asyncio.gather(*again)

    run(main())


def test_S7_layers_that_trickle_do_not_hold_the_unpack_workers(make_daemon: Callable[..., Daemon]) -> None:
    """Both workers of the node follow a slow layer; a quick image comes through, and then the slow one too."""
    daemon = make_daemon()
    slow = image([layer([Entry("slow", noise(200_000, seed))], "plain") for seed in (1, 2)])
    quick = image([layer([Entry("quick", b"quick")])])
    is_slow = [True]
    with FakeRegistry() as fake:
        fake.add(slow, "field/slow", "1")
        fake.add(quick, "field/quick", "1")
        layers = [str(digest) for digest in slow.blobs if digest != slow.config_digest]
        fake.rule(lambda r: replace(fake.honest(r), rate=2000) if is_slow[0] and r.path.rpartition("/")[2] in layers else None)
        daemon.map_host("docker.io", fake.address)
        daemon.start()
        with ThreadPoolExecutor(1) as pool:
            pulling = pool.submit(lambda: cri.pull(daemon.images(), "field/slow:1"))
            asyncio.run(until(lambda: len(fake.seen("/field/slow/blobs/")) == 3))
            assert cri.pull(daemon.images(), "field/quick:1") == str(quick.config_digest)
            assert not pulling.done()
            before = len(fake.requests)
            is_slow[0] = False
            fake.drop()  # the slow answers end; what is missing is asked for
            assert pulling.result(60) == str(slow.config_digest)
    assert all("range" in request.headers for request in fake.requests[before:]), "no byte was fetched twice"


def test_S9_an_anonymous_limit_closes_the_registry_for_the_anonymous_alone(tmp_path: Path) -> None:
    async def main() -> None:
        async with client_for(tmp_path) as client:
            with pytest.raises(PullFailed) as limited:
                await client.resolve(APP)
            assert limited.value.code == "RESOURCE_EXHAUSTED"
            assert (await client.resolve(APP, ALICE)).endpoint == f"{fake.url}/v2"
            asked = len(fake.requests)
            with pytest.raises(PullFailed, match="rate limited"):
                await client.resolve(Reference.parse("docker.io/library/other"))
            assert len(fake.requests) == asked, "the limit of the anonymous holds for their other repositories"

    with FakeRegistry() as fake:
        hosts_d(tmp_path, {"docker.io": f'fallback = false\n[host."{fake.url}"]\ncredentials = "namespace"\n'})
        fake.add(image_of(), "library/app")
        challenge = {"WWW-Authenticate": "Basic realm=r"}
        limit = Reply(429, {"Retry-After": "3600", **challenge})
        fake.rule(lambda r: None if r.authorization else limit if len(fake.seen("/manifests/")) == 1 else Reply(401, challenge))
        run(main())


@pytest.mark.parametrize("wait", [3600.0, 299.0])
def test_S9_a_long_limit_lets_a_probe_through_and_ends_with_its_success(wait: float) -> None:
    health = Health()
    health.limited(0, wait, "")
    assert health.parked_for(0, "") <= 300
    assert "rate limited" in health.refusal(59, "", is_last=True)
    assert not health.refusal(61, "", is_last=True), "the probe"
    assert "rate limited" in health.refusal(62, "", is_last=True), "one"
    health.served("")
    assert not health.refusal(63, "", is_last=True)


def test_S9_an_answer_to_an_earlier_request_does_not_end_a_limit() -> None:
    health = Health()
    health.limited(0, 30, "")
    health.served("")
    assert health.parked_for(1, "") == 29


def test_S9_the_retries_of_one_identity_are_not_anothers() -> None:
    health = Health()
    while health.take_retry(0, "eve"):
        pass
    assert health.take_retry(0, "alice")
