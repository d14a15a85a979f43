"""Which numbers a container's process runs with, from the request, the image and hostile passwd and group files.

A name is looked up; a number never is, except for its groups. Numbers outside 0 … 2^31-1 are errors, not names
(CVE-2024-40635, CVE-2026-46680). Files are read only when regular, inside the root, and up to MAX_FILE
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

from imgsvc import kernel
from imgsvc.errors import InvalidArgument, NotFound, ResourceExhausted, from_os_error, printable
from imgsvc.oci import MIB
from imgsvc.runtime.model import LinuxContainerSecurityContext, SupplementalGroupsPolicy, User

MAX_FILE: Final = 10 * MIB  # [bytes] of /etc/passwd and of /etc/group
MAX_ID: Final = 2**31 - 1  # what the kubelet's runAsNonRoot can compare

_NUMBER = re.compile(r"[+-]?[0-9]+", re.ASCII)
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.@-]{0,255}\$?", re.ASCII)


@dataclass(frozen=True, slots=True)
class PasswdEntry:
    """A line of /etc/passwd."""

    name: str
    uid: int
    gid: int


def parse_number(text: str, what: str) -> int | None:
    """The ID a text of digits stands for; None when it is a name. Raises: InvalidArgument for what is neither."""
    if _NUMBER.fullmatch(text):
        number = int(text[:24])
        if not 0 <= number <= MAX_ID or text[0] in "+-":
            raise InvalidArgument(f"{what} {printable(text, 40)} is out of range", hint=f"use 0 to {MAX_ID}")
        return number
    if not _NAME.fullmatch(text):
        raise InvalidArgument(f'{what} "{printable(text, 80)}" is neither a number from 0 to {MAX_ID} nor a name')
    return None


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
        if len(fields) >= 4 and fields[2].isdecimal() and fields[3].isdecimal():
            yield PasswdEntry(fields[0], int(fields[2][:24]), int(fields[3][:24]))


def _find_user(rootfs: Path, name: str) -> PasswdEntry:
    for entry in _passwd(rootfs):
        if entry.name == name:
            _in_range(entry.uid, "/etc/passwd")
            _in_range(entry.gid, "/etc/passwd")
            return entry
    raise NotFound(f'the image has no user "{printable(name, 80)}" in /etc/passwd')


def _in_range(number: int, where: str) -> int:
    if not 0 <= number <= MAX_ID:
        raise InvalidArgument(f"ID {number} is out of range", where=where, hint=f"use 0 to {MAX_ID}")
    return number


def _find_group(rootfs: Path, name: str) -> int:
    for fields in read_database(rootfs, "/etc/group"):
        if len(fields) >= 3 and fields[0] == name and fields[2].isdecimal():
            return _in_range(int(fields[2][:24]), "/etc/group")
    raise NotFound(f'the image has no group "{printable(name, 80)}" in /etc/group')


def _groups_of(rootfs: Path, name: str) -> list[int]:
    lines = read_database(rootfs, "/etc/group")
    mine = (fields[2] for fields in lines if len(fields) >= 4 and fields[2].isdecimal() and name in fields[3].split(","))
    return [_in_range(int(number[:24]), "/etc/group") for number in mine]


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
    return user or "0", group


def _primary_group(security: LinuxContainerSecurityContext, group_text: str, entry: PasswdEntry | None, rootfs: Path) -> int:
    if security.run_as_group is not None:
        return _in_range(security.run_as_group, "runAsGroup")
    if group_text:
        number = parse_number(group_text, "image group")
        return number if number is not None else _find_group(rootfs, group_text)
    return _in_range(entry.gid, "/etc/passwd") if entry else 0
