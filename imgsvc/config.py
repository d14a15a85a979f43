"""The daemon's configuration: typed sections, strict TOML, and the origin of every value.

A section is a frozen dataclass; its fields are the keys, their annotations the types, their defaults the embedded
defaults. One generic reader (`_section`) does all checking, so adding a key is adding a field. Key names are containerd's
where the meaning is the same. Order of weight: defaults, the file, its imports (drop-ins, in name order), flags.

Source: contract.md ("Configuration"); containerd's config v3 for names.
"""

from __future__ import annotations

import dataclasses
import glob
import re
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar

from imgsvc import tomlfile
from imgsvc.errors import InvalidArgument, printable
from imgsvc.oci import GIB, MIB

VERSION: Final = 1
DEFAULT_PATH: Final = Path("/etc/imgsvc/config.toml")
DEFAULT_ADDRESS: Final = "unix:///run/imgsvc/imgsvc.sock"

Duration = Annotated[float, "duration"]  # [seconds]; written as Go does, "1m30s", or a number of seconds
Raw = dict[str, Any]  # a table whose keys belong to somebody else (runtime options, legacy registry tables)


@dataclass(frozen=True, slots=True)
class Grpc:
    """[grpc]: the CRI socket. Message sizes [bytes]."""

    address: str = ""  # "": imgsvc.sock in the state directory
    uid: int = 0
    gid: int = 0
    max_recv_message_size: int = 16 * MIB
    max_send_message_size: int = 16 * MIB


@dataclass(frozen=True, slots=True)
class Limits:
    """[images.limits]: bounds on one layer; 0 switches a bound off. unpacked_bytes [bytes]; ratio unpacked/compressed."""

    unpacked_bytes: int = 128 * GIB
    entries: int = 10_000_000
    ratio: int = 1000


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

    provider_config, provider_bin_dir: the kubelet's --image-credential-provider-config and --image-credential-provider-bin-dir.
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
    base_runtime_spec: str = ""
    snapshotter: str = ""
    cni_conf_dir: str = ""
    cni_max_conf_num: int = 0


@dataclass(frozen=True, slots=True)
class Runtime:
    """[runtime]: sandboxes and containers."""

    enabled: bool = True
    default_runtime_name: str = "default"
    cgroup_driver: str = "auto"  # "systemd", "cgroupfs"; auto: systemd where it is process 1 and cgroup v2 is mounted
    conmon: str = "conmon"  # name or path of the monitor
    max_container_log_line_size: int = 16384  # [bytes] of one line before it is split; -1: never
    restrict_oom_score_adj: bool = False
    unset_seccomp_profile: str = ""
    disable_apparmor: bool = False
    enable_selinux: bool = False
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
class Cni:
    """[cni]: pod networks."""

    bin_dirs: tuple[str, ...] = ("/opt/cni/bin", "/usr/lib/cni")
    conf_dir: str = "/etc/cni/net.d"
    max_conf_num: int = 1
    conf_template: str = ""
    ip_pref: str = ""
    setup_serially: bool = False
    use_internal_loopback: bool = True
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
    """[verify]: who may decide which images are used; see verification.py. policy: a TOML file of keys and rules.

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


@dataclass(frozen=True, slots=True)
class Prepull:
    """[prepull]: files that name images to have here at all times; watched while the daemon runs."""

    directory: str = "/etc/imgsvc/prepull.d"


@dataclass(frozen=True, slots=True)
class Config:
    """The whole configuration."""

    version: int = VERSION
    root: str = "/var/lib/imgsvc"
    state: str = "/run/imgsvc"
    imports: tuple[str, ...] = ("/etc/imgsvc/config.d/*.toml",)
    grpc: Grpc = field(default_factory=Grpc)
    images: Images = field(default_factory=Images)
    registry: Registry = field(default_factory=Registry)
    decrypt: Decrypt = field(default_factory=Decrypt)
    stream_processors: dict[str, StreamProcessor] = field(default_factory=dict)
    runtime: Runtime = field(default_factory=Runtime)
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
        return self.grpc.address or f"unix://{self.state}/imgsvc.sock"


@dataclass(frozen=True, slots=True)
class Loaded:
    """A configuration with the origin of every value that is not a default: "a.b.c" → "file:line:column" or "flag"."""

    config: Config
    origins: Mapping[str, str]

    def origin(self, key: str) -> str:
        """Where the value of a dotted key came from."""
        return self.origins.get(key, "default")


def load(path: Path | None, flags: Mapping[str, str] | None = None) -> Loaded:
    """Read the configuration.

    Args:
        path: the file; None for DEFAULT_PATH, which alone may be absent.
        flags: dotted keys set on the command line; they beat the files.
    Raises: InvalidArgument with file:line:column and the way out; NotFound when a named file does not exist.
    """
    values: Raw = {}
    origins: dict[str, str] = {}
    source = path or DEFAULT_PATH
    if path is not None or source.exists():
        document = tomlfile.load(source)
        _merge(values, document.data, document, (), origins)
    imports = values.get("imports", Config().imports)
    if not isinstance(imports, list | tuple) or not all(isinstance(i, str) for i in imports):
        raise InvalidArgument("imports must be a list of paths", where=origins.get("imports", str(source)))
    for name in _imported(imports, source.parent):
        document = tomlfile.load(name)
        if "imports" in document.data:
            raise InvalidArgument("a drop-in cannot import", where=document.where("imports"), hint="list it in the main file")
        _merge(values, document.data, document, (), origins)
    for key, text in (flags or {}).items():
        _set(values, key.split("."), text)
        origins[key] = "flag"
    config = _section(Config, values, (), origins)
    _check(config, origins)
    return Loaded(config, origins)


def parse(text: str, name: str) -> Loaded:
    """A configuration from text alone, without imports. `name` stands for the file. Raises: InvalidArgument."""
    document = tomlfile.loads(text, name)
    values: Raw = {}
    origins: dict[str, str] = {}
    _merge(values, document.data, document, (), origins)
    config = _section(Config, values, (), origins)
    _check(config, origins)
    return Loaded(config, origins)


def flatten(config: Config) -> Iterator[tuple[str, Any]]:
    """Every key with its value, dotted, in file order; tables whose keys are free stay whole."""
    yield from _flatten(config, ())


def to_toml(config: Config, origins: Mapping[str, str] | None = None) -> str:
    """The configuration as TOML that `load` reads back; with `origins`, each value says where it came from."""
    lines: list[str] = []
    _emit(config, (), lines, origins)
    return "\n".join(lines) + "\n"


def table_to_toml(values: Raw, at: tuple[str, ...] = ()) -> str:
    """Nested tables as TOML, plain keys before tables, nothing redacted."""
    lines = [f"{_toml_key(key)} = {_toml_value(value)}\n" for key, value in values.items() if not isinstance(value, dict)]
    header = f"\n[{'.'.join(map(_toml_key, at))}]\n" if at and (lines or not values) else ""
    tables = [table_to_toml(value, (*at, key)) for key, value in values.items() if isinstance(value, dict)]
    return header + "".join(lines) + "".join(tables)


def parse_duration(value: object, where: str) -> float:
    """Go's "1h2m3.5s", or a plain number of seconds, as seconds. Raises: InvalidArgument."""
    if isinstance(value, int | float) and not isinstance(value, bool) and value >= 0:
        return float(value)
    try:
        return tomlfile.parse_duration(value if isinstance(value, str) else repr(value))
    except InvalidArgument as error:
        raise InvalidArgument(error.what, where=where, hint=error.hint) from error


def _imported(patterns: typing.Iterable[str], base: Path) -> list[Path]:
    found: list[Path] = []
    for pattern in patterns:
        found += sorted(Path(name) for name in glob.glob(str(base / pattern)))
    return found


def _merge(into: Raw, new: Mapping[str, Any], document: tomlfile.Document, at: tuple[str, ...], origins: dict[str, str]) -> None:
    for key, value in new.items():
        here = (*at, key)
        if isinstance(value, dict):
            target = into.setdefault(key, {})
            if not isinstance(target, dict):
                raise InvalidArgument(f"{'.'.join(here)} is a table here and a value elsewhere", where=document.where(*here))
            origins.setdefault(".".join(here), document.where(*here))
            _merge(target, value, document, here, origins)
        else:
            into[key] = value
            origins[".".join(here)] = document.where(*here)


def _set(values: Raw, keys: list[str], value: str) -> None:
    for key in keys[:-1]:
        values = values.setdefault(key, {})
    values[keys[-1]] = value


S = TypeVar("S")


def _section(kind: type[S], values: Mapping[str, Any], at: tuple[str, ...], origins: Mapping[str, str]) -> S:
    hints = typing.get_type_hints(kind, include_extras=True)
    known = {f.name: hints[f.name] for f in dataclasses.fields(kind)}  # type: ignore[arg-type]  # every section is a dataclass
    out: dict[str, Any] = {}
    for key, value in values.items():
        here = (*at, key)
        where = origins.get(".".join(here), "")
        if key not in known:
            raise InvalidArgument(f'unknown key "{printable(".".join(here), 120)}"', where=where, hint=tomlfile.suggestion(key, known))
        out[key] = _value(known[key], value, here, where, origins)
        if typing.get_origin(known[key]) is dict:
            # A named table adds to the built-in ones; it does not remove them.
            out[key] = {**getattr(kind(), key), **out[key]}
    return kind(**out)


def _value(hint: Any, value: object, here: tuple[str, ...], where: str, origins: Mapping[str, str]) -> Any:
    name = ".".join(here)
    if hint == Duration:
        return parse_duration(value, where)
    origin = typing.get_origin(hint)
    if dataclasses.is_dataclass(hint):
        return _section(typing.cast(type, hint), _typed(dict, value, name, where), here, origins)
    if origin is dict and dataclasses.is_dataclass(typing.get_args(hint)[1]):
        section = typing.get_args(hint)[1]
        table = _typed(dict, value, name, where)
        return {
            key: _value(section, entry, (*here, key), origins.get(".".join((*here, key)), where), origins) for key, entry in table.items()
        }
    if origin is dict and typing.get_args(hint)[1] is str:
        table = _typed(dict, value, name, where)
        return {key: _typed(str, entry, f"{name}.{key}", where) for key, entry in table.items()}
    if origin is dict:
        return _typed(dict, value, name, where)
    if origin is tuple:
        return tuple(_typed(str, item, f"{name} (an entry)", where) for item in _typed(list, value, name, where))
    return _typed(hint, value, name, where)


_KIND_NAMES: Final = {str: "a string", int: "an integer", bool: "true or false", dict: "a table", list: "a list"}


def _typed(kind: type[S], value: object, name: str, where: str) -> S:
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise InvalidArgument(f"{name} must be {_KIND_NAMES.get(kind, kind.__name__)}, not {printable(repr(value), 60)}", where=where)
    return value


def _check(config: Config, origins: Mapping[str, str]) -> None:
    """What types cannot say."""

    def need(good: bool, key: str, problem: str) -> None:
        if not good:
            raise InvalidArgument(f"{key}: {problem}", where=origins.get(key, "default"))

    need(config.version == VERSION, "version", f"this imgsvc reads version {VERSION}")
    need(config.root.startswith("/"), "root", "must be an absolute path")
    need(config.state.startswith("/"), "state", "must be an absolute path")
    need(config.address.startswith("unix:///"), "grpc.address", "must be unix:///…; CRI is never served over TCP")
    need(config.images.sync in ("full", "none"), "images.sync", 'must be "full" or "none"')
    need(config.images.snapshotter in ("auto", "overlayfs", "native"), "images.snapshotter", "must be auto, overlayfs or native")
    for key in ("max_concurrent_downloads", "max_concurrent_downloads_per_image", "max_concurrent_unpacks"):
        need(getattr(config.images, key) > 0, f"images.{key}", "must be at least 1")
    need(config.decrypt.key_model in ("node", ""), "decrypt.key_model", 'must be "node" or ""')
    need(config.runtime.cgroup_driver in ("auto", "systemd", "cgroupfs"), "runtime.cgroup_driver", "must be auto, systemd or cgroupfs")
    default = config.runtime.default_runtime_name
    need(default in config.runtime.runtimes, "runtime.default_runtime_name", f'no table [runtime.runtimes."{default}"]')
    need(0 <= config.stream.port < 65536, "stream.port", "must be 0 to 65535")
    need(bool(config.stream.tls_cert_file) == bool(config.stream.tls_key_file), "stream.tls_cert_file", "needs tls_key_file too")
    need(config.cni.max_conf_num >= 0, "cni.max_conf_num", "must not be negative")
    mirror = config.mirror
    need(bool(mirror.tls_cert_file) == bool(mirror.tls_key_file), "mirror.tls_cert_file", "needs tls_key_file too")
    need(not mirror.client_ca_file or bool(mirror.tls_cert_file), "mirror.client_ca_file", "needs tls_cert_file")
    need(mirror.private_images in ("never", "certificate"), "mirror.private_images", 'must be "never" or "certificate"')
    need(
        mirror.private_images == "never" or bool(mirror.client_ca_file),
        "mirror.private_images",
        "certificates are only checked with client_ca_file",
    )


def _flatten(section: object, at: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    for f in dataclasses.fields(section):  # type: ignore[arg-type]  # sections are dataclasses
        value = getattr(section, f.name)
        here = (*at, f.name)
        if dataclasses.is_dataclass(value):
            yield from _flatten(value, here)
        elif isinstance(value, dict) and value and all(dataclasses.is_dataclass(v) for v in value.values()):
            for key, entry in value.items():
                yield from _flatten(entry, (*here, key))
        else:
            yield ".".join(here), value


def _emit(section: object, at: tuple[str, ...], lines: list[str], origins: Mapping[str, str] | None) -> None:
    tables: list[tuple[tuple[str, ...], object]] = []
    if at:
        lines += ["", "[" + ".".join(_toml_key(k) for k in at) + "]"]
    for f in dataclasses.fields(section):  # type: ignore[arg-type]  # sections are dataclasses
        value = getattr(section, f.name)
        here = (*at, f.name)
        if dataclasses.is_dataclass(value):
            tables.append((here, value))
        elif isinstance(value, dict):
            tables += [((*here, key), entry) for key, entry in value.items() if dataclasses.is_dataclass(entry)]
            if value and not any(dataclasses.is_dataclass(v) for v in value.values()):
                tables.append((here, types.MappingProxyType(value)))
        else:
            note = f"  # {origins.get('.'.join(here), 'default')}" if origins is not None else ""
            lines.append(f"{f.name} = {_toml_value(value)}{note}")
    for here, table in tables:
        if isinstance(table, types.MappingProxyType):
            lines += ["", "[" + ".".join(_toml_key(k) for k in here) + "]"]
            lines += [f"{_toml_key(k)} = {_toml_value(_redacted(k, v))}" for k, v in table.items()]
        else:
            _emit(table, here, lines, origins)


_SECRET_KEYS: Final = frozenset({"password", "auth", "identitytoken", "identity_token", "registrytoken", "authorization"})


def _redacted(key: str, value: object) -> object:
    """Foreign tables may carry secrets (legacy registry.configs.*.auth); a dump never does."""
    if isinstance(value, Mapping):
        return {k: _redacted(k, v) for k, v in value.items()}
    return "REDACTED" if key.lower() in _SECRET_KEYS else value


def _toml_key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _toml_string(key)


def _toml_string(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in escaped) + '"'


def _toml_value(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return _toml_string(f"{value:g}s")
    if isinstance(value, int):
        return str(value)
    if isinstance(value, str):
        return _toml_string(value)
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml_value(v) for v in value) + "]"
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{_toml_key(k)} = {_toml_value(v)}" for k, v in value.items()) + " }"
    raise TypeError(f"no TOML for {type(value).__name__}")
