"""The choice of what holds a pod: made once, when the pod is made, by its configuration and its handler.

A new driver is one file with a `KIND`, and its line in KINDS.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from imgsvc.base.errors import FailedPrecondition, printable
from imgsvc.runtime.core import Core
from imgsvc.runtime.holder import namespaces, pause, shim_pod
from imgsvc.runtime.holder.interfaces import Kind, PodHolder
from imgsvc.runtime.records import SandboxRecord

# The first that suits holds a pod; the others are tried when it answers Unimplemented. The last suits every pod.
KINDS: Final[Sequence[Kind]] = (shim_pod.KIND, pause.KIND, namespaces.KIND)
_BY_NAME: Final[Mapping[str, Kind]] = {kind.name: kind for kind in KINDS}


def suitable(core: Core, record: SandboxRecord) -> list[Kind]:
    """The kinds for a pod that is about to be made, the preferred one first. Never empty."""
    return [kind for kind in KINDS if kind.suits(core, record)]


def kind_of(record: SandboxRecord) -> Kind:
    """The kind a pod was given. Raises: FailedPrecondition for one this imgsvc does not know."""
    if record.holder not in _BY_NAME:
        raise FailedPrecondition(f'pod sandbox {record.id} needs holder "{printable(record.holder, 40)}", which this imgsvc does not know')
    return _BY_NAME[record.holder]


def holder_of(core: Core, record: SandboxRecord) -> PodHolder:
    """What holds a pod. Raises: as kind_of."""
    return kind_of(record).make(core)
