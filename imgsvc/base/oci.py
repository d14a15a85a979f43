"""Content-addressed types of an image: digest, descriptor, platform, manifest, index, config. Pure; hostile input welcome.

Parsing is strict where leniency has been an advisory (ambiguous documents, duplicate keys, digests used as paths). For the
rest a document is read as Go's encoding/json reads it, because that is what engines and builders use: null is the empty
value, also inside lists and maps; bytes and escapes that are no Unicode character become U+FFFD; members are found whatever
their case. Unknown members are kept out of the way.

Source: OCI image-spec 1.1 descriptor.md, manifest.md, image-index.md, config.md; Docker image manifest v2 schema 2.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import math
import platform as host_platform
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Self, TypeVar

from imgsvc.base.errors import InvalidArgument, NotFound, ResourceExhausted, printable

KIB: Final = 1024
MIB: Final = 1024**2
GIB: Final = 1024**3

MAX_DOCUMENT: Final = 4 * MIB  # [bytes] of one manifest, index or config; the distribution spec asks for at least 4 MiB
_SHOWN_PLATFORMS: Final = 32  # in an error
MAX_DESCRIPTORS: Final = 4096  # per document; the largest real indexes and images stay below 200
MAX_SETTINGS: Final = {"Env": 4096, "Volumes": 256}  # of an image; a runtime takes seconds for more, and no real image comes near
MAX_VALUES: Final = 256 * KIB  # commas and brackets per JSON document; 4 MiB of "[]," would cost 130 MB of objects
MAX_INDEX_DEPTH: Final = 4  # index inside index; the specification allows nesting, real images use 1
MAX_SIZE: Final = 2**63 - 1
_MAX_DIGITS: Final = 40  # of a number in JSON that is taken as one; Go's largest has 20

OCI_INDEX: Final = "application/vnd.oci.image.index.v1+json"
OCI_MANIFEST: Final = "application/vnd.oci.image.manifest.v1+json"
OCI_CONFIG: Final = "application/vnd.oci.image.config.v1+json"
UNTYPED: Final = "application/octet-stream"
OCI_EMPTY: Final = "application/vnd.oci.empty.v1+json"
DOCKER_LIST: Final = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_MANIFEST: Final = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_CONFIG: Final = "application/vnd.docker.container.image.v1+json"
DOCKER_SCHEMA1: Final = (
    "application/vnd.docker.distribution.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v1+prettyjws",
)

INDEX_TYPES: Final = frozenset({OCI_INDEX, DOCKER_LIST})
MANIFEST_TYPES: Final = frozenset({OCI_MANIFEST, DOCKER_MANIFEST})
ACCEPT: Final = (OCI_INDEX, OCI_MANIFEST, DOCKER_LIST, DOCKER_MANIFEST)

_DIGEST_HEX_LENGTH: Final = {"sha256": 64, "sha512": 128}
_DIGEST = re.compile(r"(sha256|sha512):([0-9a-f]+)", re.ASCII)


class Digest(str):
    """`algorithm:hex`, checked when built; safe to use in a path or a URL. sha256 and sha512 only.

    Raises: InvalidArgument on anything else. Source: image-spec descriptor.md#digests.
    """

    __slots__ = ()

    def __new__(cls, text: str) -> Self:
        """Check and build."""
        match = _DIGEST.fullmatch(text)
        if match is None or len(match[2]) != _DIGEST_HEX_LENGTH[match[1]]:
            raise InvalidArgument(
                f'invalid digest "{printable(text, 160)}"',
                hint="expected sha256: and 64 or sha512: and 128 lower-case hexadecimal digits",
            )
        return super().__new__(cls, text)

    @property
    def algorithm(self) -> str:
        """Hash name as hashlib knows it."""
        return self[:6]

    @property
    def hex(self) -> str:
        """The part after the colon."""
        return self[7:]

    @classmethod
    def of(cls, data: bytes, algorithm: str = "sha256") -> Digest:
        """The digest of some bytes."""
        return cls(f"{algorithm}:{hashlib.new(algorithm, data).hexdigest()}")

    @classmethod
    def from_hash(cls, algorithm: str, hexdigest: str) -> Digest:
        """The digest of a finished hash object."""
        return cls(f"{algorithm}:{hexdigest}")


_ARCHITECTURES: Final = {
    "x86_64": ("amd64", ""),
    "aarch64": ("arm64", "v8"),
    "armv7l": ("arm", "v7"),
    "armv6l": ("arm", "v6"),
    "i686": ("386", ""),
    "ppc64le": ("ppc64le", ""),
    "s390x": ("s390x", ""),
    "riscv64": ("riscv64", ""),
}
_ALIASES: Final = {"x86_64": "amd64", "x86-64": "amd64", "aarch64": "arm64", "i386": "386", "armhf": "arm", "armel": "arm"}
_PLATFORM_PART = re.compile(r"[A-Za-z0-9_.()+-]+", re.ASCII)


@dataclass(frozen=True, slots=True)
class Platform:
    """What a manifest runs on. Normalised: `aarch64` is `arm64`, and arm64 without a variant is v8."""

    os: str
    architecture: str
    variant: str = ""
    os_version: str = ""
    os_features: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Platform:
        """`os/arch[/variant]` or `arch`. Raises: InvalidArgument."""
        parts = text.split("/")
        if not 1 <= len(parts) <= 3 or not all(_PLATFORM_PART.fullmatch(p) for p in parts):
            raise InvalidArgument(f'invalid platform "{printable(text, 80)}"', hint="use os/architecture[/variant], e.g. linux/arm64/v8")
        if len(parts) == 1:
            parts = ["linux", parts[0]]
        return cls(parts[0].lower(), parts[1].lower(), parts[2].lower() if len(parts) == 3 else "").normalised()

    @classmethod
    def host(cls) -> Platform:
        """The platform of this node."""
        machine = host_platform.machine()
        architecture, variant = _ARCHITECTURES.get(machine, (machine, ""))
        return cls("linux", architecture, variant).normalised()

    def normalised(self) -> Platform:
        """One spelling per platform."""
        architecture = _ALIASES.get(self.architecture, self.architecture)
        variant = self.variant
        if architecture == "arm64" and variant in ("", "8"):
            variant = "v8"
        elif architecture == "arm" and variant in ("", "7"):
            variant = "v7"
        elif architecture == "arm" and variant in ("5", "6", "8"):
            variant = "v" + variant
        elif architecture == "amd64" and variant == "v1":
            variant = ""
        return Platform(self.os, architecture, variant, self.os_version, self.os_features)

    def __str__(self) -> str:
        shown = f"{self.os}/{self.architecture}"
        # v8 is what every arm64 is; the short form is what people write.
        return shown if not self.variant or (self.architecture, self.variant) == ("arm64", "v8") else f"{shown}/{self.variant}"


_UNKNOWN_RANK: Final = 1000  # of an entry without a platform: worse than any that says what it is


def platform_rank(wanted: Platform, offered: Platform) -> int | None:
    """0 is the best match, larger is worse, None does not run. Arm and amd64 variants run what is older."""
    wanted, offered = wanted.normalised(), offered.normalised()
    if (wanted.os, wanted.architecture) != (offered.os, offered.architecture):
        return None
    if offered.os_features and not set(offered.os_features) <= set(wanted.os_features):
        return None
    if wanted.variant == offered.variant:
        return 0
    if wanted.architecture in ("arm", "amd64", "arm64"):
        default = {"arm": 7, "amd64": 1, "arm64": 8}[wanted.architecture]
        have, need = (_variant_level(p.variant, default) for p in (wanted, offered))
        if have is not None and need is not None and need <= have:
            return have - need + 1
    return None


def _variant_level(variant: str, default: int) -> int | None:
    if not variant:
        return default
    return int(variant[1:]) if re.fullmatch(r"v[0-9]{1,2}", variant) else None


@dataclass(frozen=True, slots=True)
class Descriptor:
    """What to fetch and how to know it arrived: type, digest, size [bytes]. Source: image-spec descriptor.md."""

    media_type: str
    digest: Digest
    size: int
    annotations: Mapping[str, str] = field(default_factory=dict)
    platform: Platform | None = None
    artifact_type: str = ""
    urls: tuple[str, ...] = ()
    data: bytes | None = None

    def to_json(self) -> dict[str, Any]:
        """The JSON object of the specification; absent members are left out."""
        out: dict[str, Any] = {"mediaType": self.media_type, "digest": str(self.digest), "size": self.size}
        if self.annotations:
            out["annotations"] = dict(self.annotations)
        if self.platform:
            out["platform"] = {"os": self.platform.os, "architecture": self.platform.architecture}
            if self.platform.variant:
                out["platform"]["variant"] = self.platform.variant
            if self.platform.os_version:
                out["platform"]["os.version"] = self.platform.os_version
            if self.platform.os_features:
                out["platform"]["os.features"] = list(self.platform.os_features)
        if self.artifact_type:
            out["artifactType"] = self.artifact_type
        if self.urls:
            out["urls"] = list(self.urls)
        return out

    @classmethod
    def from_json(cls, value: object, where: str = "descriptor") -> Descriptor:
        """Parse one descriptor; `where` names it in errors. Raises: InvalidArgument."""
        return _descriptor(value, where)


@dataclass(frozen=True, slots=True)
class Manifest:
    """One runnable image or artifact. `layers` is base layer first."""

    media_type: str
    config: Descriptor
    layers: tuple[Descriptor, ...]
    annotations: Mapping[str, str] = field(default_factory=dict)
    artifact_type: str = ""
    subject: Descriptor | None = None

    @property
    def may_be_image(self) -> bool:
        """Whether the config's type allows that it is an image config; read_config tells."""
        return self.config.media_type in (OCI_CONFIG, DOCKER_CONFIG, UNTYPED)

    def read_config(self, data: bytes, where: str) -> ImageConfig | None:
        """The image config in `data`, None when this manifest is an artifact and no image that could run.

        Docker before 1.10 called its configs octet-streams; those are known by their diff IDs. Raises: as parse_config.
        """
        if self.config.media_type in (OCI_CONFIG, DOCKER_CONFIG):
            return parse_config(data, where)
        if self.config.media_type != UNTYPED:
            return None
        try:
            config = parse_config(data, where)
        except (InvalidArgument, ResourceExhausted):
            return None
        return config if config.diff_ids else None


@dataclass(frozen=True, slots=True)
class Index:
    """A list of manifests for several platforms."""

    media_type: str
    manifests: tuple[Descriptor, ...]
    annotations: Mapping[str, str] = field(default_factory=dict)
    subject: Descriptor | None = None

    def candidates(self, wanted: Platform) -> list[Descriptor]:
        """Entries that may run on `wanted`, best first.

        Those without a platform come last, in document order: only their configs tell what they run on. Entries that
        cannot be images, by their own type, are left out.
        """
        ranked = []
        for position, entry in enumerate(self.manifests):
            if entry.media_type and entry.media_type not in INDEX_TYPES | MANIFEST_TYPES:
                continue
            if entry.platform is None:
                ranked.append((_UNKNOWN_RANK, position, entry))
            elif (rank := platform_rank(wanted, entry.platform)) is not None:
                ranked.append((rank, position, entry))
        return [entry for _, _, entry in sorted(ranked, key=lambda r: r[:2])]


def no_platform(wanted: Platform, offered: Iterable[Platform], name: str) -> NotFound:
    """The error for an index without an image for `wanted`, naming what is on offer."""
    platforms = sorted({str(platform) for platform in offered})
    shown = ", ".join(printable(text, 60) for text in platforms[:_SHOWN_PLATFORMS]) or "none"
    if len(platforms) > _SHOWN_PLATFORMS:
        shown += f" and {len(platforms) - _SHOWN_PLATFORMS} more"
    return NotFound(f"no manifest for platform {wanted}; the index offers {shown}", where=name)


@dataclass(frozen=True, slots=True)
class ImageConfig:
    """The parts of an image config that we act on. Source: image-spec config.md.

    `diff_ids` are digests of uncompressed layers, base layer first. `raw` is the whole document, for verbose answers.
    """

    platform: Platform
    diff_ids: tuple[Digest, ...]
    user: str = ""
    env: tuple[str, ...] = ()
    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    working_dir: str = ""
    volumes: tuple[str, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    stop_signal: str = ""
    exposed_ports: tuple[str, ...] = ()
    created: str = ""
    raw: Mapping[str, Any] = field(default_factory=dict)

    def chain_ids(self) -> list[Digest]:
        """Chain ID of every layer, base first."""
        return chain_ids(self.diff_ids)


def chain_ids(diff_ids: Iterable[Digest]) -> list[Digest]:
    """Chain IDs of a stack of diff IDs, base first: the first is its diff ID, then SHA256(parent + " " + diff ID).

    Source: image-spec config.md#layer-chainid.
    """
    chain: list[Digest] = []
    for diff_id in diff_ids:
        chain.append(Digest.of(f"{chain[-1]} {diff_id}".encode()) if chain else diff_id)
    return chain


def parse_document(data: bytes, content_type: str, where: str) -> Manifest | Index:
    """A manifest or an index from registry bytes.

    Args:
        data: the document; at most MAX_DOCUMENT bytes.
        content_type: its media type by the registry or the parent descriptor; "" when neither gave one.
        where: reference or URL, for errors.
    Raises:
        InvalidArgument: malformed, ambiguous (GHSA-5j5w-g665-5m35), schema 1, or of another type than announced.
        ResourceExhausted: over a limit.
    """
    value = _load(data, where)
    announced = content_type.partition(";")[0].strip()
    declared = _member(value, "mediaType", str, where)
    has = {key.casefold() for key in value}
    if announced in DOCKER_SCHEMA1 or declared in DOCKER_SCHEMA1 or "fslayers" in has or _get(value, "schemaVersion", where) == 1:
        raise InvalidArgument("Docker schema 1 manifests are not supported", where=where, hint="push the image again with a current tool")
    known = INDEX_TYPES | MANIFEST_TYPES
    if declared and announced in known and declared != announced:
        raise InvalidArgument(f'the document calls itself "{printable(declared, 80)}" but was announced as "{announced}"', where=where)
    kind = declared or (announced if announced in known else "")
    if not kind:
        kind = OCI_INDEX if "manifests" in has else OCI_MANIFEST
    if kind in INDEX_TYPES:
        if has & {"config", "layers"}:
            raise InvalidArgument("ambiguous index: it also has config or layers", where=where)
        return _index(value, kind, where)
    if kind in MANIFEST_TYPES:
        if "manifests" in has:
            raise InvalidArgument("ambiguous manifest: it also has manifests", where=where)
        return _manifest(value, kind, where)
    raise InvalidArgument(f'not a manifest or index: media type "{printable(kind, 80)}"', where=where)


def parse_config(data: bytes, where: str) -> ImageConfig:
    """An image config. Raises: InvalidArgument, ResourceExhausted. Docker's and OCI's differ in nothing we read."""
    return config_from_json(_load(data, where), where)


def config_from_json(value: object, where: str) -> ImageConfig:
    """As parse_config, from a document that is parsed already."""
    value = _typed(value, dict, "image config", where)
    rootfs = _member(value, "rootfs", dict, where)
    raw_ids = _member(rootfs, "diff_ids", list, where)
    if len(raw_ids) > MAX_DESCRIPTORS:
        raise ResourceExhausted(f"{len(raw_ids)} diff_ids; at most {MAX_DESCRIPTORS} are accepted", where=where)
    config = _member(value, "config", dict, where)
    return ImageConfig(
        platform=_platform(value, where),
        diff_ids=tuple(_digest(d, "rootfs.diff_ids", where) for d in raw_ids),
        user=_member(config, "User", str, where),
        env=_bounded("Env", _strings(config, "Env", where), where),
        entrypoint=_strings(config, "Entrypoint", where),
        cmd=_strings(config, "Cmd", where),
        working_dir=_member(config, "WorkingDir", str, where),
        volumes=_bounded("Volumes", tuple(_member(config, "Volumes", dict, where)), where),
        labels=_string_map(config, "Labels", where),
        stop_signal=_member(config, "StopSignal", str, where),
        exposed_ports=tuple(_member(config, "ExposedPorts", dict, where)),
        created=_member(value, "created", str, where),
        raw=value,
    )


def _manifest(value: Mapping[str, Any], kind: str, where: str) -> Manifest:
    layers = _descriptors(value, "layers", where)
    config = _optional(value, "config", where)
    if config is None:
        raise InvalidArgument("a manifest without config", where=where)
    if config.size + sum(layer.size for layer in layers) > MAX_SIZE:
        raise InvalidArgument("the sizes add up to more than any store can hold", where=where)
    return Manifest(
        media_type=kind,
        config=config,
        layers=layers,
        annotations=_string_map(value, "annotations", where),
        artifact_type=_member(value, "artifactType", str, where),
        subject=_optional(value, "subject", where),
    )


def _index(value: Mapping[str, Any], kind: str, where: str) -> Index:
    return Index(
        media_type=kind,
        manifests=_descriptors(value, "manifests", where),
        annotations=_string_map(value, "annotations", where),
        subject=_optional(value, "subject", where),
    )


def _bounded(name: str, entries: tuple[str, ...], where: str) -> tuple[str, ...]:
    if len(entries) > MAX_SETTINGS[name]:
        raise ResourceExhausted(f"{len(entries)} {name}; at most {MAX_SETTINGS[name]} are accepted", where=where)
    return entries


def _optional(value: Mapping[str, Any], name: str, where: str) -> Descriptor | None:
    found = _get(value, name, where)
    return None if found is None else _descriptor(found, f"{where}: {name}")


def _descriptors(value: Mapping[str, Any], name: str, where: str) -> tuple[Descriptor, ...]:
    entries = _member(value, name, list, where)
    if len(entries) > MAX_DESCRIPTORS:
        raise ResourceExhausted(f"{len(entries)} {name}; at most {MAX_DESCRIPTORS} are accepted", where=where)
    return tuple(_descriptor(entry, f"{where}: {name}[{position}]") for position, entry in enumerate(entries))


def _descriptor(value: object, where: str) -> Descriptor:
    entry = _typed(value, dict, "descriptor", where)
    size = _get(entry, "size", where)
    if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= MAX_SIZE:
        raise InvalidArgument(f"size is {printable(repr(size), 40)}, not a number of bytes", where=where)
    digest = _digest(_get(entry, "digest", where), "digest", where)
    inline = _get(entry, "data", where)
    data = _inline(inline, digest, size, where) if inline is not None else None
    platform = _member(entry, "platform", dict, where)
    return Descriptor(
        media_type=_member(entry, "mediaType", str, where),
        digest=digest,
        size=size,
        annotations=_string_map(entry, "annotations", where),
        platform=_platform(platform, where) if platform else None,
        artifact_type=_member(entry, "artifactType", str, where),
        urls=_strings(entry, "urls", where),
        data=data,
    )


def _digest(value: object, name: str, where: str) -> Digest:
    text = _typed(value, str, name, where)
    try:
        return Digest(text)
    except InvalidArgument as error:
        raise InvalidArgument(error.what, where=where, hint=error.hint) from error


def _inline(value: object, digest: Digest, size: int, where: str) -> bytes:
    """Embedded content, verified here so that it cannot be used unverified. Source: descriptor.md#embedded-content."""
    try:
        data = base64.b64decode(_typed(value, str, "data", where), validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidArgument("data is not base64", where=where) from error
    if len(data) != size or Digest.of(data, digest.algorithm) != digest:
        raise InvalidArgument("embedded data does not match its own digest and size", where=where)
    return data


def _platform(value: Mapping[str, Any], where: str) -> Platform:
    return Platform(
        os=_member(value, "os", str, where) or "linux",
        architecture=_member(value, "architecture", str, where),
        variant=_member(value, "variant", str, where),
        os_version=_member(value, "os.version", str, where),
        os_features=_strings(value, "os.features", where),
    ).normalised()


def _strings(value: Mapping[str, Any], name: str, where: str) -> tuple[str, ...]:
    return tuple("" if item is None else _typed(item, str, name, where) for item in _member(value, name, list, where))


def _string_map(value: Mapping[str, Any], name: str, where: str) -> dict[str, str]:
    entries = _member(value, name, dict, where).items()
    return {key: "" if item is None else _typed(item, str, f"{name}.{key}", where) for key, item in entries}


def _get(value: Mapping[str, Any], name: str, where: str) -> Any:
    """A member, None when it is absent or null. Its name counts whatever its case, as in Go, so that no reader sees another document.

    Raises: InvalidArgument when it is there twice in that sense: which one counts would depend on the reader.
    """
    folded = name.casefold()
    found = [key for key in value if len(key) == len(name) and key.casefold() == folded]
    if len(found) > 1:
        raise InvalidArgument(f"ambiguous document: {name} appears twice, in other case", where=where)
    return value[found[0]] if found else None


_T = TypeVar("_T")


def _member(value: Mapping[str, Any], name: str, kind: type[_T], where: str) -> _T:
    """An optional member; absent and null both mean empty, as Go's writers have it."""
    found = _get(value, name, where)
    return kind() if found is None else _typed(found, kind, name, where)


def _typed(value: object, kind: type[_T], name: str, where: str) -> _T:
    """`value` if it is a `kind` (bool is not an int here). Raises: InvalidArgument naming the member."""
    if not isinstance(value, kind) or isinstance(value, bool):
        raise InvalidArgument(f"{printable(name, 80)} is {type(value).__name__}, expected {kind.__name__}", where=where)
    return value


def _load(data: bytes, where: str) -> dict[str, Any]:
    return load_json_object(data, where, limit=MAX_DOCUMENT, mend=True)


_LOW: Final = r"\\u[dD][c-fC-F][0-9a-fA-F]{2}"
_ESCAPE = re.compile(r"\\u[dD][89abAB][0-9a-fA-F]{2}" + _LOW + r"|(\\u[dD][89a-fA-F][0-9a-fA-F]{2})|\\.", re.DOTALL)


def _mended(data: bytes) -> str:
    """JSON text in which what is no Unicode character, as bytes or as the escape of half a surrogate pair, is U+FFFD, as Go has it."""
    text = data.decode("utf-8", "replace")
    return _ESCAPE.sub(lambda escape: "\ufffd" if escape[1] else escape[0], text) if b"\\u" in data else text


def load_json_object(data: bytes, where: str, *, limit: int, mend: bool = False) -> dict[str, Any]:
    """A JSON object from hostile bytes: UTF-8 only, no duplicate members, no NaN, no half
    surrogates; size [bytes], depth and number of values bounded.

    mend: read what is no Unicode as U+FFFD, and leave numbers that no member of ours can have as text. For what only
    describes; a credential or a signed statement is refused rather than changed.

    Raises: InvalidArgument; ResourceExhausted when over a bound.
    """
    if len(data) > limit:
        raise ResourceExhausted(f"{len(data)} bytes; at most {limit} are accepted", where=where)
    if sum(data.count(mark) for mark in (b",", b"[", b"{")) > MAX_VALUES:
        raise ResourceExhausted(f"more than {MAX_VALUES} values", where=where)
    try:
        value = json.loads(
            _mended(data) if mend else data.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_no_constant,
            parse_float=_float_or_text if mend else _finite,
            parse_int=_int_or_text if mend else None,
        )
        if b"\\u" in data and not mend:  # only an escape can smuggle half a character in, which nothing later could write down
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError as error:
        raise InvalidArgument("nested too deeply", where=where) from error
    except ValueError as error:  # UnicodeError, JSONDecodeError, huge integers, and our own hooks
        raise InvalidArgument(f"not valid JSON: {printable(str(error), 160)}", where=where) from error
    return _typed(value, dict, "document", where)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a member appears twice")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _int_or_text(text: str) -> int | str:
    return int(text) if len(text) <= _MAX_DIGITS else text


def _float_or_text(text: str) -> float | str:
    return number if math.isfinite(number := float(text)) else text


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError("a number out of range")
    return number
