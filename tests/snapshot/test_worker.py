"""Jobs of the unpacker: growing blobs, pipes, decryption, memory, usage, and what happens when somebody leaves."""

from __future__ import annotations

import asyncio
import base64
import errno
import gzip
import hashlib
import itertools
import os
import signal
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from imgsvc.base.errors import Aborted, DataLoss, ImgsvcError, InvalidArgument
from imgsvc.base.oci import MIB, Digest
from imgsvc.snapshot.interfaces import LayerInput, Limits, UnpackJob
from imgsvc.snapshot.unpack.inflate import Ahead, BlobReader
from imgsvc.snapshot.unpack.laying import OverlayStyle
from imgsvc.snapshot.unpack.tree import Tree
from tests.decrypt.vectors import Sealed, seal
from tests.snapshot.bench import Bench, stack
from tests.snapshot.layers import Entry, directory, gz, symlink, tar
from tests.support.vigil import workers
from tests.support.waiting import until

pytestmark = pytest.mark.root

PLAIN = tar([directory("d"), Entry("d/f", data=os.urandom(300_000)), Entry("g", data=b"g" * 100)])


@pytest.fixture
def sealed_bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path, transform="imgsvc.decrypt.aesctr:open_transform")
    yield made
    made.close()


def layer_of(blob: bytes, fd: int, diff_id: Digest, secret: bytes | None = None) -> LayerInput:
    return LayerInput("application/vnd.oci.image.layer.v1.tar+gzip", Digest.of(blob), diff_id, fd, len(blob), secret)


@pytest.mark.parametrize("pack", [gz, zstandard.ZstdCompressor().compress], ids=["gzip", "zstd"])
def test_a_layer_is_unpacked_while_it_arrives(bench: Bench, tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    blob = pack(PLAIN)

    async def work() -> None:
        key = bench.key()
        mounts = bench.overlay.prepare(key, None)
        with (tmp_path / "blob").open("w+b", buffering=0) as file:
            job = await bench.unpacker.start(layer_of(blob, file.fileno(), Digest.of(PLAIN)), mounts, rebase=True)
            verdict = asyncio.ensure_future(job.finish())
            for at in range(0, len(blob), 7919):
                file.write(blob[at : at + 7919])
                job.advance(min(at + 7919, len(blob)))
                if len(blob) * 3 // 4 < at < len(blob) - 20_000:
                    await until(lambda: os.path.exists(f"{mounts[0].source}/d/f"), 5)
                    assert not verdict.done()
            applied = await verdict
            assert applied.diff_id == Digest.of(PLAIN)
            assert applied.unpacked == len(PLAIN)
            assert applied.entries == 3
            assert applied.timings["waited"] > 0
            await job.settle(bench.overlay.mounts(key))

    bench.run(work)


def threads(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/task"))


def test_a_worker_inflates_ahead_while_a_processor_is_free_for_it(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("imgsvc.snapshot.unpack.unpacker._PROCESSORS", 2)
    data = tar([Entry("f", data=os.urandom(4 * MIB))])
    blob = gz(data)
    parts = (2 * MIB, 3 * MIB)

    async def begin(file: IO[bytes]) -> tuple[UnpackJob, int]:
        """A job that has begun with its file and waits for more of it, and its process."""
        before = set(workers(os.getpid()))
        mounts = bench.overlay.prepare(bench.key(), None)
        job = await bench.unpacker.start(layer_of(blob, file.fileno(), Digest.of(data)), mounts, rebase=True)
        job.advance(parts[0])
        await until(lambda: os.path.exists(f"{mounts[0].source}/f"), 5)
        (pid,) = set(workers(os.getpid())) - before
        return job, pid

    async def work() -> None:
        with (tmp := bench.root / "blob").open("w+b") as file:
            tmp.write_bytes(blob)
            alone, pid = await begin(file)
            assert threads(pid) == 2
            other, second = await begin(file)
            assert threads(second) == 1
            alone.advance(parts[1])
            await until(lambda: threads(pid) == 1, 5)
            await alone.abort()
            other.advance(parts[1])
            await until(lambda: threads(second) == 2, 5)
            other.advance(len(blob))
            assert (await other.finish()).diff_id == Digest.of(data)
            await other.abort()

    bench.run(work)


def test_what_ends_after_the_unpacker_touches_no_file_of_others(tmp_path: Path) -> None:
    bench = Bench(tmp_path)

    async def work() -> None:
        with tempfile.TemporaryFile() as empty, (tmp_path / "other").open("wb") as other:
            layer = LayerInput("x.tar", Digest.of(PLAIN), Digest.of(PLAIN), empty.fileno(), len(PLAIN))
            late = await bench.unpacker.start(layer, bench.overlay.prepare(bench.key(), None), rebase=True)
            await bench.unpacker.close()
            others = [os.dup(other.fileno()) for _ in range(20)]  # of which one has the number that was closed
            await late.abort()
            for fd in others:
                os.close(fd)

    try:
        bench.run(work)
        assert (tmp_path / "other").read_bytes() == b""
    finally:
        bench.close()


@given(st.lists(st.booleans(), min_size=1, max_size=9), st.integers(0, 12))
def test_chunks_come_in_order_whoever_makes_them(room: list[bool], count: int) -> None:
    chunks = [b"%d" % number for number in range(count)]

    def read(end: list[bytes]) -> Ahead:
        made, has_room = iter(chunks + end), itertools.cycle(room)
        return Ahead(lambda: next(made), lambda: next(has_room))

    whole = read([b""] * 5)
    assert [whole.next_chunk() for _ in range(count + 3)] == [*chunks, b"", b"", b""]
    broken = read([])
    assert [broken.next_chunk() for _ in range(count)] == chunks
    with pytest.raises(StopIteration):
        broken.next_chunk()


def test_a_layer_can_come_through_a_pipe(bench: Bench) -> None:
    blob = gz(PLAIN)

    async def work(data: bytes) -> int:
        reading, writing = os.pipe()
        feeder = threading.Thread(target=_feed, args=(writing, data))
        feeder.start()
        job = await bench.unpacker.start(layer_of(blob, reading, Digest.of(PLAIN)), bench.overlay.prepare(bench.key(), None), rebase=True)
        os.close(reading)
        try:
            return (await job.finish()).entries
        finally:
            await job.abort()
            feeder.join()

    assert bench.run(lambda: work(blob)) == 3
    with pytest.raises(DataLoss):
        bench.run(lambda: work(blob[:-100]))


def _feed(fd: int, data: bytes) -> None:
    with os.fdopen(fd, "wb") as stream:
        try:
            stream.write(data)
        except BrokenPipeError:
            return


def test_a_piped_layer_that_needs_its_parents_says_so(bench: Bench) -> None:
    base, top = tar([directory("d"), symlink("l", "d")]), gz(tar([Entry("l/f", data=b"x")]))

    async def work() -> None:
        parent, own = (bench.overlay.prepare(bench.key(), None) for _ in range(2))
        _, settle = await bench.apply(base, parent, rebase=True)
        await settle(parent)
        reading, writing = os.pipe()
        os.write(writing, top)
        os.close(writing)
        job = await bench.unpacker.start(layer_of(top, reading, Digest.of(gzip.decompress(top))), own, rebase=True)
        os.close(reading)
        await job.finish()
        with pytest.raises(Aborted):
            await job.settle(bench.overlay.stacked(own, parent))

    bench.run(work)


def test_a_process_that_settles_goes_on_and_is_replaced_when_it_dies(bench: Bench) -> None:
    async def work() -> None:
        own = [bench.overlay.prepare(bench.key(), None) for _ in range(4)]
        blobs = [tar([Entry(f"implied/{number}")]) for number in range(len(own))]
        applied = [await bench.apply(blob, mounts, rebase=True) for blob, mounts in zip(blobs, own, strict=True)]
        met = []
        for number, ((_, settle), mounts) in enumerate(zip(applied, stack(bench.overlay, own), strict=True)):
            await settle(mounts)
            met += [worker for worker in workers(os.getpid()) if number < len(own) - 1]
            if number == 1:
                os.kill(met[0], signal.SIGKILL)
                await until(lambda pid=met[0]: not os.path.exists(f"/proc/{pid}"), 10)  # type: ignore[misc]
        assert met == [met[0], met[0], met[-1]]
        assert met[-1] != met[0]
        await until(lambda: not workers(os.getpid()), 10)  # there is nothing left to settle

    bench.run(work)


def test_encrypted_layers_are_judged_before_the_verdict(sealed_bench: Bench) -> None:
    sealed = seal(gz(PLAIN))
    secret = secret_of(sealed)
    prepare = sealed_bench.overlay.prepare

    async def work(blob: bytes, key: bytes) -> int:
        applied, _ = await sealed_bench.apply(
            blob, prepare(sealed_bench.key(), None), rebase=True, diff_id=Digest.of(PLAIN), media_type="x.tar+gzip", secret=key
        )
        return applied.entries

    assert sealed_bench.run(lambda: work(sealed.blob, secret)) == 3
    for blob in (sealed.blob[:-1] + b"\0\0", sealed.blob[:5000] + b"x" + sealed.blob[5001:], sealed.blob[:-10]):
        with pytest.raises(DataLoss) as caught:
            sealed_bench.run(lambda blob=blob: work(blob, secret))  # type: ignore[misc]
        assert "authentic" in str(caught.value)
    wrong = secret[:33] + bytes(16) + secret[49:]
    with pytest.raises(ImgsvcError):
        sealed_bench.run(lambda: work(sealed.blob, wrong))


def secret_of(sealed: Sealed) -> bytes:
    """A layer secret as decrypt hands it over: version, key, nonce, MAC."""
    private, public = sealed.private, sealed.public
    parts = (private["symkey"], private["cipheroptions"]["nonce"], public["hmac"])
    return b"\x01" + b"".join(base64.b64decode(part) for part in parts)


def test_memory_of_a_worker_does_not_depend_on_the_layer(bench: Bench) -> None:
    large = tar([Entry(f"f{number}", data=os.urandom(MIB) * 20) for number in range(12)])
    for blob in (gz(large), zstandard.ZstdCompressor().compress(large)):
        applied, _ = bench.run(
            lambda blob=blob: bench.apply(blob, bench.overlay.prepare(bench.key(), None), rebase=True, diff_id=Digest.of(large))  # type: ignore[misc]
        )
        assert applied.unpacked > 240 * MIB
        assert applied.peak_memory < 64 * MIB


def test_usage_is_what_the_disk_says(bench: Bench) -> None:
    entries = [directory(f"d{i}") for i in range(20)] + [Entry(f"d{i % 20}/f{i}", data=b"x" * (i * 37)) for i in range(400)]
    layers = [tar(entries), tar([Entry("d3/f3", data=b"y" * 9000), Entry("d3/f3", data=b"z" * 90), Entry("d4/.wh.f4"), Entry("d5/new")])]
    name, usages = bench.beside(layers)
    assert usages[-1] == bench.overlay.usage(name)
    newest = max((p for p in (bench.root / "overlayfs").iterdir() if p.name.isdigit()), key=lambda p: int(p.name))
    told = usages[-1]
    assert told is not None
    assert told.inodes == int(subprocess.run(["du", "-s", "--inodes", newest / "fs"], capture_output=True).stdout.split()[0])
    assert usages[0] is not None
    assert usages[0].inodes == 421  # and the root


def test_an_aborted_job_is_gone_and_its_slot_free(bench: Bench) -> None:
    async def work() -> None:
        with tempfile.TemporaryFile() as empty:
            for _ in range(5):
                layer = LayerInput("x.tar", Digest.of(PLAIN), Digest.of(PLAIN), empty.fileno(), len(PLAIN))
                job = await bench.unpacker.start(layer, bench.overlay.prepare(bench.key(), None), rebase=True)
                job.advance(0)
                await job.abort()
                await job.abort()
                with pytest.raises(ImgsvcError):
                    await job.finish()

    before = len(os.listdir("/proc/self/fd"))
    bench.run(work)
    assert len(os.listdir("/proc/self/fd")) <= before + 1  # the connection to the worker server, when this is the first test


def test_a_start_that_is_cancelled_while_waiting_takes_nothing_with_it(bench: Bench) -> None:
    async def work() -> None:
        with tempfile.TemporaryFile() as empty:
            layer = LayerInput("x.tar", Digest.of(PLAIN), Digest.of(PLAIN), empty.fileno(), len(PLAIN))
            held = [await bench.unpacker.start(layer, bench.overlay.prepare(bench.key(), None), rebase=True) for _ in range(2)]
            for delay in (0, 0, 0.001, 0.002, 0.01):
                waiting = asyncio.ensure_future(bench.unpacker.start(layer, bench.overlay.prepare(bench.key(), None), rebase=True))
                await asyncio.sleep(delay)
                waiting.cancel()
                await asyncio.wait([waiting])
            for job in held:
                await job.abort()
            for delay in (0, 0.0005, 0.001, 0.002):
                starting = asyncio.ensure_future(bench.unpacker.start(layer, bench.overlay.prepare(bench.key(), None), rebase=True))
                await asyncio.sleep(delay)
                starting.cancel()
                await asyncio.wait([starting])
                if not starting.cancelled():
                    await starting.result().abort()
        applied, _ = await bench.apply(PLAIN, bench.overlay.prepare(bench.key(), None), rebase=True)
        assert applied.entries == 3

    bench.run(work)


def test_unknown_compression_is_refused_by_name(bench: Bench) -> None:
    with pytest.raises(InvalidArgument) as caught:
        bench.run(lambda: bench.apply(PLAIN, bench.overlay.prepare(bench.key(), None), rebase=True, media_type="x.tar+xz"))
    assert "x.tar+xz" in caught.value.what


def test_without_openat2_paths_mean_the_same(tmp_path: Path) -> None:
    (tmp_path / "root/real/sub").mkdir(parents=True)
    (tmp_path / "root/link").symlink_to("real")
    (tmp_path / "root/abs").symlink_to("/real/sub")
    (tmp_path / "root/out").symlink_to("../../../..")
    fd = os.open(tmp_path / "root", os.O_RDONLY | os.O_DIRECTORY)
    for openat2 in (True, False):
        tree = Tree(fd, OverlayStyle().create_implied, use_openat2=openat2)
        assert tree.directory(b"link/sub")[1] == b"real/sub"
        assert tree.directory(b"abs")[1] == b"real/sub"
        assert tree.directory(b"out")[1] == b""
        found, where = tree.directory(b"abs/../new/dir")
        assert where == b"real/new/dir"
        assert stat.S_ISDIR(os.fstat(found).st_mode)
        tree.close()
    os.close(fd)


def test_a_blob_is_never_read_beyond_what_is_announced(tmp_path: Path) -> None:
    data = os.urandom(100_000)
    (tmp_path / "blob").write_bytes(data)
    announced = iter([10, 5_000, 5_001, 200_000])
    asked: list[int] = []

    def wait_for(offset: int) -> int:
        asked.append(offset)
        return next(announced)

    with (tmp_path / "blob").open("rb") as file:
        reader = BlobReader(file.fileno(), len(data), wait_for)
        got = [reader.read(1 << 20) for _ in range(5)]
    assert asked == [0, 10, 5_000, 5_001]
    assert [len(chunk) for chunk in got] == [10, 4_990, 1, 94_999, 0]
    assert hashlib.sha256(b"".join(got)).digest() == hashlib.sha256(data).digest()


def test_limits_are_per_layer_and_zero_means_none(tmp_path: Path) -> None:
    bench = Bench(tmp_path, Limits(0, 0, 0))
    try:
        assert bench.beside([tar([Entry(f"f{i}") for i in range(2000)])])[1][0] is not None
    finally:
        bench.close()


UNPRIVILEGED = """
import os, sys
from imgsvc.snapshot.unpack.extract import Extractor
from imgsvc.snapshot.unpack.laying import InPlaceStyle
from imgsvc.snapshot.unpack.tarstream import TarStream
from imgsvc.base.removal import remove_at
from imgsvc.snapshot.unpack.tree import Tree

layer = iter([open(sys.argv[1], "rb").read()])
os.chown(sys.argv[2], 65534, 65534)
outside = os.open(sys.argv[2], os.O_RDONLY)
os.setgroups([])
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
os.mkdir("root", dir_fd=outside)
root = os.open("root", os.O_RDONLY, dir_fd=outside)
style = InPlaceStyle()
extractor = Extractor(Tree(root, style.create_implied), style, privileged=False)
extractor.run(TarStream(lambda: next(layer, b"")))
print(sorted(extractor.warnings))
print(oct(os.stat("d", dir_fd=root).st_mode), os.listdir(os.open("d", os.O_RDONLY, dir_fd=root)))
remove_at(outside, b"root")
print(os.listdir(outside))
"""


def test_without_privileges_owners_and_devices_are_left_out(tmp_path: Path) -> None:
    entries = [directory("d", 0o555, uid=5), Entry("d/f", uid=5, mode=0o4711), Entry("null", "char", device=(1, 3))]
    (tmp_path / "layer").write_bytes(tar([*entries, directory("e", 0o000), Entry("e/f")]))
    (tmp_path / "out").mkdir()
    command = [sys.executable, "-c", UNPRIVILEGED, str(tmp_path / "layer"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "['device (not permitted in this user namespace)', 'owner of a file (not privileged)']",
        "0o40555 ['f']",
        "[]",
    ]


@pytest.mark.parametrize("openat2", [True, False])
def test_no_exact_path_leads_up(tmp_path: Path, openat2: bool) -> None:
    (tmp_path / "root/sub").mkdir(parents=True)
    fd = os.open(tmp_path / "root", os.O_RDONLY | os.O_DIRECTORY)
    tree = Tree(fd, None, use_openat2=openat2)
    tree.directory(b"sub")  # held, so that the next step starts there
    for path in (b"..", b"sub/..", b"sub/../..", b"../root", b"sub/../sub"):
        for opened in (tree.exact, tree.open_exact):
            with pytest.raises(OSError, match=os.strerror(errno.ELOOP)):
                opened(path)
    assert os.fstat(tree.exact(b"sub")).st_ino == os.stat(tmp_path / "root/sub").st_ino
    tree.close()
    os.close(fd)


def test_a_name_below_a_held_link_is_not_exact(tmp_path: Path) -> None:
    (tmp_path / "root/real/sub").mkdir(parents=True)
    (tmp_path / "root/link").symlink_to("real")
    fd = os.open(tmp_path / "root", os.O_RDONLY | os.O_DIRECTORY)
    tree = Tree(fd, None)
    assert tree.directory(b"link")[1] == b"real"
    for path in (b"link", b"link/sub"):
        with pytest.raises(OSError, match=f"{os.strerror(errno.ELOOP)}|{os.strerror(errno.ENOTDIR)}"):
            tree.exact(path)
    assert tree.directory(b"link/sub")[1] == b"real/sub"
    tree.close()
    os.close(fd)
