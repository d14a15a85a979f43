"""Two images that share their lowest layer, and the calls that tests of the store make."""

from __future__ import annotations

import json
import random
from typing import Any

from imgsvc.api import admin_pb2, admin_pb2_grpc, cri_pb2
from imgsvc.base.oci import KIB, MIB
from tests.fakes.registry import FakeRegistry
from tests.snapshot.layers import Entry, directory, link, symlink, tar
from tests.support import cri
from tests.support.daemon import RPC_TIMEOUT, Daemon
from tests.support.images import image, layer

BASE, APP = "docker.io/two/base:1", "docker.io/two/app:1"


def noise(count: int, seed: int) -> bytes:
    return random.Random(seed).randbytes(count)


SHARED = tar(
    [
        directory("etc", 0o750, uid=5),
        Entry("etc/passwd", data=b"root", uid=7),
        Entry("etc/gone", data=b"gone"),
        directory("cache"),
        Entry("cache/old", data=b"old"),
        Entry("bin/tool", data=noise(300 * KIB, 1), mode=0o4755, xattrs={"user.note": b"kept"}),
        symlink("sh", "bin/tool"),
    ]
)
ONLY_BASE = tar([Entry("base-only", data=noise(50 * KIB, 2))])
BIG = tar([directory("opt"), Entry("opt/big", data=noise(5 * MIB // 2, 3)), *(Entry(f"opt/f{n}", data=b"%d" % n) for n in range(40))])
TOP = tar([Entry("etc/.wh.gone"), Entry("cache/.wh..wh..opq"), Entry("cache/new", data=b"new"), link("bin/same", "bin/tool")])
LAYERS = {BASE: (SHARED, ONLY_BASE), APP: (SHARED, BIG, TOP)}


def offer(registry: FakeRegistry) -> None:
    """Put both images there."""
    for name, contents in LAYERS.items():
        registry.add(image([layer(data) for data in contents]), name.removeprefix("docker.io/").partition(":")[0], "1")


def pull(daemon: Daemon, name: str) -> None:
    cri.pull(daemon.images(), name)


def admin(daemon: Daemon) -> admin_pb2_grpc.AdminStub:
    return admin_pb2_grpc.AdminStub(daemon.channel())


def collect(daemon: Daemon) -> list[str]:
    """`imgsvc gc`; what was removed."""
    report = json.loads(admin(daemon).Collect(admin_pb2.CollectRequest(), timeout=RPC_TIMEOUT).json)
    assert report["failed"] == {}
    return list(report["removed"])


def check(daemon: Daemon, *, deep: bool = True, repair: bool = False) -> list[dict[str, Any]]:
    """What `imgsvc fsck` finds."""
    request = admin_pb2.CheckRequest(deep=deep, repair=repair)
    return list(json.loads(admin(daemon).Check(request, timeout=RPC_TIMEOUT).json)["findings"])


def remove(daemon: Daemon, name: str) -> None:
    """RemoveImage."""
    request = cri_pb2.RemoveImageRequest(image=cri_pb2.ImageSpec(image=name))
    daemon.images().RemoveImage(request, timeout=RPC_TIMEOUT)
