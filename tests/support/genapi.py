"""Generate the code in imgsvc/api from its .proto files: `python -m tests.support.genapi` (make proto).

The versions of grpcio-tools and mypy-protobuf decide the bytes; requirements-lock.txt pins both.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[2]
API: Final = ROOT / "imgsvc" / "api"
# The only services spoken over gRPC; shims speak ttrpc and need the messages alone.
GRPC: Final = ("admin", "cri", "imagetools", "keyprovider")


def generate(out: Path) -> None:
    """Write the generated files below `out`, as imgsvc/api/*. Raises: CalledProcessError."""
    protos = sorted(str(p.relative_to(ROOT)) for p in API.glob("*.proto"))
    services = [p for p in protos if Path(p).stem in GRPC]
    _protoc(out, ["--python_out", "--mypy_out"], protos)
    _protoc(out, ["--grpc_python_out", "--mypy_grpc_out"], services)


def _protoc(out: Path, plugins: list[str], protos: list[str]) -> None:
    # protoc finds its mypy plugins on PATH, beside the interpreter that has grpcio-tools.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    quiet = ["--mypy_opt=quiet"] if "--mypy_out" in plugins else ["--mypy_grpc_opt=quiet"]
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I.", *(f"{p}={out}" for p in plugins), *quiet, *protos]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "PATH": path}, check=True, timeout=60)


if __name__ == "__main__":
    generate(ROOT)
