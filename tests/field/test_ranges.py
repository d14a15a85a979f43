"""Servers that do not serve parts of blobs: one plain stream takes their place, at about the price of one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from imgsvc.base.oci import KIB, MIB
from imgsvc.base.reference import Reference
from imgsvc.registry import download, ranges
from tests.fakes.registry import FakeRegistry, Reply, Request
from tests.registry.support import MemorySink, blob, client_for, hosts_d, image_of, noise, pull, run

LAYER = noise(MIB)
HAVE = 256 * KIB  # of the layer, when a download is resumed
APP = Reference.parse("docker.io/library/app")

Answer = Callable[[FakeRegistry, Request], Reply]


def part_of(request: Request) -> slice:
    """The bytes that were asked for."""
    first, _, last = request.headers["range"].removeprefix("bytes=").partition("-")
    return slice(int(first), int(last) + 1)


def status(code: int, headers: dict[str, str] | None = None) -> Answer:
    return lambda _, __: Reply(code, headers or {}, b"no")


def changed(**headers: str) -> Answer:
    """The right part under other headers; `_` stands for `-`."""

    def answer(fake: FakeRegistry, request: Request) -> Reply:
        honest = fake.honest(request)
        return replace(honest, headers={**honest.headers, **{name.replace("_", "-"): value for name, value in headers.items()}})

    return answer


def everything(fake: FakeRegistry, request: Request) -> Reply:
    return fake.honest(replace(request, headers={}))


def wrong_part(fake: FakeRegistry, request: Request) -> Reply:
    part = part_of(request)
    return fake.honest(replace(request, headers={"range": f"bytes={part.start - 1}-{part.stop - 2}"}))


def short_part(fake: FakeRegistry, request: Request) -> Reply:
    part = part_of(request)
    return fake.honest(replace(request, headers={"range": f"bytes={part.start}-{part.stop - 2}"}))


def multipart(fake: FakeRegistry, request: Request) -> Reply:
    honest = fake.honest(request)
    where = honest.headers["Content-Range"].encode()
    body = b"--x\r\nContent-Range: " + where + b"\r\n\r\n" + honest.body + b"\r\n--x--\r\n"
    return Reply(206, {"Content-Type": "multipart/byteranges; boundary=x"}, body)


def expired_redirect(fake: FakeRegistry, _: Request) -> Reply:
    return Reply(307, {"Location": f"{fake.url}/expired?X-Amz-Expires=0"})


def cut(fake: FakeRegistry, request: Request) -> Reply:
    return replace(fake.honest(request), cut_at=16 * KIB)


WAYS: dict[str, Answer] = {
    **{str(code): status(code) for code in (400, 403, 404, 405, 412, 416, 429, 500, 501, 502, 503)},
    "429-with-retry-after": status(429, {"Retry-After": "30"}),
    "everything": everything,
    "wrong-total": changed(Content_Range="bytes 0-1/7"),
    "no-content-range": lambda fake, request: Reply(206, {}, fake.honest(request).body),
    "wrong-part": wrong_part,
    "short-part": short_part,
    "expired-redirect": expired_redirect,
    "cut": cut,
    "multipart": multipart,
    "gzip": changed(Content_Encoding="gzip"),
}


@dataclass(frozen=True)
class Cost:
    requests: int
    sent: int


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections are added early and to small blobs."""
    monkeypatch.setattr(ranges, "MIN_SPAN", 64 * KIB)
    monkeypatch.setattr(download, "TICK_S", 0.02)


def layers_of(*blobs: bytes, way: Answer | None) -> FakeRegistry:
    fake = FakeRegistry(rate=12 * MIB)
    fake.add(image_of(*blobs), "library/app")
    fake.rule(fake.on("/expired", Reply(403, {}, b"Request has expired")))
    if way:
        answer = way
        fake.rule(fake.on("/blobs/", lambda request: answer(fake, request) if "range" in request.headers else None))
    return fake


async def costs_of_pulls(tmp_path: Path, fake: FakeRegistry, count: int) -> list[Cost]:
    """Of pulls from the same endpoint by the same client."""
    hosts_d(tmp_path, {"docker.io": f'fallback = false\n[host."{fake.url}"]\n'})
    costs = []
    async with client_for(tmp_path) as client:
        for _ in range(count):
            requests, sent = len(fake.requests), fake.sent
            await pull(client, "app")
            costs.append(Cost(len(fake.requests) - requests, fake.sent - sent))
    return costs


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Cost:
    """A pull of the same image without any range."""
    with pytest.MonkeyPatch.context() as patch, layers_of(LAYER, way=None) as fake:
        patch.setattr(ranges, "MIN_SPAN", 1024 * MIB)
        (cost,) = run(costs_of_pulls(tmp_path_factory.mktemp("plain"), fake, 1))
    assert not any("range" in request.headers for request in fake.requests)
    return cost


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("way", WAYS)
def test_P3_a_refused_range_costs_no_more_than_one_request(tmp_path: Path, way: str, plain: Cost) -> None:
    with layers_of(LAYER, way=WAYS[way]) as fake:
        costs = run(costs_of_pulls(tmp_path, fake, 3))
    assert any("range" in request.headers for request in fake.requests), "nothing was tried"
    assert all(cost.requests <= 1.5 * plain.requests for cost in costs)
    assert all(cost.sent <= 1.5 * plain.sent for cost in costs)
    # A probe that is slower than the stream beside it teaches nothing.
    assert plain.requests in [cost.requests for cost in costs[1:]] or way == "cut", "the endpoint was not remembered"


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("way", WAYS)
def test_P3_a_resumed_download_falls_back_to_a_plain_one(tmp_path: Path, way: str) -> None:
    async def main() -> None:
        hosts_d(tmp_path, {"docker.io": f'fallback = false\n[host."{fake.url}"]\n'})
        sink = MemorySink(len(LAYER), have=[(HAVE, HAVE), (3 * HAVE, HAVE // 2)])  # two gaps before the end, three requests
        for start, length in sink.have:
            sink.data[start : start + length] = LAYER[start : start + length]
        async with client_for(tmp_path) as client:
            await client.fetcher(APP).download(blob(LAYER), sink)
        assert sink.digest == blob(LAYER).digest

    with layers_of(way=WAYS[way]) as fake:
        fake.add_blob(LAYER)
        run(main())
    assert fake.sent <= 1.5 * len(LAYER)
    assert ["range" in request.headers for request in fake.seen("/blobs/")] in ([True, False], [True]), (
        "one refused range and a plain request"
    )


@pytest.mark.usefixtures("eager")
def test_P3_several_blobs_at_once_try_one_range(tmp_path: Path) -> None:
    blobs = [noise(MIB, seed) for seed in range(1, 4)]

    async def main() -> None:
        hosts_d(tmp_path, {"docker.io": f'fallback = false\n[host."{fake.url}"]\n'})
        async with client_for(tmp_path) as client:
            fetcher = client.fetcher(APP)
            sinks = [MemorySink(MIB) for _ in blobs]
            await asyncio.gather(*(fetcher.download(blob(data), sink) for data, sink in zip(blobs, sinks, strict=True)))
            assert [bytes(sink.data) for sink in sinks] == blobs

    with layers_of(way=WAYS["503"]) as fake:
        for data in blobs:
            fake.add_blob(data)
        run(main())
    assert len([request for request in fake.requests if "range" in request.headers]) == 1
    assert len(fake.requests) == 4


def test_P3_a_server_that_refuses_everything_is_no_server_without_ranges(tmp_path: Path) -> None:
    """The next download may ask for parts again: what failed was not about ranges."""

    async def main() -> None:
        hosts_d(tmp_path, {"docker.io": f'fallback = false\n[host."{fake.url}"]\n'})
        async with client_for(tmp_path) as client:
            for count in range(2):
                sink = MemorySink(len(LAYER), have=[(0, HAVE)])
                sink.data[:HAVE] = LAYER[:HAVE]
                if count == 0:
                    fake.rule(fake.times(2, fake.on("/blobs/", Reply(404))))
                    with pytest.raises(Exception, match="answered 404"):
                        await client.fetcher(APP).download(blob(LAYER), sink)
                else:
                    await client.fetcher(APP).download(blob(LAYER), sink)
        assert fake.sent < len(LAYER)

    with layers_of(way=None) as fake:
        fake.add_blob(LAYER)
        run(main())
    assert ["range" in request.headers for request in fake.requests] == [True, False, True]
