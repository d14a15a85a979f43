"""What a shim answers to Stats and SandboxMetrics, as a Usage. Pure.

Source: containerd cgroups stats/metrics.proto (versions 1 and 2), as in imgsvc/api/cgroups_v*.proto.
"""

from __future__ import annotations

from typing import Any

from google.protobuf import any_pb2
from google.protobuf.message import DecodeError

from imgsvc.api import cgroups_v1_pb2, cgroups_v2_pb2
from imgsvc.runtime.numbers.usage import Usage, limited
from imgsvc.runtime.processes.exits import now_ns


def usage_of(metrics: any_pb2.Any) -> Usage | None:
    """Numbers of a container or a pod; None for a kind of message we do not know, or a broken one."""
    kind = metrics.type_url.rpartition("/")[2]
    try:
        if kind == "io.containerd.cgroups.v1.Metrics":
            return _v1(cgroups_v1_pb2.Metrics.FromString(metrics.value))
        if kind == "io.containerd.cgroups.v2.Metrics":
            return _v2(cgroups_v2_pb2.Metrics.FromString(metrics.value))
    except DecodeError:
        return None
    return None


def _v1(m: cgroups_v1_pb2.Metrics) -> Usage:
    return Usage(
        at=now_ns(),
        cpu=m.cpu.usage.total,
        cpu_user=m.cpu.usage.user,
        cpu_system=m.cpu.usage.kernel,
        periods=m.cpu.throttling.periods,
        throttled_periods=m.cpu.throttling.throttled_periods,
        throttled=m.cpu.throttling.throttled_time,
        usage=m.memory.usage.usage,
        max_usage=m.memory.usage.max,
        limit=limited(m.memory.usage.limit),
        failures=m.memory.usage.failcnt,
        swap=max(0, m.memory.swap.usage - m.memory.usage.usage),
        swap_limit=max(0, limited(m.memory.swap.limit) - limited(m.memory.usage.limit)),
        kernel=m.memory.kernel.usage,
        memory=_numbers(m.memory),
        oom_kills=m.memory_oom_control.oom_kill,
        pids=m.pids.current,
        pids_limit=limited(m.pids.limit),
    )


def _v2(m: cgroups_v2_pb2.Metrics) -> Usage:
    return Usage(
        at=now_ns(),
        cpu=m.cpu.usage_usec * 1000,
        cpu_user=m.cpu.user_usec * 1000,
        cpu_system=m.cpu.system_usec * 1000,
        periods=m.cpu.nr_periods,
        throttled_periods=m.cpu.nr_throttled,
        throttled=m.cpu.throttled_usec * 1000,
        usage=m.memory.usage,
        max_usage=m.memory.max_usage,
        limit=limited(m.memory.usage_limit),
        failures=m.memory_events.max,
        swap=m.memory.swap_usage,
        swap_limit=limited(m.memory.swap_limit),
        memory=_numbers(m.memory),
        oom_kills=m.memory_events.oom_kill,
        pids=m.pids.current,
        pids_limit=limited(m.pids.limit),
    )


def _numbers(message: Any) -> dict[str, int]:
    """The plain fields of a memory message, by the names memory.stat has for them."""
    plain = ((spec.name, value) for spec, value in message.ListFields() if isinstance(value, int))
    return {name.replace("pg_fault", "pgfault").replace("pg_maj_fault", "pgmajfault"): value for name, value in plain}
