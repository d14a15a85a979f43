"""Protobuf messages from records. One direction: requests are read by codec.from_proto."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Generic, TypeVar

from imgsvc.api import cri_pb2 as pb
from imgsvc.runtime.codec import fill_proto
from imgsvc.runtime.events import ContainerEvent
from imgsvc.runtime.model import ImageSpec
from imgsvc.runtime.records import ContainerRecord, SandboxRecord
from imgsvc.runtime.signals import cri_number
from imgsvc.runtime.state import container_state, sandbox_state

M = TypeVar("M")
R = TypeVar("R", bound=SandboxRecord | ContainerRecord)


class Lines(Generic[R, M]):
    """What a listing says of each record, made once for as long as the record stays what it is: the kubelet asks every second."""

    def __init__(self, live: Mapping[str, R], make: Callable[[R], M]) -> None:
        """live: all records there are, by ID."""
        self._live = live
        self._make = make
        self._made: dict[str, tuple[R, M]] = {}

    def of(self, records: Iterable[R]) -> list[M]:
        """A message for each record, in their order; not to be changed."""
        lines = [self._line(record) for record in records]
        if len(self._made) > 2 * len(self._live):
            self._made = {key: made for key, made in self._made.items() if key in self._live}
        return lines

    def _line(self, record: R) -> M:
        made = self._made.get(record.id)
        if made is None or made[0] is not record:
            made = self._made[record.id] = (record, self._make(record))
        return made[1]


def labels_match(labels: Mapping[str, str], selector: Mapping[str, str]) -> bool:
    """Whether all pairs of a selector are among the labels."""
    return all(labels.get(k) == v for k, v in selector.items())


def sandbox_item(record: SandboxRecord, boot_id: str) -> pb.PodSandbox:
    """A line of ListPodSandbox."""
    item = pb.PodSandbox(
        id=record.id,
        state=int(sandbox_state(record, boot_id)),  # type: ignore[arg-type]
        created_at=record.created_at,
        labels=record.config.labels,
        annotations=record.config.annotations,
        runtime_handler=record.runtime_handler,
    )
    fill_proto(item.metadata, record.config.metadata)
    return item


def sandbox_status(record: SandboxRecord, boot_id: str) -> pb.PodSandboxStatus:
    """The status of a pod."""
    status = pb.PodSandboxStatus(
        id=record.id,
        state=int(sandbox_state(record, boot_id)),  # type: ignore[arg-type]
        created_at=record.created_at,
        labels=record.config.labels,
        annotations=record.config.annotations,
        runtime_handler=record.runtime_handler,
    )
    fill_proto(status.metadata, record.config.metadata)
    fill_proto(status.linux.namespaces.options, record.config.namespaces)
    if record.ips and not record.stopped_at:
        status.network.ip = record.ips[0]
        status.network.additional_ips.extend(pb.PodIP(ip=ip) for ip in record.ips[1:])
    return status


def container_item(record: ContainerRecord, boot_id: str) -> pb.Container:
    """A line of ListContainers."""
    item = pb.Container(
        id=record.id,
        pod_sandbox_id=record.sandbox_id,
        image_ref=record.image_ref,
        image_id=record.image_id,
        state=int(container_state(record, boot_id)),  # type: ignore[arg-type]
        created_at=record.created_at,
        labels=record.config.labels,
        annotations=record.config.annotations,
    )
    fill_proto(item.metadata, record.config.metadata)
    fill_proto(item.image, shown_image(record))
    return item


def shown_image(record: ContainerRecord) -> ImageSpec:
    """The image of a container under the name people know."""
    asked = record.config.image
    return ImageSpec(record.image_name, asked.annotations, asked.user_specified_image, asked.runtime_handler, asked.image_ref)


def container_status(record: ContainerRecord, boot_id: str) -> pb.ContainerStatus:
    """The status of a container."""
    status = pb.ContainerStatus(
        id=record.id,
        state=int(container_state(record, boot_id)),  # type: ignore[arg-type]
        created_at=record.created_at,
        started_at=record.started_at,
        finished_at=record.finished_at,
        exit_code=record.exit_code,
        image_ref=record.image_ref,
        image_id=record.image_id,
        reason=record.reason,
        message=record.message,
        labels=record.config.labels,
        annotations=record.config.annotations,
        log_path=record.log_path,
        stop_signal=cri_number(record.stop_signal),  # type: ignore[arg-type]
    )
    fill_proto(status.metadata, record.config.metadata)
    fill_proto(status.image, shown_image(record))
    for mount in record.config.mounts:
        fill_proto(status.mounts.add(), mount)
    if record.resources:
        fill_proto(status.resources.linux, record.resources)
    if record.user:
        user = record.user
        status.user.linux.CopyFrom(pb.LinuxContainerUser(uid=user.uid, gid=user.gid, supplemental_groups=user.groups))
    return status


def event(item: ContainerEvent, boot_id: str) -> pb.ContainerEventResponse:
    """One message of GetContainerEvents."""
    response = pb.ContainerEventResponse(
        container_id=item.container_id,
        container_event_type=int(item.type),  # type: ignore[arg-type]
        created_at=item.created_at,
        containers_statuses=[container_status(c, boot_id) for c in item.containers],
    )
    if item.sandbox:
        response.pod_sandbox_status.CopyFrom(sandbox_status(item.sandbox, boot_id))
    return response
