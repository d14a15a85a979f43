"""What a cgroup has used, read from its files: version 1, version 2, and the pressure files of a hybrid node.

A cgroup that is gone reads as nothing. Times in nanoseconds, memory in bytes, as CRI wants them.

Source: kernel admin-guide cgroup-v1/*.rst, cgroup-v2.rst, accounting/psi.rst; cri-api for the meaning of each number.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from imgsvc.runtime.host import Host
from imgsvc.runtime.numbers.cgroups import ROOT
from imgsvc.runtime.processes.exits import now_ns

_UNLIMITED: Final = 1 << 60  # version 1 says "no limit" with a number close to 2^63
_TICK_NS: Final = 10_000_000  # USER_HZ is 100 on every Linux


@dataclass(frozen=True, slots=True)
class Pressure:
    """One line of a pressure file: averages [percent] and total [µs]."""

    total: int = 0
    avg10: float = 0.0
    avg60: float = 0.0
    avg300: float = 0.0


@dataclass(frozen=True, slots=True)
class Stalls:
    """A pressure file: some tasks stalled, all tasks stalled."""

    some: Pressure = field(default_factory=Pressure)
    full: Pressure = field(default_factory=Pressure)


@dataclass(frozen=True, slots=True)
class Usage:
    """One sample of a cgroup. limit, swap_limit, pids_limit: 0 when there is none.

    memory: memory.stat of either version, as the kernel names its lines. stalls: by resource; empty without PSI.
    """

    at: int
    cpu: int = 0
    cpu_user: int = 0
    cpu_system: int = 0
    periods: int = 0
    throttled_periods: int = 0
    throttled: int = 0
    usage: int = 0
    max_usage: int = 0
    limit: int = 0
    failures: int = 0
    swap: int = 0
    swap_limit: int = 0
    kernel: int = 0
    memory: Mapping[str, int] = field(default_factory=dict)
    oom_kills: int = 0
    pids: int = 0
    pids_limit: int = 0
    stalls: Mapping[str, Stalls] = field(default_factory=dict)

    def line(self, *names: str) -> int:
        """The first of some lines of memory.stat that exists, 0 when none does."""
        return next((self.memory[name] for name in names if name in self.memory), 0)

    @property
    def working_set(self) -> int:
        """Usage without inactive page cache: what the kubelet evicts by."""
        return max(0, self.usage - self.line("total_inactive_file", "inactive_file"))

    @property
    def rss(self) -> int:
        """Anonymous memory."""
        return self.line("total_rss", "anon")

    @property
    def available(self) -> int | None:
        """What is left below the limit; None without a limit."""
        return max(0, self.limit - self.working_set) if self.limit else None


def read(host: Host, path: str, *, details: bool = False) -> Usage | None:
    """Sample a cgroup (path below the cgroup root); None when it is gone. details: what only metrics need. Blocking."""
    relative = path.lstrip("/")
    return _read_v2(ROOT / relative) if host.unified else _read_v1(relative, details=details)


def _read_v1(relative: str, *, details: bool) -> Usage | None:
    cpuacct, memory = f"{ROOT}/cpuacct/{relative}", f"{ROOT}/memory/{relative}"
    cpu = _text(f"{cpuacct}/cpuacct.usage")
    if cpu is None:
        return None
    lines = _pairs(_text(f"{memory}/memory.stat"))
    memsw = _number(f"{memory}/memory.memsw.usage_in_bytes")
    used = _number(f"{memory}/memory.usage_in_bytes")
    values: dict[str, int] = {}
    if details:
        values = _details_v1(cpuacct, f"{ROOT}/cpu/{relative}", memory, f"{ROOT}/pids/{relative}")
    return Usage(
        at=now_ns(),
        cpu=int(cpu),
        usage=used,
        limit=limited(lines.get("hierarchical_memory_limit", 0)),
        swap=max(0, memsw - used),
        swap_limit=max(0, limited(lines.get("hierarchical_memsw_limit", 0)) - limited(lines.get("hierarchical_memory_limit", 0))),
        memory=lines,
        pids=_number(f"{ROOT}/pids/{relative}/pids.current"),
        stalls=_stalls(f"{ROOT}/unified/{relative}"),
        **values,
    )


def _details_v1(cpuacct: str, cpu: str, memory: str, pids: str) -> dict[str, int]:
    split = _pairs(_text(f"{cpuacct}/cpuacct.stat"))
    stat = _pairs(_text(f"{cpu}/cpu.stat"))
    return {
        "cpu_user": split.get("user", 0) * _TICK_NS,
        "cpu_system": split.get("system", 0) * _TICK_NS,
        "periods": stat.get("nr_periods", 0),
        "throttled_periods": stat.get("nr_throttled", 0),
        "throttled": stat.get("throttled_time", 0),
        "max_usage": _number(f"{memory}/memory.max_usage_in_bytes"),
        "failures": _number(f"{memory}/memory.failcnt"),
        "kernel": _number(f"{memory}/memory.kmem.usage_in_bytes"),
        "oom_kills": _pairs(_text(f"{memory}/memory.oom_control")).get("oom_kill", 0),
        "pids_limit": _number(f"{pids}/pids.max"),
    }


def _read_v2(directory: Path) -> Usage | None:
    below = directory / "container"  # crun's, below a systemd scope: limits and throttling are there
    base = str(below if below.is_dir() else directory)
    text = _text(f"{base}/cpu.stat")
    if text is None:
        return None
    cpu = _pairs(text)
    events = _pairs(_text(f"{base}/memory.events"))
    lines = _pairs(_text(f"{base}/memory.stat"))
    return Usage(
        at=now_ns(),
        cpu=cpu.get("usage_usec", 0) * 1000,
        cpu_user=cpu.get("user_usec", 0) * 1000,
        cpu_system=cpu.get("system_usec", 0) * 1000,
        periods=cpu.get("nr_periods", 0),
        throttled_periods=cpu.get("nr_throttled", 0),
        throttled=cpu.get("throttled_usec", 0) * 1000,
        usage=_number(f"{base}/memory.current"),
        max_usage=_number(f"{base}/memory.peak"),
        limit=_number(f"{base}/memory.max"),
        failures=events.get("max", 0),
        swap=_number(f"{base}/memory.swap.current"),
        swap_limit=_number(f"{base}/memory.swap.max"),
        kernel=lines.get("kernel", 0),
        memory=lines,
        oom_kills=events.get("oom_kill", 0),
        pids=_number(f"{base}/pids.current"),
        pids_limit=_number(f"{base}/pids.max"),
        stalls=_stalls(base),
    )


def processes(host: Host, path: str) -> list[int]:
    """Pids in a cgroup and below it. Blocking."""
    relative = path.lstrip("/")
    top = ROOT / relative if host.unified else ROOT / "pids" / relative
    found: list[int] = []
    for directory, _, _ in os.walk(top):
        found += [int(pid) for pid in (_text(f"{directory}/cgroup.procs") or "").split()]
    return found


def block_io(host: Host, path: str) -> list[tuple[str, str, int, int]]:
    """(device "major:minor", "Read" or "Write", bytes, operations) for every device used. Blocking."""
    relative = path.lstrip("/")
    if host.unified:
        return _io_stat(_text(f"{ROOT}/{relative}/io.stat") or "")
    base = f"{ROOT}/blkio/{relative}/blkio.throttle"
    sizes, counts = _io_table(_text(f"{base}.io_service_bytes")), _io_table(_text(f"{base}.io_serviced"))
    return [(device, way, size, counts.get((device, way), 0)) for (device, way), size in sizes.items() if way in ("Read", "Write")]


def _io_table(text: str | None) -> dict[tuple[str, str], int]:
    rows = (line.split() for line in (text or "").splitlines())
    return {(row[0], row[1]): int(row[2]) for row in rows if len(row) == 3}


def _io_stat(text: str) -> list[tuple[str, str, int, int]]:
    found = []
    for line in text.splitlines():
        device, *pairs = line.split()
        values = {k: int(v) for k, _, v in (pair.partition("=") for pair in pairs) if v.isdecimal()}
        found += [(device, "Read", values.get("rbytes", 0), values.get("rios", 0))]
        found += [(device, "Write", values.get("wbytes", 0), values.get("wios", 0))]
    return found


def parse_pressure(text: str) -> Stalls:
    """A pressure file."""
    lines: dict[str, Pressure] = {}
    for line in text.splitlines():
        kind, *pairs = line.split()
        values = dict(pair.split("=") for pair in pairs)
        lines[kind] = Pressure(int(values["total"]), float(values["avg10"]), float(values["avg60"]), float(values["avg300"]))
    return Stalls(lines.get("some", Pressure()), lines.get("full", Pressure()))


def _stalls(base: str) -> dict[str, Stalls]:
    texts = {resource: _text(f"{base}/{resource}.pressure") for resource in ("cpu", "memory", "io")}
    return {resource: parse_pressure(text) for resource, text in texts.items() if text}


def _text(path: str) -> str | None:
    """A small kernel file. Three system calls: this runs hundreds of times per listing."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return os.read(fd, 65536).decode("ascii", "replace")
    except OSError:
        return None
    finally:
        os.close(fd)


def _number(path: str) -> int:
    text = (_text(path) or "").strip()
    return limited(int(text)) if text.isdecimal() else 0


def limited(value: int) -> int:
    """A limit, 0 for the numbers that mean none."""
    return value if value < _UNLIMITED else 0


def _pairs(text: str | None) -> dict[str, int]:
    found = {}
    for line in (text or "").splitlines():
        key, _, value = line.partition(" ")
        if value.isdecimal():
            found[key] = int(value)
    return found
