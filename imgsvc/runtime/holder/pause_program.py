"""The process that keeps a shared PID namespace: it ignores SIGCHLD, so the kernel reaps orphans, and sleeps.

A static ELF program of some 200 bytes, written out from here, so that no image has to be pulled and nothing built.
It runs from a root file system that holds nothing else, without capabilities.

Source: elf(5); rt_sigaction(2), pause(2), ppoll(2); the instruction sets' manuals.
"""

from __future__ import annotations

import os
import platform
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from imgsvc.base.errors import Unimplemented

# struct kernel_sigaction: handler SIG_IGN (1), no flags, no restorer, empty mask
_SIGACTION: Final = struct.pack("<QQQQ", 1, 0, 0, 0)

_AMD64: Final = bytes.fromhex(
    "bf11000000"  # mov  edi, 17 (SIGCHLD)
    "488d3519000000"  # lea  rsi, [rip+25] (the sigaction behind the code)
    "31d2"  # xor  edx, edx
    "41ba08000000"  # mov  r10d, 8 (bytes of a signal set)
    "b80d000000"  # mov  eax, 13 (rt_sigaction)
    "0f05"  # syscall
    "b822000000"  # mov  eax, 34 (pause)
    "0f05"  # syscall
    "ebf7"  # jmp  to the mov before
    "90"  # nop
)
_ARM64: Final = struct.pack(
    "<16I",
    0x52800220,  # mov  w0, #17 (SIGCHLD)
    0x100001E1,  # adr  x1, +60 (the sigaction behind the code)
    0xD2800002,  # mov  x2, #0
    0xD2800103,  # mov  x3, #8 (bytes of a signal set)
    0x528010C8,  # mov  w8, #134 (rt_sigaction)
    0xD4000001,  # svc  #0
    0xD2800000,  # mov  x0, #0
    0xD2800001,  # mov  x1, #0
    0xD2800002,  # mov  x2, #0
    0xD2800003,  # mov  x3, #0
    0xD2800004,  # mov  x4, #0
    0x52800928,  # mov  w8, #73 (ppoll, without descriptors and timeout)
    0xD4000001,  # svc  #0
    0x17FFFFF9,  # b    to the first mov of ppoll
    0xD503201F,  # nop
    0xD503201F,  # nop
)
_MACHINES: Final[Mapping[str, tuple[int, bytes]]] = {"x86_64": (62, _AMD64), "aarch64": (183, _ARM64)}
_BASE: Final = 0x400000
_HEADERS: Final = 64 + 56  # [bytes] ELF header and one program header


def pause_program(machine: str = "") -> bytes:
    """The executable for a machine as uname names it. Raises: Unimplemented for one we have no code for."""
    name = machine or platform.machine()
    if name not in _MACHINES:
        raise Unimplemented(f"no pause program for {name}", hint="pods with a shared PID namespace need x86_64 or aarch64")
    number, code = _MACHINES[name]
    body = code + _SIGACTION
    size = _HEADERS + len(body)
    header = b"\x7fELF" + bytes([2, 1, 1]) + bytes(9)
    header += struct.pack("<HHIQQQIHHHHHH", 2, number, 1, _BASE + _HEADERS, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    program = struct.pack("<IIQQQQQQ", 1, 5, 0, _BASE, _BASE, size, size, 0x1000)
    return header + program + body


def write_pause(rootfs: Path) -> None:
    """Make a root file system that holds /pause and the mount points a runtime wants."""
    for directory in ("", "proc", "dev", "sys"):
        (rootfs / directory).mkdir(mode=0o755, parents=True, exist_ok=True)
    fd = os.open(rootfs / "pause", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o755)
    with os.fdopen(fd, "wb") as stream:
        stream.write(pause_program())
