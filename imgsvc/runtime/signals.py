"""Signals by CRI number, by name and by number of this kernel. Source: api.proto enum Signal, signal(7)."""

from __future__ import annotations

import signal
from typing import Final

from imgsvc.base.numerals import whole_number

_CRI_NAMES: Final = (
    "",
    *(
        "SIG" + name
        for name in [
            "ABRT",
            "ALRM",
            "BUS",
            "CHLD",
            "CLD",
            "CONT",
            "FPE",
            "HUP",
            "ILL",
            "INT",
            "IO",
            "IOT",
            "KILL",
            "PIPE",
            "POLL",
            "PROF",
            "PWR",
            "QUIT",
            "SEGV",
            "STKFLT",
            "STOP",
            "SYS",
            "TERM",
            "TRAP",
            "TSTP",
            "TTIN",
            "TTOU",
            "URG",
            "USR1",
            "USR2",
            "VTALRM",
            "WINCH",
            "XCPU",
            "XFSZ",
            "RTMIN",
        ]
    ),
    *(f"SIGRTMIN+{n}" for n in range(1, 16)),
    *(f"SIGRTMAX-{n}" for n in range(14, 0, -1)),
    "SIGRTMAX",
)
_ALIASES: Final = {"SIGIOT": "SIGABRT", "SIGPOLL": "SIGIO", "SIGCLD": "SIGCHLD"}
DEFAULT: Final = "SIGTERM"


def stop_signal_name(requested: int, of_image: str) -> str:
    """The stop signal: the pod's, else the image's when it makes sense, else SIGTERM."""
    if 0 < requested < len(_CRI_NAMES):
        return _CRI_NAMES[requested]
    name = of_image.strip().upper()
    number = whole_number(name, signal.SIGRTMAX)
    if number is not None:
        return str(number) if 1 <= number <= signal.SIGRTMAX else DEFAULT
    name = name if name.startswith("SIG") else "SIG" + name
    return name if name in _CRI_NAMES else DEFAULT


def cri_number(name: str) -> int:
    """The number CRI has for a name, 0 for one it does not know."""
    return _CRI_NAMES.index(name) if name in _CRI_NAMES else 0


def to_number(name: str) -> int:
    """The kernel's number."""
    if name.isdecimal():
        return int(name)
    name = _ALIASES.get(name, name)
    if name.startswith("SIGRTMIN+"):
        return int(signal.SIGRTMIN) + int(name[9:])
    if name.startswith("SIGRTMAX-"):
        return int(signal.SIGRTMAX) - int(name[9:])
    return int(signal.Signals[name])
