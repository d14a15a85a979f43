"""Looks up everything a container's specification needs, mounts its root and its image volumes."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from imgsvc.base import kernel
from imgsvc.base.errors import FailedPrecondition, InvalidArgument, NotFound, printable
from imgsvc.base.oci import Digest
from imgsvc.runtime import podfiles
from imgsvc.runtime.core import Core
from imgsvc.runtime.interfaces import RootMount, RunnableImage
from imgsvc.runtime.model import ContainerConfig, Mount, NamespaceMode, User, UserNamespace
from imgsvc.runtime.numbers import cgroups
from imgsvc.runtime.records import ContainerRecord, SandboxRecord
from imgsvc.runtime.rootfs import idmapped_volume, mapping_fd, mount_all, mount_idmapped, read_only
from imgsvc.runtime.spec import cdi, devices, security, selinux, volumes
from imgsvc.runtime.spec.build import STANDARD_MOUNTS, ContainerPlan, build, namespaces, process_user, working_dir
from imgsvc.runtime.spec.users import resolve_user


@dataclass(frozen=True, slots=True)
class BuiltContainer:
    """The specification, and what of it the record keeps. user: as it runs, with groups that devices add."""

    spec: dict[str, Any]
    user: User
    cgroups_path: str


class ContainerPlanner:
    """Everything between a CRI request and config.json that needs I/O."""

    def __init__(self, core: Core) -> None:
        self._core = core

    async def settle_image_volumes(self, config: ContainerConfig) -> ContainerConfig:
        """The configuration with the ID of every image volume's image noted in it, as ContainerStatus shows it.

        Raises: NotFound, InvalidArgument.
        """
        mounts = [await self._settle(mount) for mount in config.mounts]
        return replace(config, mounts=tuple(mounts))

    async def _settle(self, mount: Mount) -> Mount:
        if mount.image is None or not mount.image.image:
            return mount
        if mount.host_path:
            raise InvalidArgument("a mount has both an image and a host path", where=mount.container_path)
        if not mount.readonly:
            raise InvalidArgument("an image volume must be read-only", where=mount.container_path)
        image = await self._core.images.runnable(mount.image.image)
        if image is None:
            name = printable(mount.image.image, 200)
            raise NotFound(f'no image "{name}" on this node', where=mount.container_path, hint="pull it first")
        return replace(mount, image=replace(mount.image, image_ref=str(image.image_id)))

    async def image_roots(self, record: ContainerRecord) -> list[Sequence[RootMount]]:
        """What to mount for every volume, () for host paths. Raises: NotFound, PermissionDenied."""
        snapshotter = self._core.handler_settings(record.handler).snapshotter
        found: list[Sequence[RootMount]] = []
        for number, mount in enumerate(record.config.mounts):
            if mount.image is None or not mount.image.image:
                found.append(())
                continue
            key, image_id = volume_key(record.id, number), Digest(mount.image.image_ref)
            found.append(await self._core.images.prepare_root(key, image_id, snapshotter=snapshotter, readonly=True))
        return found

    def mount_root(self, record: ContainerRecord, mounts: Sequence[RootMount], sandbox: SandboxRecord) -> None:
        """Mount a container's root at BUNDLE/rootfs. Blocking."""
        bundle, label = self._core.paths.bundle(record.id), self._file_label(record, sandbox)
        rootfs = bundle / "rootfs"
        rootfs.mkdir(mode=0o711)
        user = sandbox.config.namespaces.user
        if user is None:
            mount_all(mounts, rootfs, label)
            return
        os.chown(bundle, user.uids[0].host_id, user.gids[0].host_id)
        with mapping_fd(user) as fd:
            mount_idmapped(mounts, rootfs, bundle / "lower", fd, user, label)

    def _file_label(self, record: ContainerRecord, sandbox: SandboxRecord) -> str:
        label = security.container_label(record.config.security, sandbox.selinux)
        return selinux.file_label(self._core.host.contexts.file, label)

    def build(
        self,
        record: ContainerRecord,
        sandbox: SandboxRecord,
        image: RunnableImage,
        image_volumes: Sequence[Sequence[RootMount]],
        pid_path: str,
    ) -> BuiltContainer:
        """The specification of a container whose root is mounted. Blocking. Raises: InvalidArgument, NotFound, FailedPrecondition."""
        core, config, pod = self._core, record.config, sandbox.config
        settings, handler = core.settings, core.handler_settings(record.handler)
        requested = config.security
        bundle = core.paths.bundle(record.id)
        if requested.privileged and not pod.linux.security_context.privileged:
            raise InvalidArgument("a privileged container in a pod that is not")
        user = resolve_user(requested, image.config.user, bundle / "rootfs")
        granted = security.capability_set(requested.capabilities, privileged=requested.privileged, host=core.host)
        host_devices = requested.privileged and not handler.privileged_without_host_devices and pod.namespaces.user is None
        cgroups_path = cgroups.runtime_path(
            pod.linux.cgroup_parent, sandbox.id, record.id, systemd=core.settings.cgroup_driver == "systemd"
        )
        directory = core.paths.sandbox(sandbox.id)
        places = volumes.Places(bundle / "rootfs", STANDARD_MOUNTS)
        mounts = self._mounts(record, sandbox, image, image_volumes, places)
        plan = ContainerPlan(
            container_id=record.id,
            sandbox_id=sandbox.id,
            config=config,
            pod=pod,
            image=image.config,
            image_name=record.image_name,
            handler=record.handler,
            user=user,
            host=core.host,
            rootfs=bundle / "rootfs",
            cwd=places.find(working_dir(config, image.config)),
            namespaces=namespaces(config, pod, core.paths.pins(sandbox.id), pid_path, core.host),
            user_namespace=pod.namespaces.user,
            cgroups_path=cgroups_path,
            shm=podfiles.shm_source(directory, pod) if requested.namespace_options.ipc != NamespaceMode.CONTAINER else "",
            files={places.find(path): source for path, source in podfiles.provided(directory).items()},
            mounts=mounts,
            devices=devices.all_of_host() if host_devices else devices.requested(config.devices),
            all_devices=host_devices or (requested.privileged and handler.privileged_without_host_devices_all_devices_allowed),
            granted=granted,
            ambient=security.ambient_set(requested.capabilities, granted),
            profile=security.seccomp(requested, granted, core.host, settings),
            apparmor=security.apparmor(requested, core.host, settings),
            selinux=security.container_label(requested, sandbox.selinux),
            file_label=self._file_label(record, sandbox),
            hidden=security.hidden_paths(requested, settings, user_namespace=pod.namespaces.user is not None),
            root_propagation=volumes.root_propagation(config.mounts),
            device_owner=user if settings.device_ownership_from_security_context else None,
            cgroup_writable=handler.cgroup_writable,
            restrict_oom_score_adj=settings.restrict_oom_score_adj,
            tolerate_missing_hugetlb=settings.tolerate_missing_hugetlb_controller,
            annotation_globs=(handler.pod_annotations, handler.container_annotations),
            base=_base_spec(handler.base_runtime_spec),
        )
        made = build(plan)
        if config.CDI_devices:
            if not settings.enable_cdi:
                raise FailedPrecondition("CDI devices are asked for, but enable_cdi is false")
            cdi.apply(made, cdi.edits_for([device.name for device in config.CDI_devices], settings.cdi_spec_dirs))
            made["mounts"] = volumes.in_mount_order(made["mounts"])
        return built_from(made)

    def _mounts(
        self,
        record: ContainerRecord,
        sandbox: SandboxRecord,
        image: RunnableImage,
        image_volumes: Sequence[Sequence[RootMount]],
        places: volumes.Places,
    ) -> list[volumes.BoundMount]:
        """The pod's volumes, and the image's where no volume of the pod, no kernel view and no root of it would be covered."""
        core, bundle = self._core, self._core.paths.bundle(record.id)
        rro = core.runtime_of(record).features.recursive_read_only_mounts
        label = self._file_label(record, sandbox)
        found: list[volumes.BoundMount] = []
        given = list(enumerate(zip(record.config.mounts, image_volumes, strict=True)))
        for number, (mount, roots) in sorted(given, key=lambda item: volumes.depth(item[1][0].container_path)):
            if roots:
                bound = self._image_volume(bundle, number, mount, roots, sandbox, label)
            else:
                bound = self._host_volume(bundle, number, mount, label, rro=rro)
            found.append(replace(bound, destination=places.mount(mount.container_path)))
        if not core.settings.ignore_image_defined_volumes:
            for number, place in enumerate(sorted({places.find(path) for path in image.config.volumes})):
                if place != "/" and not places.is_covered(place):
                    storage = core.paths.volumes(record.id) / str(number)
                    found.append(self._declared_volume(bundle, number, place, storage, sandbox, label))
        return found

    def _host_volume(self, bundle: Path, number: int, mount: Mount, label: str, *, rro: bool) -> volumes.BoundMount:
        bound = volumes.host_mount(mount, rro=rro)
        if mount.selinux_relabel and label:
            selinux.relabel_volume(bound.source, label)
        if not mount.uidMappings and not mount.gidMappings:
            return bound
        user = UserNamespace(NamespaceMode.POD, mount.uidMappings, mount.gidMappings)
        return idmapped_volume(bound, bundle / f"volume-{number}", user)

    def _image_volume(
        self, bundle: Path, number: int, mount: Mount, roots: Sequence[RootMount], sandbox: SandboxRecord, label: str
    ) -> volumes.BoundMount:
        base = bundle / f"image-{number}"
        root = base / "root"
        root.mkdir(mode=0o711, parents=True)
        (base / "empty").mkdir(mode=0o711)
        roots = [read_only(mount, base / "empty") for mount in roots]
        options = volumes.image_mount_options(mount)
        user = sandbox.config.namespaces.user
        if user:
            with mapping_fd(user) as fd:
                mount_idmapped(roots, root, base / "lower", fd, user, label)
        else:
            mount_all(roots, root, label)
        volumes.sub_path_of_image(root, mount.image_sub_path, base / "view")
        return volumes.BoundMount(mount.container_path, str(base / "view"), options)

    def _declared_volume(
        self, bundle: Path, number: int, place: str, storage: Path, sandbox: SandboxRecord, label: str
    ) -> volumes.BoundMount:
        user = sandbox.config.namespaces.user
        owner = (user.uids[0].host_id, user.gids[0].host_id) if user else (0, 0)
        bound = volumes.declared_volume(bundle / "rootfs", place, storage, owner)
        selinux.relabel(bound.source, label)
        if user is None:
            return bound
        view = bundle / f"declared-{number}"  # the runtime looks it up as the pod's root, which may not pass through imgsvc's directories
        view.mkdir(mode=0o711)
        kernel.mount(bound.source, str(view), "", kernel.MS_BIND)
        return replace(bound, source=str(view))


def built_from(spec: dict[str, Any]) -> BuiltContainer:
    """A finished specification, with what the record keeps of it."""
    return BuiltContainer(spec, process_user(spec), spec["linux"]["cgroupsPath"])


def _base_spec(path: str) -> Mapping[str, Any]:
    if not path:
        return {}
    try:
        value = json.loads(Path(path).read_bytes())
    except (OSError, ValueError) as error:
        raise FailedPrecondition(f"base_runtime_spec cannot be read: {error}", where=path) from error
    return value if isinstance(value, dict) else {}


def volume_key(container_id: str, number: int) -> str:
    """Key under which the image side keeps the root of an image volume."""
    return f"{container_id}-volume-{number}"
