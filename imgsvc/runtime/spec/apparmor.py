"""The default AppArmor profile: written out and loaded when the daemon starts, where the kernel has AppArmor.

Source: apparmor.d(5).
"""

from __future__ import annotations

import logging
import shutil
from typing import Final

from imgsvc.base.errors import ImgsvcError
from imgsvc.base.programs import run
from imgsvc.runtime.host import Host

log = logging.getLogger(__name__)

NAME: Final = "imgsvc-default"

# Containers may do what their capabilities allow, but not mount, not turn the kernel's knobs, and signal or trace only one
# another. What is read-only or masked by mounts anyway is denied here a second time.
PROFILE: Final = f"""
abi <abi/3.0>,
profile {NAME} flags=(attach_disconnected, mediate_deleted) {{
  network,
  capability,
  file,
  umount,
  deny mount,

  signal (receive) peer=unconfined,
  signal (receive) peer={{runc,crun,conmon,/usr/bin/runc,/usr/sbin/runc,/usr/bin/crun,/usr/bin/conmon}},
  signal (send, receive) peer={NAME},
  ptrace (trace, read, tracedby, readby) peer={NAME},

  deny /proc/sys/** w,
  deny /proc/{{sysrq-trigger,kcore,kmem,mem}} rwklx,
  deny /sys/{{firmware,devices/virtual/powercap,kernel/security,kernel/debug}}/** rwklx,
}}
"""


async def load_default(host: Host) -> str:
    """Load the profile into the kernel; its name, or "" where there is no AppArmor or the profile cannot be loaded."""
    if not host.apparmor:
        return ""
    parser = shutil.which("apparmor_parser")
    if parser is None:
        log.warning("AppArmor is on, but there is no apparmor_parser: containers run without the default profile; install apparmor")
        return ""
    try:
        done = await run([parser, "--replace", "--skip-cache"], stdin=PROFILE.encode())
        if done.status:  # parsers before 3.0 know no abi rule
            done = await run([parser, "--replace", "--skip-cache"], stdin=PROFILE.replace("abi <abi/3.0>,\n", "").encode())
    except ImgsvcError as error:
        log.warning("the default AppArmor profile cannot be loaded: %s", error)
        return ""
    if done.status:
        log.warning("the default AppArmor profile cannot be loaded, containers run without it: %s", done.complaint)
        return ""
    return NAME
