"""Mounting an image over the files it names: straight from the files, or through loop devices where the kernel or the file system
cannot do that (before Linux 6.12; tmpfs, overlayfs).
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from imgsvc.base import kernel

_MAX_OPTION: Final = 255  # [bytes] of one option of a mount
_LOOP_CONFIGURE: Final = 0x4C0A  # Source: linux/loop.h
_LOOP_CTL_GET_FREE: Final = 0x4C82
_READ_ONLY: Final = 1
_AUTOCLEAR: Final = 4  # free again with the last user, which is the mount
_LOOP_CONFIG: Final = struct.Struct("<II 52x I 176x 64x")  # descriptor, block size; flags
_ATTEMPTS: Final = 20  # another process may take a free device first


def mount_image(image: Path, devices: Sequence[Path], place: Path) -> None:
    """Mount an image over the tar streams it names, in their order. Raises: OSError."""
    try:
        with ExitStack() as stack:
            _mount([_short(file, stack) for file in (image, *devices)], place)
    except OSError as error:
        if error.errno != errno.ENOTBLK:
            raise
        with ExitStack() as stack:
            _mount([_loop_device_of(file, stack) for file in (image, *devices)], place)


def _mount(files: Sequence[str], place: Path) -> None:
    source, *devices = files
    kernel.mount_new("erofs", [("source", source), *(("device", device) for device in devices)], str(place), read_only=True)


def _short(path: Path, stack: ExitStack) -> str:
    """A name for a file that fits into an option of a mount."""
    return str(path) if len(os.fsencode(path)) <= _MAX_OPTION else f"/proc/self/fd/{_open(path, stack)}"


def _loop_device_of(path: Path, stack: ExitStack) -> str:
    try:
        return _loop_device(path, stack)
    except OSError as error:
        text = f"EROFS cannot be mounted from files of this file system, and there is no loop device for them ({error.strerror})"
        raise OSError(errno.ENOTBLK, text, str(path)) from error


def _loop_device(path: Path, stack: ExitStack) -> str:
    """A loop device that is the file, for as long as it is mounted; until then `stack` keeps it."""
    file = _open(path, stack)
    control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
    stack.callback(os.close, control)
    for _ in range(_ATTEMPTS):
        name = f"/dev/loop{fcntl.ioctl(control, _LOOP_CTL_GET_FREE)}"
        device = os.open(name, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.ioctl(device, _LOOP_CONFIGURE, _LOOP_CONFIG.pack(file, 0, _READ_ONLY | _AUTOCLEAR))
        except OSError as error:
            os.close(device)
            if error.errno != errno.EBUSY:
                raise
        else:
            stack.callback(os.close, device)
            return name
    raise OSError(errno.EBUSY, "no loop device can be had", str(path))


def _open(path: Path, stack: ExitStack) -> int:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    stack.callback(os.close, fd)
    return fd
