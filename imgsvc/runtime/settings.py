"""What the edge tells the runtime: plain data, filled from [runtime], [cni], [nri] and the paths of the daemon."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class HandlerSettings:
    """One RuntimeClass handler ([runtime.runtimes.NAME]).

    Attributes:
        type: "oci", or a containerd runtime name such as "io.containerd.kata.v2".
        path: the OCI CLI, or the shim binary; "" finds it: crun when its self-test passes, else runc.
        options: containerd's option names: BinaryName, Root, SystemdCgroup, NoNewKeyring, NoPivotRoot, ConfigPath, TypeUrl …
        pod_annotations, container_annotations: globs; annotations that match reach the OCI specification.
        cgroup_writable: on cgroup version 2, a container may divide its own cgroup.
        sandboxer: "shim" lets the shim make its pods; "" and "podsandbox" are pods made of namespaces.
    """

    name: str
    type: str = "oci"
    path: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    pod_annotations: tuple[str, ...] = ()
    container_annotations: tuple[str, ...] = ()
    privileged_without_host_devices: bool = False
    privileged_without_host_devices_all_devices_allowed: bool = False
    cgroup_writable: bool = False
    base_runtime_spec: str = ""
    cni_conf_dir: str = ""
    cni_max_conf_num: int = 0
    snapshotter: str = ""
    sandboxer: str = ""

    def describe(self, program: str) -> str:
        """What pods need of this to be stopped and removed, whatever the configuration says then; as text, for their records."""
        return json.dumps({"name": self.name, "type": self.type, "path": program, "options": self.options}, sort_keys=True)

    @classmethod
    def described(cls, text: str) -> HandlerSettings:
        """The settings that describe() returned. Raises: ValueError, TypeError."""
        return cls(**json.loads(text))


@dataclass(frozen=True, slots=True)
class StreamSettings:
    """[stream]: the server behind Exec, Attach and PortForward. port: 0 for any. idle_timeout [s]. Files: "" for plain HTTP."""

    address: str = "127.0.0.1"
    port: int = 0
    idle_timeout: float = 4 * 3600.0
    tls_cert_file: str = ""
    tls_key_file: str = ""


@dataclass(frozen=True, slots=True)
class CNISettings:
    """[cni]. max_conf_num 0 takes every file. use_internal_loopback: False also runs the plugin `loopback`; lo is up anyway."""

    bin_dirs: tuple[str, ...] = ("/opt/cni/bin", "/usr/lib/cni")
    conf_dir: str = "/etc/cni/net.d"
    max_conf_num: int = 1
    conf_template: str = ""
    ip_pref: str = ""
    setup_serially: bool = False
    use_internal_loopback: bool = True
    cache_dir: str = "/var/lib/imgsvc/cni"


@dataclass(frozen=True, slots=True)
class NriSettings:
    """[nri]. Time-outs [s].

    Attributes:
        disable: no plugins at all.
        socket_path: where plugins connect. disable_connections: none may; those that are installed are started all the same.
        plugin_path: a directory of programs INDEX-NAME that are started with the daemon.
        plugin_config_path: a directory of INDEX-NAME.conf or NAME.conf, handed to them.
        plugin_registration_timeout: until a plugin has registered, and until it knows what there is.
        plugin_request_timeout: for each other request.
    """

    disable: bool = False
    socket_path: str = "/var/run/nri/nri.sock"
    plugin_path: str = "/opt/nri/plugins"
    plugin_config_path: str = "/etc/nri/conf.d"
    plugin_registration_timeout: float = 5.0
    plugin_request_timeout: float = 2.0
    disable_connections: bool = False


@dataclass(frozen=True, slots=True)
class RuntimeSettings:
    """Everything the runtime service is configured with.

    state_dir is on tmpfs (dies with a reboot); root_dir is on disk. image_filesystem: where writable layers lie, named as
    ImageFsInfo names it, so that the kubelet can add them up.
    """

    state_dir: Path
    root_dir: Path
    handlers: Mapping[str, HandlerSettings] = field(default_factory=lambda: {"default": HandlerSettings("default")})
    default_runtime_name: str = "default"
    cni: CNISettings = field(default_factory=CNISettings)
    cgroup_driver: str = "cgroupfs"
    conmon: str = "conmon"
    image_filesystem: str = ""
    nri: NriSettings = field(default_factory=lambda: NriSettings(disable=True))
    max_container_log_line_size: int = 16384
    restrict_oom_score_adj: bool = False
    unset_seccomp_profile: str = ""
    disable_apparmor: bool = False
    enable_selinux: bool = False
    selinux_category_range: int = 1024
    disable_proc_mount: bool = False
    tolerate_missing_hugetlb_controller: bool = True
    disable_hugetlb_controller: bool = False
    device_ownership_from_security_context: bool = False
    ignore_image_defined_volumes: bool = False
    enable_unprivileged_ports: bool = True
    enable_unprivileged_icmp: bool = True
    enable_cdi: bool = True
    cdi_spec_dirs: tuple[str, ...] = ("/etc/cdi", "/var/run/cdi")
    drain_exec_sync_io_timeout_s: float = 0.0
