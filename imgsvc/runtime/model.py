"""What CRI asks for, as plain data. Field names are those of the CRI messages, so conversion is mechanical (codec.py).

Units are CRI's: bytes, microseconds for CPU periods and quotas, nanoseconds since the epoch for times.
Source: cri-api runtime/v1 api.proto.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum


class NamespaceMode(IntEnum):
    """Whose namespace: the pod's, the container's own, the node's, or another container's."""

    POD = 0
    CONTAINER = 1
    NODE = 2
    TARGET = 3


class ProfileType(IntEnum):
    """Kind of a seccomp or AppArmor profile."""

    RuntimeDefault = 0
    Unconfined = 1
    Localhost = 2


class SupplementalGroupsPolicy(IntEnum):
    """Merge adds the groups of the image's /etc/group; Strict takes only what the pod names."""

    Merge = 0
    Strict = 1


class Propagation(IntEnum):
    """Mount propagation of a volume."""

    PRIVATE = 0
    HOST_TO_CONTAINER = 1
    BIDIRECTIONAL = 2


@dataclass(frozen=True, slots=True)
class IDMapping:
    """A run of IDs. length: number of IDs."""

    host_id: int = 0
    container_id: int = 0
    length: int = 0


@dataclass(frozen=True, slots=True)
class UserNamespace:
    """POD: new user namespace with these mappings; NODE: the host's."""

    mode: NamespaceMode = NamespaceMode.NODE
    uids: tuple[IDMapping, ...] = ()
    gids: tuple[IDMapping, ...] = ()


@dataclass(frozen=True, slots=True)
class NamespaceOption:
    """Which namespaces are shared, and with which pod or host."""

    network: NamespaceMode = NamespaceMode.POD
    pid: NamespaceMode = NamespaceMode.POD
    ipc: NamespaceMode = NamespaceMode.POD
    target_id: str = ""
    userns_options: UserNamespace | None = None

    @property
    def user(self) -> UserNamespace | None:
        """The user namespace of the pod, None when it is the host's."""
        return self.userns_options if self.userns_options and self.userns_options.mode == NamespaceMode.POD else None


@dataclass(frozen=True, slots=True)
class SecurityProfile:
    """A seccomp or AppArmor profile."""

    profile_type: ProfileType = ProfileType.RuntimeDefault
    localhost_ref: str = ""


@dataclass(frozen=True, slots=True)
class SELinuxOption:
    """An SELinux context."""

    user: str = ""
    role: str = ""
    type: str = ""
    level: str = ""


@dataclass(frozen=True, slots=True)
class HugepageLimit:
    """limit [bytes] of pages of one size, e.g. "2MB"."""

    page_size: str = ""
    limit: int = 0


@dataclass(frozen=True, slots=True)
class LinuxContainerResources:
    """0 and "" mean: not given."""

    cpu_period: int = 0
    cpu_quota: int = 0
    cpu_shares: int = 0
    memory_limit_in_bytes: int = 0
    oom_score_adj: int = 0
    cpuset_cpus: str = ""
    cpuset_mems: str = ""
    hugepage_limits: tuple[HugepageLimit, ...] = ()
    unified: Mapping[str, str] = field(default_factory=dict)
    memory_swap_limit_in_bytes: int = 0


@dataclass(frozen=True, slots=True)
class DNSConfig:
    """What goes into resolv.conf."""

    servers: tuple[str, ...] = ()
    searches: tuple[str, ...] = ()
    options: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class PortMapping:
    """A host port. protocol: 0 TCP, 1 UDP, 2 SCTP."""

    protocol: int = 0
    container_port: int = 0
    host_port: int = 0
    host_ip: str = ""


@dataclass(frozen=True, slots=True)
class LinuxSandboxSecurityContext:
    """Security settings of a pod."""

    namespace_options: NamespaceOption = field(default_factory=NamespaceOption)
    selinux_options: SELinuxOption | None = None
    run_as_user: int | None = None
    run_as_group: int | None = None
    readonly_rootfs: bool = False
    supplemental_groups: tuple[int, ...] = ()
    privileged: bool = False
    seccomp: SecurityProfile | None = None
    apparmor: SecurityProfile | None = None


@dataclass(frozen=True, slots=True)
class LinuxPodSandboxConfig:
    """The Linux part of a pod."""

    cgroup_parent: str = ""
    security_context: LinuxSandboxSecurityContext = field(default_factory=LinuxSandboxSecurityContext)
    sysctls: Mapping[str, str] = field(default_factory=dict)
    overhead: LinuxContainerResources | None = None
    resources: LinuxContainerResources | None = None


@dataclass(frozen=True, slots=True)
class PodSandboxMetadata:
    """Who the pod is to the kubelet."""

    name: str = ""
    uid: str = ""
    namespace: str = ""
    attempt: int = 0


@dataclass(frozen=True, slots=True)
class PodSandboxConfig:
    """A pod as the kubelet wants it."""

    metadata: PodSandboxMetadata = field(default_factory=PodSandboxMetadata)
    hostname: str = ""
    log_directory: str = ""
    dns_config: DNSConfig | None = None
    port_mappings: tuple[PortMapping, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    annotations: Mapping[str, str] = field(default_factory=dict)
    linux: LinuxPodSandboxConfig = field(default_factory=LinuxPodSandboxConfig)

    @property
    def namespaces(self) -> NamespaceOption:
        """Namespace options of the pod."""
        return self.linux.security_context.namespace_options


@dataclass(frozen=True, slots=True)
class ImageSpec:
    """Names of an image in a request."""

    image: str = ""
    annotations: Mapping[str, str] = field(default_factory=dict)
    user_specified_image: str = ""
    runtime_handler: str = ""
    image_ref: str = ""


@dataclass(frozen=True, slots=True)
class KeyValue:
    """One environment variable."""

    key: str = ""
    value: bytes = b""


@dataclass(frozen=True, slots=True)
class Mount:
    """A volume: host_path, or an image, onto container_path."""

    container_path: str = ""
    host_path: str = ""
    readonly: bool = False
    selinux_relabel: bool = False
    propagation: Propagation = Propagation.PRIVATE
    uidMappings: tuple[IDMapping, ...] = ()  # noqa: N815 -- CRI spells it so
    gidMappings: tuple[IDMapping, ...] = ()  # noqa: N815
    recursive_read_only: bool = False
    image: ImageSpec | None = None
    image_sub_path: str = ""
    mount_options: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Device:
    """A device of the host. permissions: some of "rwm"."""

    container_path: str = ""
    host_path: str = ""
    permissions: str = ""


@dataclass(frozen=True, slots=True)
class CDIDevice:
    """vendor/class=device."""

    name: str = ""


@dataclass(frozen=True, slots=True)
class Capability:
    """Names with or without CAP_, or ALL."""

    add_capabilities: tuple[str, ...] = ()
    drop_capabilities: tuple[str, ...] = ()
    add_ambient_capabilities: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class LinuxContainerSecurityContext:
    """Security settings of a container."""

    capabilities: Capability | None = None
    privileged: bool = False
    namespace_options: NamespaceOption = field(default_factory=NamespaceOption)
    selinux_options: SELinuxOption | None = None
    run_as_user: int | None = None
    run_as_group: int | None = None
    run_as_username: str = ""
    readonly_rootfs: bool = False
    supplemental_groups: tuple[int, ...] = ()
    supplemental_groups_policy: SupplementalGroupsPolicy = SupplementalGroupsPolicy.Merge
    no_new_privs: bool = False
    masked_paths: tuple[str, ...] = ()
    readonly_paths: tuple[str, ...] = ()
    seccomp: SecurityProfile | None = None
    apparmor: SecurityProfile | None = None
    apparmor_profile: str = ""
    seccomp_profile_path: str = ""


@dataclass(frozen=True, slots=True)
class LinuxContainerConfig:
    """The Linux part of a container."""

    resources: LinuxContainerResources | None = None
    security_context: LinuxContainerSecurityContext = field(default_factory=LinuxContainerSecurityContext)


@dataclass(frozen=True, slots=True)
class ContainerMetadata:
    """Name within the pod, and which try it is."""

    name: str = ""
    attempt: int = 0


@dataclass(frozen=True, slots=True)
class ContainerConfig:
    """A container as the kubelet wants it."""

    metadata: ContainerMetadata = field(default_factory=ContainerMetadata)
    image: ImageSpec = field(default_factory=ImageSpec)
    command: tuple[str, ...] = ()
    args: tuple[str, ...] = ()
    working_dir: str = ""
    envs: tuple[KeyValue, ...] = ()
    mounts: tuple[Mount, ...] = ()
    devices: tuple[Device, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    annotations: Mapping[str, str] = field(default_factory=dict)
    log_path: str = ""
    stdin: bool = False
    stdin_once: bool = False
    tty: bool = False
    linux: LinuxContainerConfig = field(default_factory=LinuxContainerConfig)
    CDI_devices: tuple[CDIDevice, ...] = ()
    stop_signal: int = 0

    @property
    def security(self) -> LinuxContainerSecurityContext:
        """Security settings."""
        return self.linux.security_context


@dataclass(frozen=True, slots=True)
class User:
    """The numbers a process runs with. groups: supplementary groups, the primary one among them."""

    uid: int = 0
    gid: int = 0
    groups: tuple[int, ...] = ()
