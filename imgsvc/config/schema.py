"""The sections and keys of the configuration: a field is a key, its annotation the type, its default the default.

Key names are containerd's where the meaning is the same. Source: containerd's config v3.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Final

from imgsvc.base import places
from imgsvc.base.oci import GIB, MIB

VERSION: Final = 1
SNAPSHOTTERS: Final = ("overlayfs", "erofs", "native")
LOG_LEVELS: Final = ("debug", "info", "warning", "error")
# Sections that people bring along from containerd, and why they are no use here.
REFUSED: Final = {
    "proxy_plugins": "snapshotters, content stores and differs in other processes are not used; imgsvc has overlayfs and native itself",
    "plugins": "that is containerd's configuration; `imgsvc config import` turns it into ours",
}

Duration = Annotated[float, "duration"]  # [seconds]; written as Go does, "1m30s", or a number of seconds
Raw = dict[str, Any]  # a table whose keys are defined elsewhere (runtime options, legacy registry tables)


@dataclass(frozen=True, slots=True)
class Grpc:
    """[grpc]: the CRI socket. Message sizes [bytes]."""

    address: str = ""  # "": imgsvc.sock in the state directory
    uid: int = 0
    gid: int = 0
    max_recv_message_size: int = 16 * MIB
    max_send_message_size: int = 16 * MIB


@dataclass(frozen=True, slots=True)
class Debug:
    """[debug]: the log, on standard error. level: debug (with every request to a registry), info, warning, error; format: text, json."""

    level: str = "info"
    format: str = "text"


@dataclass(frozen=True, slots=True)
class Limits:
    """[images.limits]: bounds on one layer; 0 switches a bound off. unpacked_bytes [bytes]; ratio unpacked/compressed."""

    unpacked_bytes: int = 128 * GIB
    entries: int = 10_000_000
    ratio: int = 1000


@dataclass(frozen=True, slots=True)
class Overlayfs:
    """[images.overlayfs]: containerd's options of its overlayfs snapshotter.

    mount_options: said with every mount, e.g. "volatile": what a container wrote is gone after a power cut anyway, images are
    synced all the same. upperdir_label: snapshots show their upper directory as a label. sync_remove: a removed snapshot's
    files are gone when its removal is answered. slow_chown: where idmapped mounts do not work, pods with user namespaces get
    copies of their images; else they are refused.
    """

    mount_options: tuple[str, ...] = ()
    upperdir_label: bool = False
    sync_remove: bool = False
    slow_chown: bool = True


@dataclass(frozen=True, slots=True)
class Images:
    """[images]: pulling and unpacking."""

    snapshotter: str = "auto"  # overlayfs where this node can, else native
    max_concurrent_downloads: int = 6  # per node
    max_concurrent_downloads_per_image: int = 3
    max_concurrent_unpacks: int = 2
    image_pull_progress_timeout: Duration = 300.0
    discard_unpacked_layers: bool = False
    sync: str = "full"  # "none": a power cut may lose images that were acknowledged
    pinned_images: tuple[str, ...] = ()
    limits: Limits = field(default_factory=Limits)
    overlayfs: Overlayfs = field(default_factory=Overlayfs)


@dataclass(frozen=True, slots=True)
class HostCredential:
    """[registry.credentials.hosts."HOST"]: one secret for one registry; files keep it out of this one."""

    username: str = ""
    password_file: str = ""
    identity_token_file: str = ""
    registry_token_file: str = ""


@dataclass(frozen=True, slots=True)
class Credentials:
    """[registry.credentials]: the node's own credentials, asked in this order after hosts.d's credentials.toml.

    provider_config, provider_bin_dir: the kubelet's --image-credential-provider-config (a file in YAML or JSON, or a directory
    of such) and --image-credential-provider-bin-dir.
    """

    hosts: dict[str, HostCredential] = field(default_factory=dict)
    files: tuple[str, ...] = ()  # Docker config.json or Podman auth.json
    helpers: dict[str, str] = field(default_factory=dict)  # registry → NAME of docker-credential-NAME
    provider_config: str = ""
    provider_bin_dir: str = ""


@dataclass(frozen=True, slots=True)
class Registry:
    """[registry]: where hosts.toml files live; the legacy inline tables are read with a warning."""

    config_path: str = "/etc/imgsvc/hosts.d:/etc/containerd/certs.d:/etc/docker/certs.d"
    foreign_layer_hosts: tuple[str, ...] = ()  # "host[:port]" from which the URLs in layer descriptors are fetched, without credentials
    max_extra_connections: int = 24  # per node, with which large blobs are fetched in parallel ranges; 0: one connection per blob
    credentials: Credentials = field(default_factory=Credentials)
    mirrors: Raw = field(default_factory=dict)
    configs: Raw = field(default_factory=dict)
    auths: Raw = field(default_factory=dict)
    headers: Raw = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Decrypt:
    """[decrypt]: encrypted images. key_model "node": keys are the node's; "": decryption is off."""

    key_model: str = "node"
    keys_path: str = "/etc/imgsvc/keys"
    keyprovider_config: str = ""  # "": OCICRYPT_KEYPROVIDER_CONFIG of the environment
    ocicrypt_config: str = ""  # which PKCS#11 modules may be loaded; "": OCICRYPT_CONFIG of the environment
    passwords: dict[str, str] = field(default_factory=dict)  # key file name → file that holds its password
    provider_parameters: dict[str, str] = field(default_factory=dict)  # key provider → file that holds what it is sent


@dataclass(frozen=True, slots=True)
class StreamProcessor:
    """[stream_processors."ID"]: an external decoder, as containerd has it."""

    accepts: tuple[str, ...] = ()
    returns: str = ""
    path: str = ""
    args: tuple[str, ...] = ()
    env: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Handler:
    """[runtime.runtimes.NAME]: one RuntimeClass handler. type "oci", or a containerd shim's io.containerd.NAME.vN."""

    type: str = "oci"
    path: str = ""  # "": crun when a self-test passes, else runc
    monitor: str = "conmon"
    options: Raw = field(default_factory=dict)
    pod_annotations: tuple[str, ...] = ()
    container_annotations: tuple[str, ...] = ()
    privileged_without_host_devices: bool = False
    privileged_without_host_devices_all_devices_allowed: bool = False
    cgroup_writable: bool = False  # on cgroup version 2, a container may divide its own cgroup
    base_runtime_spec: str = ""
    snapshotter: str = ""
    cni_conf_dir: str = ""
    cni_max_conf_num: int = 0
    sandboxer: str = ""  # "shim": the shim makes its pods, by the sandbox API; "", "podsandbox": we do


@dataclass(frozen=True, slots=True)
class Runtime:
    """[runtime]: sandboxes and containers."""

    enabled: bool = True
    default_runtime_name: str = "default"
    cgroup_driver: str = "auto"  # "systemd", "cgroupfs"; auto: systemd where it is process 1 and cgroup v2 is mounted
    conmon: str = "conmon"  # name or path of the monitor
    max_container_log_line_size: int = 16384  # [bytes] of one line before it is split, -1: 4 MiB; with conmon (type "oci") always 8192
    restrict_oom_score_adj: bool = False
    unset_seccomp_profile: str = ""
    disable_apparmor: bool = False
    enable_selinux: bool = False
    selinux_category_range: int = 1024  # a pod's two categories are below it
    disable_proc_mount: bool = False
    tolerate_missing_hugetlb_controller: bool = True
    disable_hugetlb_controller: bool = False
    device_ownership_from_security_context: bool = False
    ignore_image_defined_volumes: bool = False
    enable_unprivileged_ports: bool = True
    enable_unprivileged_icmp: bool = True
    enable_cdi: bool = True
    cdi_spec_dirs: tuple[str, ...] = ("/etc/cdi", "/var/run/cdi")
    drain_exec_sync_io_timeout: Duration = 0.0
    runtimes: dict[str, Handler] = field(default_factory=lambda: {"default": Handler()})


@dataclass(frozen=True, slots=True)
class Nri:
    """[nri]: plugins that watch and change pods and containers."""

    disable: bool = False
    socket_path: str = "/var/run/nri/nri.sock"
    plugin_path: str = "/opt/nri/plugins"  # programs INDEX-NAME, started with the daemon
    plugin_config_path: str = "/etc/nri/conf.d"  # INDEX-NAME.conf or NAME.conf, handed to them
    plugin_registration_timeout: Duration = 5.0  # until a plugin has registered, and until it has taken in what there is
    plugin_request_timeout: Duration = 2.0  # then it is dropped
    disable_connections: bool = False  # only the plugins of plugin_path


@dataclass(frozen=True, slots=True)
class Cni:
    """[cni]: pod networks."""

    bin_dirs: tuple[str, ...] = ("/opt/cni/bin", "/usr/lib/cni")
    conf_dir: str = "/etc/cni/net.d"
    max_conf_num: int = 1
    conf_template: str = ""
    ip_pref: str = ""
    setup_serially: bool = False
    use_internal_loopback: bool = True  # false: the plugin `loopback` is run as well, and must be there
    cache_dir: str = ""  # "": cni in the root directory


@dataclass(frozen=True, slots=True)
class Stream:
    """[stream]: the server behind Exec, Attach and PortForward."""

    address: str = "127.0.0.1"
    port: int = 0
    idle_timeout: Duration = 4 * 3600.0
    tls_cert_file: str = ""
    tls_key_file: str = ""


@dataclass(frozen=True, slots=True)
class Gc:
    """[gc]: garbage collection. Thresholds [bytes]; blob_cache bounds the blobs of unpacked layers, -1 keeps all."""

    startup_delay: Duration = 10.0
    schedule_delay: Duration = 1.0
    blob_cache: int = -1
    min_free: int = 512 * MIB


@dataclass(frozen=True, slots=True)
class Verify:
    """[verify]: which images may be used; see images/verification. policy: a TOML file of keys and rules.

    The directory is containerd's, so that verifiers which are installed there keep working. max_verifiers -1: all of them.
    """

    bin_dir: str = "/opt/containerd/image-verifier/bin"
    max_verifiers: int = 10
    per_verifier_timeout: Duration = 10.0
    policy: str = ""
    fail_closed: bool = False  # refuse an image that neither a verifier nor a rule has allowed


@dataclass(frozen=True, slots=True)
class Metrics:
    """[metrics]: Prometheus text over HTTP. address "host:port"; "": off."""

    address: str = ""


@dataclass(frozen=True, slots=True)
class Mirror:
    """[mirror]: the local store as a read-only registry. address "host:port"; "": off."""

    address: str = ""
    tls_cert_file: str = ""
    tls_key_file: str = ""
    client_ca_file: str = ""  # "": no client certificates are asked for
    private_images: str = "never"  # "never", or "certificate": to clients with a certificate of client_ca_file
    pull_through: tuple[str, ...] = ()  # registries to fetch from on behalf of clients
    keep: Duration = 7 * 24 * 3600.0  # how long what was fetched so stays after its last use


@dataclass(frozen=True, slots=True)
class Prepull:
    """[prepull]: files that name images to have here at all times; watched while the daemon runs."""

    directory: str = "/etc/imgsvc/prepull.d"


@dataclass(frozen=True, slots=True)
class Config:
    """The whole configuration."""

    version: int = VERSION
    root: str = places.ROOT
    state: str = places.STATE
    imports: tuple[str, ...] = ("/etc/imgsvc/config.d/*.toml",)
    grpc: Grpc = field(default_factory=Grpc)
    debug: Debug = field(default_factory=Debug)
    images: Images = field(default_factory=Images)
    registry: Registry = field(default_factory=Registry)
    decrypt: Decrypt = field(default_factory=Decrypt)
    stream_processors: dict[str, StreamProcessor] = field(default_factory=dict)
    runtime: Runtime = field(default_factory=Runtime)
    nri: Nri = field(default_factory=Nri)
    cni: Cni = field(default_factory=Cni)
    stream: Stream = field(default_factory=Stream)
    gc: Gc = field(default_factory=Gc)
    verify: Verify = field(default_factory=Verify)
    metrics: Metrics = field(default_factory=Metrics)
    mirror: Mirror = field(default_factory=Mirror)
    prepull: Prepull = field(default_factory=Prepull)

    @property
    def address(self) -> str:
        """Where the daemon listens, as a gRPC target."""
        return self.grpc.address or f"unix://{self.state}/{places.SOCKET_NAME}"
