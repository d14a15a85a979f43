"""Image references with Docker's normalisation: `nginx` is `docker.io/library/nginx:latest`. Pure.

Source: distribution reference grammar; `index.docker.io/…` and `docker.io/…` are one name.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from imgsvc.base.errors import InvalidArgument, printable
from imgsvc.base.oci import Digest

DEFAULT_HOST: Final = "docker.io"
DEFAULT_TAG: Final = "latest"
MIN_SHORT_ID: Final = 4  # [hex digits] of an image ID that we accept as an abbreviation
_OFFICIAL: Final = "library/"
_LEGACY_HOST: Final = "index.docker.io"
_MAX_REPOSITORY: Final = 255  # [characters] host and repository together, as the distribution grammar has it

_COMPONENT = re.compile(r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*", re.ASCII)
_LABEL = r"(?:[a-zA-Z0-9]|[a-zA-Z0-9][a-zA-Z0-9-]*[a-zA-Z0-9])"
_HOST = re.compile(rf"(?:{_LABEL}(?:\.{_LABEL})*|\[[a-fA-F0-9:]+\])(?::[0-9]{{1,5}})?", re.ASCII)
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}", re.ASCII)
_IMAGE_ID = re.compile(r"(?:sha256:)?[a-f0-9]{64}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Reference:
    """A full image name. At least one of tag and digest is set; where both are, the digest decides what is fetched.

    host: registry namespace, e.g. "docker.io", "localhost:5000", "[::1]:5000".  repository: e.g. "library/nginx".
    """

    host: str
    repository: str
    tag: str = ""
    digest: Digest | None = None

    @classmethod
    def parse(cls, text: str) -> Reference:
        """Parse and normalise. Raises: InvalidArgument saying which part is wrong."""
        if not text:
            raise InvalidArgument("empty image reference", hint="name an image, e.g. docker.io/library/nginx:latest")
        shown = printable(text, 200)
        rest, at, digest_text = text.partition("@")
        digest = Digest(digest_text) if at else None
        host, repository_and_tag = _split_host(rest)
        repository, tag = _split_tag(repository_and_tag)
        if not _HOST.fullmatch(host):
            raise InvalidArgument(f'invalid registry host "{printable(host, 80)}" in image reference "{shown}"')
        if tag is not None and not _TAG.fullmatch(tag):
            raise InvalidArgument(
                f'invalid tag "{printable(tag, 160)}" in image reference "{shown}"',
                hint="a tag has up to 128 letters, digits, dots, dashes and underscores",
            )
        if _IMAGE_ID.fullmatch(text):
            raise InvalidArgument(f'"{shown}" is an image ID, not a reference', hint="name the image, e.g. nginx:1.27")
        if host == DEFAULT_HOST and "/" not in repository:
            repository = _OFFICIAL + repository
        if not is_repository(repository):
            raise InvalidArgument(
                f'invalid repository "{printable(repository, 160)}" in image reference "{shown}"',
                hint="path parts are lower-case letters and digits, joined by single dots, dashes or underscores",
            )
        if len(host) + 1 + len(repository) > _MAX_REPOSITORY:
            raise InvalidArgument(f'image name longer than {_MAX_REPOSITORY} characters: "{shown}"')
        if tag is None and digest is None:
            tag = DEFAULT_TAG
        return cls(host, repository, tag or "", digest)

    @property
    def name(self) -> str:
        """Host and repository, without tag and digest."""
        return f"{self.host}/{self.repository}"

    @property
    def tagged(self) -> str:
        """name:tag, or "" when there is no tag."""
        return f"{self.name}:{self.tag}" if self.tag else ""

    @property
    def target(self) -> str:
        """What to ask a registry for: the digest when there is one, else the tag."""
        return str(self.digest) if self.digest else self.tag

    def with_digest(self, digest: Digest) -> Reference:
        """The same name pinned to a digest, without its tag: a repo digest."""
        return Reference(self.host, self.repository, "", digest)

    def __str__(self) -> str:
        text = self.name
        if self.tag:
            text += f":{self.tag}"
        if self.digest:
            text += f"@{self.digest}"
        return text


def is_repository(text: str) -> bool:
    """Whether it can be a repository's name, or the start of one that ends before a slash."""
    return all(_COMPONENT.fullmatch(part) for part in text.split("/"))


def is_id(text: str) -> bool:
    """Whether this is a whole image ID with its algorithm."""
    return text.startswith("sha256:") and _IMAGE_ID.fullmatch(text) is not None


def may_be_id(text: str) -> bool:
    """Whether this can be an image ID or the beginning of one, with or without its algorithm. "cafe" can be a name as well."""
    bare = text.removeprefix("sha256:")
    return len(bare) >= MIN_SHORT_ID and set(bare) <= set("0123456789abcdef")


def _split_host(text: str) -> tuple[str, str]:
    first, slash, rest = text.partition("/")
    if not slash or not (first == "localhost" or "." in first or ":" in first or first != first.lower()):
        return DEFAULT_HOST, text
    # Host names are case-insensitive (RFC 4343); one spelling keeps one record, one mirror directory, one credential.
    host = first.lower()
    if host != "localhost" and not {".", ":"} & set(first):  # in lower case it would be a repository on Docker Hub
        raise InvalidArgument(
            f'invalid registry host "{printable(first, 80)}" in image reference "{printable(text, 160)}"', hint="a host has a dot or a port"
        )
    return (DEFAULT_HOST if host == _LEGACY_HOST else host), rest


def _split_tag(text: str) -> tuple[str, str | None]:
    slash = text.rfind("/")
    colon = text.find(":", slash + 1)
    return (text, None) if colon < 0 else (text[:colon], text[colon + 1 :])
