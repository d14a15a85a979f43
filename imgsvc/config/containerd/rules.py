"""The table: what each key of containerd means here. Pure.

A pattern is a key path without the `plugins."io.containerd.…"` part; that of CRI sections is shortened to "cri", that of
version 4's servers to the table's older name. `*` matches one part, a final `**` for whatever follows. The first pattern
that fits decides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from imgsvc.base.tomlfile import Document, dotted

Path = tuple[str, ...]
_CRI_SECTIONS: Final = ("io.containerd.grpc.v1.cri", "io.containerd.cri.v1.images", "io.containerd.cri.v1.runtime")
_SERVER: Final = "io.containerd.server.v1."  # since version 4, what were the tables grpc, ttrpc, debug and metrics are plugins
RUNC: Final = ("io.containerd.runc.v1", "io.containerd.runc.v2", "io.containerd.runtime.v1.linux")


CheckTables = Callable[[Mapping[str, Any]], object]  # raises InvalidArgument


class Outcome(StrEnum):
    """What became of a key."""

    CARRIED = "carried"
    NOT_APPLICABLE = "not applicable"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Verdict:
    """Outcome of one key. values: what to set in ours; extends: lists are appended to. note: our key, or the reason."""

    outcome: Outcome
    note: str
    values: tuple[tuple[Path, Any], ...] = ()
    extends: bool = False


@dataclass(frozen=True, slots=True)
class Key:
    """One key as a rule sees it. keys: its path in the file. registry: refuses registry tables that cannot be honoured."""

    keys: Path
    value: Any
    document: Document
    registry: CheckTables

    def sibling(self, *steps: str, up: int = 1) -> Any:
        """A value near it: `up` parts are cut from the end of its path first."""
        return self.document.get(*self.keys[:-up], *steps)

    @property
    def table(self) -> str:
        """Name of the table it stands in, e.g. of a runtime."""
        return self.keys[-2]


Rule = Callable[[Key], Verdict]


def judge(keys: Path, value: Any, document: Document, registry: CheckTables) -> Verdict:
    """What becomes of one key. Raises: InvalidArgument, the reason to refuse it."""
    short = keys
    if len(keys) > 1 and keys[0] == "plugins":
        name = "cri" if keys[1] in _CRI_SECTIONS else keys[1].removeprefix(_SERVER).removeprefix("io.containerd.")
        short = (name, *keys[2:])
    if value == {}:
        return Verdict(Outcome.NOT_APPLICABLE, "an empty table sets nothing")
    for pattern, rule in RULES:
        if _fits(pattern, short):
            return rule(Key(keys, value, document, registry))
    return _refuse("a key imgsvc does not know", "check its spelling, or drop it")


def _fits(pattern: Sequence[str], keys: Sequence[str]) -> bool:
    if pattern[-1] == "**":
        pattern, keys = pattern[:-1], keys[: len(pattern) - 1]
    return len(pattern) == len(keys) and all(p in ("*", k) for p, k in zip(pattern, keys, strict=True))


def _carry(target: str | Path, value: Any, *, extends: bool = False) -> Verdict:
    path = tuple(target.split(".")) if isinstance(target, str) else target
    return Verdict(Outcome.CARRIED, dotted(path), ((path, value),), extends)


def _na(reason: str) -> Verdict:
    return Verdict(Outcome.NOT_APPLICABLE, reason)


def _refuse(reason: str, hint: str = "") -> Verdict:
    return Verdict(Outcome.REFUSED, f"{reason}; {hint}" if hint else reason)


def to(target: str, change: Callable[[Any], Any] = lambda value: value) -> Rule:
    """The same setting under our name; an empty string leaves our default, as containerd's does there."""

    def rule(key: Key) -> Verdict:
        if key.value == "":
            return _na(f"empty; the default of {target} stays")
        return _carry(target, change(key.value))

    return rule


def na(reason: str) -> Rule:
    """Nothing here depends on it, whatever its value."""
    return lambda key: _na(reason)


def only(values: Sequence[Any], reason: str, hint: str) -> Rule:
    """One of `values` needs no key here; any other asks for what imgsvc does not do."""
    return lambda key: _na(reason) if key.value in values else _refuse(f"{key.value!r} is not possible here: {reason}", hint)


def _snapshotter(target: str) -> Rule:
    def rule(key: Key) -> Verdict:
        if key.value in ("overlayfs", "native", ""):
            return to(target)(key)
        return _no_snapshotter(key.value)

    return rule


def _no_snapshotter(name: str) -> Verdict:
    return _refuse(f'no snapshotter "{name}"', "imgsvc has overlayfs and native")


def _runtime_snapshotter(key: Key) -> Verdict:
    return _runtime("snapshotter")(key) if key.value in ("overlayfs", "native", "") else _no_snapshotter(key.value)


def _pinned(key: Key) -> Verdict:
    return _carry("images.pinned_images", [key.value], extends=True) if key.value else _na("no image is named")


def _inline_registry(key: Key) -> Verdict:
    """A key of mirrors, configs, auths or headers. Raises: InvalidArgument for a value the registry client would not take."""
    path = key.keys[key.keys.index("registry") + 1 :]
    table: Any = key.value
    for step in reversed(path):
        table = {step: table}
    if path[0] != "auths" and path[-2] != "auth":  # what a credential needs of one another is for the whole to say
        key.registry(table)
    return _carry(("registry", *path), key.value)


def _transfer(target: str, name: str) -> Rule:
    """A key of the transfer plugin that repeats one of CRI's: CRI's decides when it is set."""

    def rule(key: Key) -> Verdict:
        for section in _CRI_SECTIONS:
            for path in ((name,), ("registry", name)):
                if key.document.get("plugins", section, *path) not in (None, ""):
                    return _na(f"the CRI section's {name} rules every pull")
        return to(target)(key)

    return rule


def _runtime(field: str) -> Rule:
    return lambda key: _carry(("runtime", "runtimes", key.table, field), key.value) if key.value not in ("", 0, []) else _na("the default")


def _runtime_type(key: Key) -> Verdict:
    name = ("runtime", "runtimes", key.table)
    if key.value not in RUNC:
        return _carry((*name, "type"), key.value)
    program = key.sibling("options", "BinaryName") or "runc"
    values = (((*name, "type"), "oci"), ((*name, "path"), program))
    return Verdict(Outcome.CARRIED, f'runtime.runtimes.{key.table}.type = "oci", path = "{program}"', values)


def _runtime_path(key: Key) -> Verdict:
    if not key.value:
        return _na("empty")
    if key.sibling("runtime_type") in RUNC:
        return _refuse("the path of runc's shim; imgsvc runs the OCI runtime without one", "set runtimes.NAME.path to the OCI runtime")
    return _runtime("path")(key)


def _sandboxer(key: Key) -> Verdict:
    if key.value in ("", "podsandbox"):
        return _na("the default")
    if key.value != "shim" or key.sibling("runtime_type") in RUNC:
        return _refuse(f'sandboxer "{key.value}"', "only a shim that makes its own pods, kata's say, can be a sandboxer")
    return _runtime("sandboxer")(key)


def _runtime_option(key: Key) -> Verdict:
    """Options of runc's shim one by one; those of other shims are copied whole."""
    name, runtime = key.keys[-1], key.keys[-3]
    target = ("runtime", "runtimes", runtime, "options", name)
    if key.sibling("runtime_type", up=2) not in RUNC:
        return _carry(target, key.value)
    if name == "BinaryName":
        return _na("carried over with runtime_type")
    if name == "SystemdCgroup":
        return _carry("runtime.cgroup_driver", "systemd" if key.value else "cgroupfs")
    if key.value in ("", 0, False):
        return _na("the default")
    if name in ("Root", "NoNewKeyring", "NoPivotRoot"):
        return _carry(target, key.value)
    return _refuse(f"the option {name} of runc's shim", "imgsvc runs the OCI runtime without a shim")


def _stream_tls(target: str) -> Rule:
    def rule(key: Key) -> Verdict:
        if not key.sibling("enable_tls_streaming", up=2):
            return _na("enable_tls_streaming is off")
        return to(target)(key)

    return rule


def _stream_tls_switch(key: Key) -> Verdict:
    if not key.value:
        return _na("off is the default")
    if key.sibling("x509_key_pair_streaming", "tls_cert_file"):
        return _na("on as soon as stream.tls_cert_file is set")
    return _refuse("streaming over TLS with a certificate made at start", "name one: stream.tls_cert_file, stream.tls_key_file")


def _nested_runtimes(pattern: str) -> list[tuple[Path, Rule]]:
    base = ("cri", "containerd", *pattern.split("."))
    fields = {
        "runtime_type": _runtime_type,
        "runtime_path": _runtime_path,
        "pod_annotations": _runtime("pod_annotations"),
        "container_annotations": _runtime("container_annotations"),
        "privileged_without_host_devices": _runtime("privileged_without_host_devices"),
        "privileged_without_host_devices_all_devices_allowed": _runtime("privileged_without_host_devices_all_devices_allowed"),
        "cgroup_writable": _runtime("cgroup_writable"),
        "base_runtime_spec": _runtime("base_runtime_spec"),
        "cni_conf_dir": _runtime("cni_conf_dir"),
        "cni_max_conf_num": _runtime("cni_max_conf_num"),
        "snapshotter": _runtime_snapshotter,
        "sandboxer": _sandboxer,
        "sandbox_mode": _sandboxer,
        "disable_pause_image_pull": na("there is no pause image to pull"),
        "io_type": only(("", "fifo"), "standard streams are pipes", "drop it"),
        "runtime_engine": only(("",), "gone since containerd 1.3", "set runtimes.NAME.path"),
        "runtime_root": only(("",), "gone since containerd 1.3", "set runtimes.NAME.options.Root"),
    }
    return [((*base, name), rule) for name, rule in fields.items()] + [((*base, "options", "*"), _runtime_option)]


def _one(value: str) -> list[str]:
    return [value]


def _port(key: Key) -> Verdict:
    if not str(key.value).isascii() or not str(key.value).isdigit():
        return _refuse("a port must be a number")
    return _carry("stream.port", int(key.value))


def _downloads(key: Key) -> Verdict:
    if key.value == 0:
        return _refuse("downloads without a limit", "name a number: images.max_concurrent_downloads")
    return _carry("images.max_concurrent_downloads", key.value)


_LEVELS: Final = {"trace": "debug", "warn": "warning", "fatal": "error", "panic": "error"}


def _host_platform(key: Key) -> Verdict:
    return _na("containers run on the node's own platform")


_SYSTEMD = "that is the service manager's; docs/deploy has a unit"
_OWN_PLACE = "imgsvc keeps its own store and socket; they cannot be shared with containerd"
_GC_COST = "imgsvc's collector does not hold a lock while it works"
_CRI_PASS: Final = [
    "max_container_log_line_size",
    "restrict_oom_score_adj",
    "unset_seccomp_profile",
    "disable_apparmor",
    "enable_selinux",
    "selinux_category_range",
    "disable_proc_mount",
    "tolerate_missing_hugetlb_controller",
    "disable_hugetlb_controller",
    "device_ownership_from_security_context",
    "ignore_image_defined_volumes",
    "enable_unprivileged_ports",
    "enable_unprivileged_icmp",
    "enable_cdi",
    "cdi_spec_dirs",
    "drain_exec_sync_io_timeout",
]

_NRI_PASS: Final = (
    "disable",
    "socket_path",
    "plugin_path",
    "plugin_config_path",
    "plugin_registration_timeout",
    "plugin_request_timeout",
    "disable_connections",
)
_AUTH: Final = ("username", "password", "auth", "identitytoken")

_TABLE: Final[dict[str, Rule]] = {
    # the daemon
    "version": na("that of containerd's file"),
    "root": na(_OWN_PLACE),
    "state": na(_OWN_PLACE),
    "temp": only(("",), "unfinished work lives below root", "drop it"),
    "plugin_dir": na("there are no plugins to load"),
    "disabled_plugins": na("there are no plugins to switch off"),
    "required_plugins": na("there are no plugins to require"),
    "oom_score": only((0,), _SYSTEMD, "set OOMScoreAdjust= there"),
    "imports": na("what they name is imported here and now"),
    "grpc.address": na(_OWN_PLACE),
    "grpc.tcp_address": only(("",), "CRI is served over a Unix socket only", "drop it"),
    "grpc.tcp_tls_ca": only(("",), "CRI is served over a Unix socket only", "drop it"),
    "grpc.tcp_tls_cert": only(("",), "CRI is served over a Unix socket only", "drop it"),
    "grpc.tcp_tls_key": only(("",), "CRI is served over a Unix socket only", "drop it"),
    "grpc.tcp_tls_common_name": only(("",), "CRI is served over a Unix socket only", "drop it"),
    "grpc.uid": to("grpc.uid"),
    "grpc.gid": to("grpc.gid"),
    "grpc.max_recv_message_size": to("grpc.max_recv_message_size"),
    "grpc.max_send_message_size": to("grpc.max_send_message_size"),
    "ttrpc.**": na("there is no ttrpc socket"),
    "debug.level": to("debug.level", lambda level: _LEVELS.get(level, level)),
    "debug.format": to("debug.format"),
    "debug.**": na("there is no debug socket"),
    "metrics.address": to("metrics.address"),
    "metrics.grpc_histogram": na("latency of calls is always measured"),
    "cgroup.path": only(("",), _SYSTEMD, "set Slice= there"),
    "timeouts.*": na("there are no such waits: no shims, no bolt database"),
    "stream_processors.*.*": lambda key: _carry(("stream_processors", *key.keys[1:]), key.value),
    "proxy_plugins.**": lambda key: _refuse("snapshotters and stores in other processes are not used", "drop it"),
    # images
    "cri.snapshotter": _snapshotter("images.snapshotter"),
    "cri.containerd.snapshotter": _snapshotter("images.snapshotter"),
    "cri.discard_unpacked_layers": to("images.discard_unpacked_layers"),
    "cri.containerd.discard_unpacked_layers": to("images.discard_unpacked_layers"),
    "cri.disable_snapshot_annotations": na("only remote snapshotters read them"),
    "cri.containerd.disable_snapshot_annotations": na("only remote snapshotters read them"),
    "cri.max_concurrent_downloads": _downloads,
    "cri.concurrent_layer_fetch_buffer": na("large layers are fetched in parallel ranges by themselves"),
    "cri.max_concurrent_unpacks": to("images.max_concurrent_unpacks"),
    "cri.image_pull_progress_timeout": to("images.image_pull_progress_timeout"),
    "cri.image_pull_with_sync_fs": na('images.sync = "full" syncs every image'),
    "cri.use_local_image_pull": na("there is one way to pull"),
    "cri.stats_collect_period": na("sizes are kept up to date, not collected"),
    "cri.stats_retention_period": na("statistics are read when they are asked for, not kept"),
    "cri.enable_criu": na("containers can be checkpointed wherever criu is installed"),
    "cri.image_decryption.key_model": lambda key: _carry("decrypt.key_model", key.value),
    "cri.pinned_images.*": _pinned,
    "cri.sandbox_image": _pinned,
    "cri.runtime_platforms.**": lambda key: _refuse("a platform per runtime", "name the platform in the pull"),
    "cri.registry.config_path": to("registry.config_path"),
    "cri.registry.mirrors.*.endpoint": _inline_registry,
    **{f"cri.registry.configs.*.tls.{name}": _inline_registry for name in ("ca_file", "cert_file", "key_file", "insecure_skip_verify")},
    **{f"cri.registry.configs.*.auth.{name}": _inline_registry for name in _AUTH},
    **{f"cri.registry.auths.*.{name}": _inline_registry for name in _AUTH},
    "cri.registry.headers.*": _inline_registry,
    # runtime
    **{f"cri.{name}": to(f"runtime.{name}") for name in _CRI_PASS},
    "cri.netns_mounts_under_state_dir": na("network namespaces are always kept below the state directory"),
    "cri.ignore_deprecation_warnings": na("there are no containerd deprecations"),
    "cri.systemd_cgroup": lambda key: _carry("runtime.cgroup_driver", "systemd") if key.value else _na("the default"),
    "cri.disable_cgroup": only((False,), "containers always have control groups", "drop it"),
    "cri.disable_tcp_service": only((True,), "CRI is served over a Unix socket only", "drop it"),
    "cri.containerd.default_runtime_name": to("runtime.default_runtime_name"),
    "cri.containerd.ignore_blockio_not_enabled_errors": na("block I/O classes are not used"),
    "cri.containerd.ignore_rdt_not_enabled_errors": na("RDT classes are not used"),
    "cri.containerd.no_pivot": only((False,), "gone since containerd 1.3", "set runtimes.NAME.options.NoPivotRoot"),
    "cri.containerd.default_runtime.runtime_type": only(("",), "gone since containerd 1.3", "name it under runtimes"),
    "cri.containerd.untrusted_workload_runtime.runtime_type": only(("",), "gone since containerd 1.3", "name it under runtimes"),
    "cri.containerd.default_runtime.**": na("the runtime it belongs to has no type"),
    "cri.containerd.untrusted_workload_runtime.**": na("the runtime it belongs to has no type"),
    # networks and streaming
    "cri.cni.bin_dir": to("cni.bin_dirs", _one),
    "cri.cni.bin_dirs": to("cni.bin_dirs"),
    "cri.cni.conf_dir": to("cni.conf_dir"),
    "cri.cni.max_conf_num": to("cni.max_conf_num"),
    "cri.cni.setup_serially": to("cni.setup_serially"),
    "cri.cni.conf_template": to("cni.conf_template"),
    "cri.cni.ip_pref": to("cni.ip_pref"),
    "cri.cni.use_internal_loopback": to("cni.use_internal_loopback"),
    "cri.stream_server_address": to("stream.address"),
    "cri.stream_server_port": _port,
    "cri.stream_idle_timeout": to("stream.idle_timeout"),
    "cri.enable_tls_streaming": _stream_tls_switch,
    "cri.x509_key_pair_streaming.tls_cert_file": _stream_tls("stream.tls_cert_file"),
    "cri.x509_key_pair_streaming.tls_key_file": _stream_tls("stream.tls_key_file"),
}

# Other plugins: section below "io.containerd." (with dots), then its keys.
_PLUGINS: Final[dict[str, dict[str, Rule]]] = {
    "gc.v1.scheduler": {
        "pause_threshold": na(_GC_COST),
        "deletion_threshold": na(_GC_COST),
        "mutation_threshold": na(_GC_COST),
        "schedule_delay": to("gc.schedule_delay"),
        "startup_delay": to("gc.startup_delay"),
    },
    "image-verifier.v1.bindir": {
        "bin_dir": to("verify.bin_dir"),
        "max_verifiers": to("verify.max_verifiers"),
        "per_verifier_timeout": to("verify.per_verifier_timeout"),
        "verify_on_run": na("images are verified before a container starts in any case"),
    },
    "transfer.v1.local": {
        "max_concurrent_downloads": _transfer("images.max_concurrent_downloads", "max_concurrent_downloads"),
        "max_concurrent_unpacks": _transfer("images.max_concurrent_unpacks", "max_concurrent_unpacks"),
        "config_path": _transfer("registry.config_path", "config_path"),
        "max_concurrent_uploaded_layers": na("uploads have a limit of their own"),
        "concurrent_layer_fetch_buffer": na("large layers are fetched in parallel ranges by themselves"),
        "**": na("there is one way to pull; it needs no unpack configuration"),
    },
    "metadata.v1.bolt": {
        "content_sharing_policy": only(("shared", ""), "there are no namespaces", "drop it"),
        "no_sync": only((False,), "records are always put on disk", "drop it"),
    },
    "metrics.v1.grpc-prometheus": {"grpc_histogram": na("the metrics are imgsvc's own; its histograms are always there")},
    "runtime.v2.task": {"platforms": _host_platform, "sched_core": only((False,), "core scheduling is not used", "drop it")},
    "runtime.v1.linux": {"**": na("that runtime is gone since containerd 2.0")},
    "service.v1.diff-service": {
        "default": only((["walking"],), "layers are applied by imgsvc itself", "drop it"),
        "sync_fs": na('images.sync = "full" syncs every image'),
    },
    "service.v1.tasks-service": {
        "blockio_config_file": only(("",), "block I/O classes are not used", "drop it"),
        "rdt_config_file": only(("",), "RDT classes are not used", "drop it"),
    },
    "grpc-tcp": {
        "address": only(("",), "CRI is served over a Unix socket only", "drop it"),
        "**": na("it belongs to a TCP address, which there is none of"),
    },
    "shim.v1.manager": {
        "socket_dir": na("sockets of shims are kept below the state directory"),
        "env": only(([],), "shims get a clean environment", "put it into the shim's own configuration"),
    },
    "snapshotter.v1.overlayfs": {
        "root_path": only(("",), "layers live below root", "set root"),
        "upperdir_label": to("images.overlayfs.upperdir_label"),
        "sync_remove": to("images.overlayfs.sync_remove"),
        "slow_chown": na("images are copied wherever idmapped mounts do not work, unless images.overlayfs.slow_chown forbids it"),
        "mount_options": to("images.overlayfs.mount_options"),
    },
    "snapshotter.v1.native": {"root_path": only(("",), "layers live below root", "set root")},
    **{
        f"snapshotter.v1.{name}": {"**": na("not one of imgsvc's snapshotters: overlayfs and native")}
        for name in ("blockfile", "btrfs", "devmapper", "erofs", "zfs", "aufs")
    },
    "internal.v1.opt": {"**": na("nothing is installed by imgsvc")},
    "internal.v1.restart": {"**": na("containers are restarted by the kubelet")},
    "internal.v1.tracing": {"**": na("there is no tracing")},
    "tracing.processor.v1.otlp": {"**": na("there is no tracing")},
    "monitor.container.v1.restart": {"**": na("containers are restarted by the kubelet")},
    "monitor.task.v1.cgroups": {"**": na("container statistics come from CRI")},
    "monitor.v1.cgroups": {"**": na("container statistics come from CRI")},
    "nri.v1.nri": {
        **{name: to(f"nri.{name}") for name in _NRI_PASS},
        "default_validator.enable": only((False,), "there is no validator built in", "install a validating plugin"),
        "default_validator.**": na("the validator it belongs to is off"),
    },
    "differ.v1.erofs": {"**": na("layers are applied by imgsvc itself")},
    "grpc.v1.images": {"**": na("that is containerd's own interface")},
}


def _rules() -> list[tuple[Path, Rule]]:
    own = [(tuple(pattern.split(".")), rule) for pattern, rule in _TABLE.items()]
    plugins = [((section, *name.split(".")), rule) for section, names in _PLUGINS.items() for name, rule in names.items()]
    return [*_nested_runtimes("runtimes.*"), *own, *plugins]


RULES: Final = _rules()
