"""Runs inside the machine: what of an image is there, and is it whole? `python -m tests.vm.look NAME`, answer as JSON.

{"image": CRI's word on it, "differences": paths that are not as the layers say, "fsck": what `fsck --deep` finds broken}
"""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path

import grpc

from imgsvc.api import admin_pb2, admin_pb2_grpc
from imgsvc.api.cri_pb2_grpc import ImageServiceStub
from tests.snapshot.trees import read_tree
from tests.support import cri
from tests.support.disk import Disk
from tests.vm.names import EXPECTED

ADDRESS = "unix:///run/imgsvc/imgsvc.sock"
STORE = Path("/var/lib/imgsvc")


def differences(name: str) -> list[str]:
    """Paths of the unpacked image that are not what GNU tar made of its layers."""
    expected, unowned = pickle.loads((Path("/") / EXPECTED).read_bytes())
    disk = Disk(STORE)
    with disk.mounted(disk.images()[name]) as root:
        found = read_tree(root, unowned_times=unowned)
    return sorted(path for path in found.keys() | expected.keys() if found.get(path) != expected.get(path))


def main(name: str) -> None:
    """Print the answer."""
    with grpc.insecure_channel(ADDRESS) as channel:
        present = cri.image_status(ImageServiceStub(channel), name) is not None
        report = json.loads(admin_pb2_grpc.AdminStub(channel).Check(admin_pb2.CheckRequest(deep=True), timeout=120).json)
    # Not broken: a layer of an image that was not acknowledged, which is there already.
    broken = [found for found in report["findings"] if found["broken"]]
    print(json.dumps({"image": present, "differences": differences(name) if present else [], "fsck": broken}))


if __name__ == "__main__":
    main(sys.argv[1])
