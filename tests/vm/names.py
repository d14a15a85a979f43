"""Names of what images.py makes. Apart from it: what runs in the machine imports no more than it needs, each module costs it tenths of a second."""

from __future__ import annotations

from pathlib import Path
from typing import Final

BUSYBOX: Final = "docker.io/library/busybox:latest"
CUT: Final = "docker.io/vm/cut:latest"  # the one that is pulled while the power goes
EXPECTED: Final = Path("opt/checkout/expected")  # of CUT; a pickle of (tree, directories without times), see read_tree
