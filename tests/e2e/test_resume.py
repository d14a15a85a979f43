"""Downloads go on where they were cut off, whatever cut them (issue 3; needs.md A5.3)."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Iterator

import grpc
import pytest

from imgsvc.api import cri_pb2
from imgsvc.base.oci import MIB
from imgsvc.content.ranges import RangeSet
from tests.fakes.registry import FakeRegistry
from tests.registry.support import hosts_d, noise
from tests.support import cri, images
from tests.support.daemon import RPC_TIMEOUT, Daemon
from tests.support.images import BuiltDocument, Entry

SIZE = 128 * MIB
IN_FLIGHT = 16 * MIB
RATES = {"parallel": 6 * MIB, "one-connection": 24 * MIB}  # [bytes/s] of a connection; what is in flight when the daemon dies is lost


@pytest.fixture(scope="module")
def large() -> BuiltDocument:
    return images.image([images.layer([Entry("big", noise(SIZE))], "plain")])


@pytest.fixture(params=list(RATES))
def node(request: pytest.FixtureRequest, make_daemon: Callable[..., Daemon], large: BuiltDocument) -> Iterator[tuple[Daemon, FakeRegistry]]:
    """A daemon, not started, and the registry that has the image library/large."""
    with FakeRegistry(rate=RATES[request.param]) as fake:
        fake.add(large, "library/large")
        daemon = make_daemon()
        if request.param == "one-connection":
            daemon.config.write_text(daemon.config.read_text().replace("[registry]\n", "[registry]\nmax_extra_connections = 0\n"))
        hosts_d(daemon.directory / "hosts.d", {"docker.io": f'fallback = false\n[host."{fake.url}"]\n'})
        yield daemon, fake


def kept(daemon: Daemon) -> int:
    """Bytes of the layer that a daemon which is gone has on disk, as its journal says; and the file has them."""
    (directory,) = [path for path in (daemon.root / "content/ingest").iterdir() if (path / "data").stat().st_size > MIB]
    ranges = RangeSet()
    for offset, length in struct.iter_unpack("<QQ", (directory / "journal").read_bytes()):
        ranges.add(offset, offset + length)
    return sum(end - start for start, end in ranges)


def test_a5_3_after_sigkill_what_was_on_disk_is_not_fetched_again(node: tuple[Daemon, FakeRegistry], large: BuiltDocument) -> None:
    """How much of what was sent was on disk at the kill is up to the machine's load; what was, stays."""
    daemon, fake = node
    daemon.start()
    call = daemon.images().PullImage.future(cri_pb2.PullImageRequest(image=cri_pb2.ImageSpec(image="large")), timeout=RPC_TIMEOUT)
    deadline = time.monotonic() + 90
    while fake.sent < 0.6 * SIZE:
        assert not call.done(), call.exception()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    daemon.kill()
    assert isinstance(call.exception(), grpc.RpcError)
    time.sleep(0.3)  # what is on its way ends in nobody's socket
    first, there = fake.sent, kept(daemon)
    assert MIB < there < SIZE
    connections = fake.connections

    daemon.start()
    assert cri.pull(daemon.images(), "large") == str(large.config_digest)

    again = fake.sent - first
    # A connection whose rest another one takes over has sent what nobody reads: as much as its socket's buffers hold.
    assert again <= SIZE - there + IN_FLIGHT, f"{again} bytes fetched again, {there} of {SIZE} were there"
    assert fake.connections > connections
    layer = max(large.blobs, key=lambda digest: len(large.blobs[digest]))
    assert (daemon.root / "content/blobs/sha256" / layer.hex).read_bytes() == large.blobs[layer]
    assert daemon.cli("fsck").returncode == 0
