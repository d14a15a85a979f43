"""Telling a command that cannot be run from everything else that keeps an OCI runtime from creating a container. Pure.

Runtimes look the command up within their `create`, in the finished container, so only they can tell why it failed; all they return is text.
"""

from __future__ import annotations

import re

# runc and its shim: `exec: "x": executable file not found in $PATH`, `exec: "/x": permission denied` (Go's os/exec);
# crun: executable file `x` not found in $PATH; others name the executable in words of their own.
_COMMAND = re.compile(r'exec: "|\bexecutable\b', re.IGNORECASE)
_HOOK = re.compile(r"\bhooks?\b", re.IGNORECASE)  # programs of the specification's, run on the node


def is_about_the_command(complaint: str) -> bool:
    """Whether a runtime refused to create a container because of the command it is to run, and of nothing else."""
    return bool(_COMMAND.search(complaint)) and not _HOOK.search(complaint)
