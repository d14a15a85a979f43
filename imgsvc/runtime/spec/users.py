"""Which numbers a container's process runs with, from the request, the image and hostile passwd and group files.

A name is looked up; a number never is, except for its groups. Numbers outside 0 … 2^31-1 are errors, not names
(CVE-2024-40635, CVE-2026-46680). What ImageStatus tells of an image's user comes from the same parser as what is run. Files are read only when regular, inside the root, and up to MAX_FILE
(CVE-2026-47262, CVE-2025-4437). The primary group is always among the groups (CVE-2022-36109).
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from imgsvc.base import kernel
from imgsvc.base.errors import InvalidArgument, NotFound, ResourceExhausted, from_os_error, printable
from imgsvc.base.numerals import whole_number
from imgsvc.base.oci import MIB
from imgsvc.runtime.model import LinuxContainerSecurityContext, SupplementalGroupsPolicy, User

MAX_FILE: Final = 10 * MIB  # [bytes] of /etc/passwd and of /etc/group
MAX_ID: Final = 2**31 - 1  # what the kubelet's runAsNonRoot can compare
MAX_SHOWN: Final = 512  # [characters] of a user that is no number; _NAME allows half as many

_ROOT: Final = "0"  # USER of an image that has none
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.@-]{0,255}\$?", re.ASCII)


@dataclass(frozen=True, slots=True)
class PasswdEntry:
    """A line of /etc/passwd. IDs out of range are MAX_ID + 1."""

    name: str
    uid: int
    gid: int


def parse_number(text: str, what: str) -> int | None:
    """The ID that a text of digits gives; None when it is a name. Raises: InvalidArgument for what is neither."""
    number = whole_number(text, MAX_ID)
    if number is not None:
        if number > MAX_ID:
            raise InvalidArgument(f"{what} {printable(text, 40)} is out of range", hint=f"use 0 to {MAX_ID}")
        return number
    if not _NAME.fullmatch(text):
        raise InvalidArgument(f'{what} "{printable(text, 80)}" is neither a number from 0 to {MAX_ID} nor a name')
    return None


def announced_user(image_user: str) -> tuple[int | None, str]:
    """(UID, user name) of an image's USER as ImageStatus has them: exactly one is given, and none at all is UID 0.

    What cannot be used, such as a number out of range, is reported as a name, never as a UID, so that no check of it passes.
    More than any name can have is left out, with a mark: a handful of configs full of USER would make a listing too large to send.
    """
    name = image_user.partition(":")[0] or _ROOT
    try:
        number = parse_number(name, "image user")
    except InvalidArgument:
        number = None
    return (number, "") if number is not None else (None, name if len(name) <= MAX_SHOWN else printable(name, MAX_SHOWN))


def split_image_user(text: str) -> tuple[str, str]:
    """User and group parts of an image's USER. Raises: InvalidArgument for numbers out of range and malformed names."""
    user, _, group = text.partition(":")
    for part, what in ((user, "image user"), (group, "image group")):
        if part:
            parse_number(part, what)
    return user, group


def read_database(rootfs: Path, path: str) -> list[list[str]]:
    """The colon-separated lines of a file inside a root file system; [] when there is no such file. Blocking.

    Raises: InvalidArgument (not a regular file, leads out of the root), ResourceExhausted (over MAX_FILE).
    """
    try:
        # First a descriptor that cannot block and reads nothing: opening a FIFO or a device has effects.
        handle = kernel.open_in_root(rootfs, path, os.O_PATH)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise InvalidArgument(f"the image's file cannot be opened: {error.strerror}", where=path) from error
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise InvalidArgument("not a regular file in this image", where=path)
        if status.st_size > MAX_FILE:
            raise ResourceExhausted(f"{status.st_size} bytes; at most {MAX_FILE} are read", where=path)
        with open(f"/proc/self/fd/{handle}", "rb") as stream:
            data = stream.read(MAX_FILE + 1)
    except OSError as error:
        raise from_os_error(error, "reading the image's file", where=path) from error
    finally:
        os.close(handle)
    if len(data) > MAX_FILE:
        raise ResourceExhausted(f"more than {MAX_FILE} bytes", where=path)
    return [line.split(":") for line in data.decode("utf-8", "replace").splitlines() if line and not line.startswith("#")]


def _passwd(rootfs: Path) -> Iterator[PasswdEntry]:
    for fields in read_database(rootfs, "/etc/passwd"):
        if len(fields) >= 4:
            uid, gid = whole_number(fields[2], MAX_ID), whole_number(fields[3], MAX_ID)
            if uid is not None and gid is not None:
                yield PasswdEntry(fields[0], uid, gid)


def _find_user(rootfs: Path, name: str) -> PasswdEntry:
    for entry in _passwd(rootfs):
        if entry.name == name:
            _in_range(entry.uid, "/etc/passwd")
            _in_range(entry.gid, "/etc/passwd")
            return entry
    raise NotFound(f'the image has no user "{printable(name, 80)}" in /etc/passwd')


def _in_range(number: int, where: str) -> int:
    if not 0 <= number <= MAX_ID:
        raise InvalidArgument("an ID is out of range", where=where, hint=f"use 0 to {MAX_ID}")
    return number


def _groups(rootfs: Path) -> Iterator[tuple[str, int, list[str]]]:
    """(name, GID, members) of the lines of /etc/group. IDs out of range are MAX_ID + 1."""
    for fields in read_database(rootfs, "/etc/group"):
        gid = whole_number(fields[2], MAX_ID) if len(fields) >= 3 else None
        if gid is not None:
            yield fields[0], gid, fields[3].split(",") if len(fields) >= 4 else []


def _find_group(rootfs: Path, name: str) -> int:
    for group, gid, _ in _groups(rootfs):
        if group == name:
            return _in_range(gid, "/etc/group")
    raise NotFound(f'the image has no group "{printable(name, 80)}" in /etc/group')


def _groups_of(rootfs: Path, name: str) -> list[int]:
    return [_in_range(gid, "/etc/group") for _, gid, members in _groups(rootfs) if name in members]


def resolve_user(security: LinuxContainerSecurityContext, image_user: str, rootfs: Path) -> User:
    """The process's user: run_as_user, else run_as_username, else the image's USER, else root. Blocking.

    Raises: InvalidArgument, NotFound (a name the image does not have), ResourceExhausted.
    """
    if security.run_as_group is not None and security.run_as_user is None and not security.run_as_username:
        raise InvalidArgument("runAsGroup without runAsUser")
    user_text, group_text = _requested(security, image_user)
    number = parse_number(user_text, "user")
    if number is None:
        entry: PasswdEntry | None = _find_user(rootfs, user_text)
    else:
        entry = next((e for e in _passwd(rootfs) if e.uid == number), None)
    uid = number if number is not None else (entry.uid if entry else 0)
    gid = _primary_group(security, group_text, entry, rootfs)
    groups = {gid, *(_in_range(g, "supplementalGroups") for g in security.supplemental_groups)}
    if security.supplemental_groups_policy == SupplementalGroupsPolicy.Merge and entry:
        groups.update(_groups_of(rootfs, entry.name))
    return User(uid, gid, tuple(sorted(groups)))


def _requested(security: LinuxContainerSecurityContext, image_user: str) -> tuple[str, str]:
    if security.run_as_user is not None:
        return str(_in_range(security.run_as_user, "runAsUser")), ""
    if security.run_as_username:
        return security.run_as_username, ""
    user, group = split_image_user(image_user)
    return user or _ROOT, group


def _primary_group(security: LinuxContainerSecurityContext, group_text: str, entry: PasswdEntry | None, rootfs: Path) -> int:
    if security.run_as_group is not None:
        return _in_range(security.run_as_group, "runAsGroup")
    if group_text:
        number = parse_number(group_text, "image group")
        return number if number is not None else _find_group(rootfs, group_text)
    return _in_range(entry.gid, "/etc/passwd") if entry else 0
