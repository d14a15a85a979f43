from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support import cri
from tests.vm.inside.node import Node
from tests.vm.names import BUSYBOX


@pytest.fixture
def node() -> Iterator[Node]:
    """The running service with busybox pulled; all pods are removed after each test."""
    made = Node()
    if cri.image_status(made.images, BUSYBOX) is None:
        cri.pull(made.images, BUSYBOX)
    yield made
    made.remove_all_pods()
    made.close()
