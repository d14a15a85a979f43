"""Blobs against every way a transfer goes wrong: the right bytes once each, or a clean error."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from imgsvc.base.oci import MIB
from imgsvc.base.reference import Reference
from imgsvc.registry.client import RegistryClient
from imgsvc.registry.download import Pace
from imgsvc.registry.interfaces import BlobSource, Fetcher, PullFailed
from tests.fakes.registry import FakeRegistry, Reply, Request
from tests.registry.support import MemorySink, blob, client_for, hosts_d, image_of, noise, run
from tests.support.waiting import until

DATA = noise(3 * MIB + 12345)
BIG = noise(48 * MIB, seed=1)
APP = Reference.parse("docker.io/library/app")

pytestmark = pytest.mark.usefixtures("either_sender")


@asynccontextmanager
async def fetching(tmp_path: Path, *fakes: FakeRegistry, **settings: object) -> AsyncIterator[tuple[RegistryClient, Fetcher]]:
    hosts_d(tmp_path, {"docker.io": "fallback = false\n" + "".join(f'[host."{fake.url}"]\n' for fake in fakes)})
    async with client_for(tmp_path, **settings) as client:  # type: ignore[arg-type]
        yield client, client.fetcher(APP)


async def download(tmp_path: Path, data: bytes, *fakes: FakeRegistry, sink: MemorySink | None = None, **settings: object) -> BlobSource:
    sink = sink or MemorySink(len(data))
    async with fetching(tmp_path, *fakes, **settings) as (_, fetcher):
        source = await fetcher.download(blob(data), sink)
    assert bytes(sink.data) == data
    return source


def test_a_whole_blob_is_one_plain_request(tmp_path: Path) -> None:
    with FakeRegistry() as fake:
        fake.add_blob(DATA)
        source = run(download(tmp_path, DATA, fake))
    assert source.by_endpoint == {f"{fake.url}/v2": len(DATA)}
    assert source.reused == 0
    assert [("range" in r.headers, r.headers["accept-encoding"]) for r in fake.requests] == [(False, "identity")]


def test_an_empty_blob(tmp_path: Path) -> None:
    with FakeRegistry() as fake:
        assert run(download(tmp_path, b"", fake)) == BlobSource()


def test_only_what_the_sink_misses_is_fetched(tmp_path: Path) -> None:
    """After a crash at 60 % of a layer the rest is fetched and nothing else."""
    have = len(DATA) * 60 // 100
    sink = MemorySink(len(DATA), have=[(0, have)])
    sink.data[:have] = DATA[:have]
    with FakeRegistry() as fake:
        fake.add_blob(DATA)
        source = run(download(tmp_path, DATA, fake, sink=sink))
    assert source.reused == have
    assert fake.sent <= len(DATA) * 42 // 100
    assert fake.requests[0].headers["range"] == f"bytes={have}-{len(DATA) - 1}"


def test_gaps_are_filled_one_by_one(tmp_path: Path) -> None:
    sink = MemorySink(len(DATA), have=[(1000, MIB), (2 * MIB, 500)])
    for offset, length in sink.have:
        sink.data[offset : offset + length] = DATA[offset : offset + length]
    with FakeRegistry() as fake:
        fake.add_blob(DATA)
        run(download(tmp_path, DATA, fake, sink=sink))
    assert fake.sent == len(DATA) - MIB - 500


def test_a3_4_any_transport_error_is_resumed_at_the_same_offset(tmp_path: Path) -> None:
    with FakeRegistry() as fake:
        fake.add_blob(DATA)
        fake.rule(fake.times(1, fake.on("/blobs/", lambda r: replace(fake.honest(r), cut_at=2 * MIB))))
        run(download(tmp_path, DATA, fake))
    assert len(fake.requests) == 2
    assert int(fake.requests[1].headers["range"].removeprefix("bytes=").partition("-")[0]) > 0
    assert fake.sent < len(DATA) * 1.4


def test_a3_4_a_broken_mirror_is_continued_on_the_next_host(tmp_path: Path) -> None:
    with FakeRegistry() as broken, FakeRegistry() as good:
        broken.add_blob(DATA)
        good.add_blob(DATA)
        broken.rule(broken.times(1, broken.on("/blobs/", lambda r: replace(broken.honest(r), cut_at=MIB))))
        broken.rule(lambda r: Reply(404) if len(broken.requests) > 1 else None)
        source = run(download(tmp_path, DATA, broken, good))
    assert set(source.by_endpoint) == {f"{broken.url}/v2", f"{good.url}/v2"}
    assert sum(source.by_endpoint.values()) == len(DATA)
    assert good.requests[0].headers["range"].startswith("bytes=")


def test_truncation_with_an_honest_close_is_resumed(tmp_path: Path) -> None:
    with FakeRegistry() as fake:
        fake.add_blob(DATA)
        short = Reply(200, {}, DATA[:MIB], length=-1)
        fake.rule(fake.times(1, fake.on("/blobs/", short)))
        run(download(tmp_path, DATA, fake))
    assert fake.requests[1].headers["range"] == f"bytes={MIB}-{len(DATA) - 1}"


def test_a_server_without_ranges_is_read_from_the_start_again(tmp_path: Path) -> None:
    with FakeRegistry() as fake:
        fake.add_blob(DATA)
        fake.rule(fake.on("/blobs/", lambda _: Reply(200, {}, DATA)))
        fake.rule(fake.times(1, fake.on("/blobs/", Reply(200, {}, DATA, cut_at=2 * MIB))))
        source = run(download(tmp_path, DATA, fake))
    assert sum(source.by_endpoint.values()) == len(DATA)


@pytest.mark.parametrize(
    "lie",
    [
        Reply(206, {"Content-Range": "bytes 0-99/100"}, DATA[:100]),
        Reply(206, {}, DATA[MIB:]),
        Reply(206, {"Content-Range": f"bytes {MIB}-{len(DATA) - 1}/{len(DATA)}"}, DATA),
        Reply(206, {"Content-Range": f"bytes {MIB}-{len(DATA) - 1}/{len(DATA) + 1}"}, DATA[MIB:]),
        Reply(206, {"Content-Range": f"bytes {MIB}-{len(DATA) - 1}/{len(DATA)}"}, DATA[MIB:] + b"x", length=-1),
        Reply(200, {}, DATA + b"x"),
        Reply(200, {}, DATA + b"x", length=-1),
        Reply(200, {}, DATA[:-1]),
        Reply(416, {}, b""),
    ],
    ids=["other-range", "no-content-range", "full-body", "other-total", "extra-in-range", "extra", "extra-chunked", "short", "416"],
)
def test_c_r13_range_lies_end_on_the_next_host_with_the_right_bytes(tmp_path: Path, lie: Reply) -> None:
    sink = MemorySink(len(DATA), have=[(0, MIB)])
    sink.data[:MIB] = DATA[:MIB]
    with FakeRegistry() as liar, FakeRegistry() as good:
        good.add_blob(DATA)
        liar.rule(liar.on("/blobs/", lie))

        async def main() -> None:
            async with fetching(tmp_path, liar, good) as (_, fetcher):
                await fetcher.download(blob(DATA), sink)

        run(main())
    assert bytes(sink.data) == DATA
    assert len(liar.requests) <= 2


@pytest.mark.parametrize("length", [None, -1], ids=["announced", "chunked"])
def test_one_byte_too_many_is_an_error(tmp_path: Path, length: int | None) -> None:
    with FakeRegistry() as fake:
        fake.rule(fake.on("/blobs/", Reply(200, {}, DATA + b"x", length=length)))

        async def main() -> PullFailed:
            async with fetching(tmp_path, fake) as (_, fetcher):
                with pytest.raises(PullFailed) as caught:
                    await fetcher.download(blob(DATA), MemorySink(len(DATA)))
            return caught.value

        assert run(main()).code == "DATA_LOSS"


def test_c_r13_content_that_changes_between_ranges_is_noticed(tmp_path: Path) -> None:
    with FakeRegistry() as fake:
        count = [0]

        def changing(request: Request) -> Reply:
            count[0] += 1
            fake.blobs[str(blob(DATA).digest)] = DATA
            honest = fake.honest(request)
            return replace(honest, headers={**honest.headers, "ETag": f'"{count[0]}"'}, cut_at=MIB if count[0] == 1 else None)

        fake.rule(fake.on("/blobs/", changing))

        async def main() -> PullFailed:
            async with fetching(tmp_path, fake) as (_, fetcher):
                with pytest.raises(PullFailed) as caught:
                    await fetcher.download(blob(DATA), MemorySink(len(DATA)))
            return caught.value

        assert run(main()).code == "DATA_LOSS"
    assert fake.requests[1].headers["if-range"] == '"1"'


def test_c_r12_a_stalled_body_is_given_up_and_continued_elsewhere(tmp_path: Path) -> None:
    with FakeRegistry() as stuck, FakeRegistry() as good:
        good.add_blob(DATA)
        stuck.rule(stuck.on("/blobs/", Reply(200, {}, DATA, stall_at=MIB)))
        started = time.monotonic()
        source = run(download(tmp_path, DATA, stuck, good))
    assert source.by_endpoint[f"{stuck.url}/v2"] >= MIB
    assert any("no data for" in attempt.error for attempt in source.attempts)
    assert time.monotonic() - started < 20


def test_c_r12_a_trickling_body_is_given_up(tmp_path: Path) -> None:
    with FakeRegistry() as slow, FakeRegistry() as good:
        good.add_blob(DATA)
        slow.rule(slow.on("/blobs/", Reply(200, {}, DATA, rate=50)))
        source = run(download(tmp_path, DATA, slow, good, pace=Pace(min_rate=1000, window=0.5)))
    assert any("less than 1000" in attempt.error for attempt in source.attempts)


def test_c_r12_a_trickling_head_is_given_up(tmp_path: Path) -> None:
    from imgsvc.registry.http.exchange import Timeouts

    with FakeRegistry() as slow, FakeRegistry() as good:
        good.add_blob(DATA)
        slow.rule(slow.on("/blobs/", Reply(200, {"X": "y" * 200}, DATA, head_rate=20)))
        source = run(download(tmp_path, DATA, slow, good, timeouts=Timeouts(connect=0.3, headers=0.3, stall=0.3)))
    assert set(source.by_endpoint) == {f"{good.url}/v2"}
    assert any("no complete answer" in attempt.error for attempt in source.attempts)


def test_c_r12_a_slow_sink_is_no_stall(tmp_path: Path) -> None:
    with FakeRegistry() as fake:
        fake.add_blob(DATA)
        sink = MemorySink(len(DATA), delay=0.4)
        run(download(tmp_path, DATA, fake, sink=sink, pace=Pace(min_rate=50 * MIB, window=0.2)))
    assert len(fake.requests) == 1


def test_c_r12_cancel_returns_at_once_and_keeps_what_came(tmp_path: Path) -> None:
    async def main() -> None:
        with FakeRegistry() as fake:
            fake.rule(fake.on("/blobs/", Reply(200, {}, DATA, stall_at=2 * MIB)))
            sink = MemorySink(len(DATA))
            async with fetching(tmp_path, fake) as (_, fetcher):
                task = asyncio.create_task(fetcher.download(blob(DATA), sink))
                await until(lambda: sum(length for _, length in sink.writes) >= MIB, 5)
                started = time.monotonic()
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                assert time.monotonic() - started < 10
                written = list(sink.writes)
                await asyncio.sleep(0.1)
                assert sink.writes == written, "a write began after the download had ended"
            assert sum(length for _, length in written) >= MIB

    run(main())


def test_a1_1_connections_are_added_where_they_help(tmp_path: Path) -> None:
    with FakeRegistry(rate=16 * MIB) as fake:
        fake.add_blob(BIG)
        source = run(download(tmp_path, BIG, fake))
    assert sum(source.by_endpoint.values()) == len(BIG)
    assert len(fake.seen("/blobs/")) > 2


def test_a1_1_the_node_bounds_extra_connections(tmp_path: Path) -> None:
    with FakeRegistry(rate=32 * MIB) as fake:
        fake.add_blob(BIG)
        run(download(tmp_path, BIG, fake, max_extra_connections=1))
    assert fake.connections <= 3


def test_parallel_ranges_against_a_server_that_stops_supporting_them(tmp_path: Path) -> None:
    with FakeRegistry(rate=16 * MIB) as fake:
        fake.add_blob(BIG)
        fake.rule(fake.on("/blobs/", lambda r: Reply(200, {}, BIG) if "range" in r.headers else None))
        run(download(tmp_path, BIG, fake))


def test_a_range_that_is_split_before_its_answer_begins_is_no_lie(tmp_path: Path) -> None:
    def slow_head(request: Request) -> Reply | None:
        if "range" not in request.headers:
            return None
        start, last = (int(text) for text in request.headers["range"].removeprefix("bytes=").split("-"))
        return Reply(206, {"Content-Range": f"bytes {start}-{last}/{len(BIG)}"}, BIG[start : last + 1], delay=0.4)

    with FakeRegistry(rate=100 * MIB) as fake:
        fake.add_blob(BIG)
        fake.rule(fake.on("/blobs/", slow_head))
        source = run(download(tmp_path, BIG, fake))
    assert [attempt.error for attempt in source.attempts if attempt.error] == []


def test_c_r13_a_head_that_disagrees_with_the_document_is_a_lie(tmp_path: Path) -> None:
    async def main() -> None:
        with FakeRegistry() as fake:
            image = image_of()
            fake.add(image, "library/app")
            fake.rule(lambda r: replace(fake.honest(r), body=image.data + b" ") if r.method == "HEAD" else None)
            fake.rule(lambda r: replace(fake.honest(r), length=len(image.data) + 1) if r.method == "HEAD" else None)
            async with fetching(tmp_path, fake) as (client, fetcher):
                resolved = await client.resolve(APP)
                assert resolved.descriptor.size == len(image.data) + 1
                with pytest.raises(PullFailed) as caught:
                    await fetcher.document(resolved.descriptor, limit=MIB)
            assert caught.value.code == "DATA_LOSS"

    run(main())


def test_a_blob_with_wrong_bytes_is_not_asked_for_there_again(tmp_path: Path) -> None:
    async def main() -> None:
        with FakeRegistry() as liar, FakeRegistry() as good:
            good.add_blob(DATA)
            liar.blobs[str(blob(DATA).digest)] = noise(len(DATA), seed=9)
            async with fetching(tmp_path, liar, good) as (_, fetcher):
                sink = MemorySink(len(DATA))
                source = await fetcher.download(blob(DATA), sink)
                assert sink.digest != blob(DATA).digest
                await fetcher.rejected(blob(DATA), source)
                again = MemorySink(len(DATA))
                source = await fetcher.download(blob(DATA), again)
                assert bytes(again.data) == DATA
                assert set(source.by_endpoint) == {f"{good.url}/v2"}

    run(main())


def test_what_a_sink_raises_ends_the_download(tmp_path: Path) -> None:
    class Full(MemorySink):
        async def write_at(self, offset: int, data: bytes | memoryview) -> None:
            raise OSError(28, "No space left on device")

    async def main() -> None:
        with FakeRegistry() as fake:
            fake.add_blob(DATA)
            async with fetching(tmp_path, fake) as (_, fetcher):
                with pytest.raises(OSError, match="No space"):
                    await fetcher.download(blob(DATA), Full(len(DATA)))

    run(main())


def test_a1_6_limits_per_node_and_image(tmp_path: Path) -> None:
    """Eight layers of one image may not use more than its share, and another image gets its turn meanwhile."""

    class Counting(MemorySink):
        active, most, finished = 0, 0, 0

        async def write_at(self, offset: int, data: bytes | memoryview) -> None:
            Counting.active += 1
            Counting.most = max(Counting.most, Counting.active)
            await super().write_at(offset, data)
            Counting.active -= 1
            Counting.finished += 1

    async def main() -> None:
        with FakeRegistry() as fake:
            layers = [noise(1000, seed=n) for n in range(9)]
            for data in layers:
                fake.add_blob(data)
            hosts_d(tmp_path, {"docker.io": f'server = "{fake.url}"\n'})
            async with client_for(tmp_path, max_downloads=3, max_downloads_per_image=2) as client:
                huge, small = client.fetcher(APP), client.fetcher(Reference.parse("small"))
                many = [asyncio.create_task(huge.download(blob(data), Counting(len(data), delay=0.1))) for data in layers[:8]]
                await small.download(blob(layers[8]), MemorySink(1000))
                assert Counting.finished < 8, "the second image waited for the whole first one"
                await asyncio.gather(*many)
            assert Counting.most == 2

    run(main())
