"""C-D2 on this machine: the store is on a disk that loses power during a pull, and right after it was acknowledged.

tests/vm does the same with the power of a whole machine; here a round takes seconds.
"""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from imgsvc.api import admin_pb2, admin_pb2_grpc, cri_pb2
from tests.support import cri, images
from tests.support.daemon import RPC_TIMEOUT, Daemon
from tests.support.disk import Disk, Expected
from tests.support.faults import FailingDisk
from tests.support.registries import RealRegistry
from tests.vm.images import cut_layers
from tests.vm.names import CUT

pytestmark = pytest.mark.root

ROUNDS = 2
SAME_LAYERS = "docker.io/vm/same-layers:latest"


@dataclass(slots=True)
class Node:
    """A daemon whose store is on a disk that fails."""

    daemon: Daemon
    disk: FailingDisk
    expected: Expected

    def pull(self, name: str = CUT) -> grpc.Future[cri_pb2.PullImageResponse]:
        """Begin to."""
        request = cri_pb2.PullImageRequest(image=cri_pb2.ImageSpec(image=name))
        return self.daemon.images().PullImage.future(request, timeout=RPC_TIMEOUT)

    def lose_power(self) -> None:
        """Then start again."""
        self.disk.cut()
        self.daemon.kill()
        self.disk.replace()
        self.daemon.start()

    def present(self, name: str = CUT) -> bool:
        """Whether the image is there. Raises: AssertionError when it is there, but not whole, or something else is broken."""
        there = cri.image_status(self.daemon.images(), name) is not None
        if there:
            store = Disk(self.daemon.root)
            self.expected.check(store, store.images()[name])
        report = json.loads(self.admin().Check(admin_pb2.CheckRequest(deep=True), timeout=RPC_TIMEOUT).json)
        assert [found for found in report["findings"] if found["broken"]] == []
        return there

    def forget(self) -> None:
        """For the next round."""
        self.daemon.images().RemoveImage(cri_pb2.RemoveImageRequest(image=cri_pb2.ImageSpec(image=CUT)), timeout=RPC_TIMEOUT)
        self.admin().Collect(admin_pb2.CollectRequest(), timeout=RPC_TIMEOUT)

    def admin(self) -> admin_pb2_grpc.AdminStub:
        """On a connection of its own, as images()."""
        return admin_pb2_grpc.AdminStub(self.daemon.channel())


@pytest.fixture
def make_node(make_daemon: Callable[..., Daemon], registry: RealRegistry, tmp_path: Path) -> Iterator[Callable[..., Node]]:
    """Make a running one."""
    if not shutil.which("mkfs.ext4") or not Path("/dev/loop-control").exists():
        pytest.skip("mkfs.ext4 is not installed, or there are no loop devices")
    layers = cut_layers()
    packed = [images.layer(data) for data in layers]
    registry.push(images.image(packed), "vm/cut")
    registry.push(images.image(packed, Env=["OTHER=image"]), "vm/same-layers")
    made: list[Node] = []

    def make(settings: str = "") -> Node:
        daemon = make_daemon(settings=settings)
        daemon.map_host("docker.io", registry.address)
        disk = FailingDisk(tmp_path / "disk", daemon.root)
        disk.mount()
        made.append(Node(daemon, disk, Expected(tmp_path / "expected", layers)))
        daemon.start()
        return made[-1]

    yield make
    for node in made:
        node.daemon.kill()
        node.disk.unmount()


def test_c_d2_an_image_is_whole_when_the_power_goes_right_after_pullimage_answered(make_node: Callable[..., Node]) -> None:
    node = make_node()
    for name in (CUT, SAME_LAYERS):  # of the second, only documents are fetched
        node.pull(name).result()
        node.lose_power()
        assert node.present(name)


def test_c_d2_a_power_cut_during_a_pull_leaves_the_image_absent_or_whole(make_node: Callable[..., Node]) -> None:
    node = make_node()
    began = time.monotonic()
    node.pull().result()
    length = time.monotonic() - began
    node.forget()
    for _ in range(ROUNDS):
        call = node.pull()
        time.sleep(random.uniform(0, length))
        acknowledged = call.done()
        node.lose_power()
        assert node.present() or not acknowledged
        node.pull().result()  # and it can be taken up again
        assert node.present()
        node.forget()


def test_without_syncing_a_power_cut_takes_what_was_acknowledged(make_node: Callable[..., Node]) -> None:
    """This is what the other tests would see if something was not synced."""
    node = make_node('[images]\nsync = "none"\n')
    node.pull().result()
    with pytest.raises((AssertionError, OSError)):
        survives(node)


def survives(node: Node) -> None:
    """The power goes, and the image is whole all the same. Raises: AssertionError, OSError (an unreadable store) when it is not."""
    node.lose_power()
    assert node.present()
