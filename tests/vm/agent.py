"""Runs inside the machine, on its Python without anything else: one JSON object per line in, one out.

Request {"id", "argv", "input" (base64), "timeout" [seconds]}; answer {"id", "status" (null: timed out), "out", "err" (base64)}.
Requests run beside one another. The first line out is {"boot": boot ID}.
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
import threading
from pathlib import Path
from typing import IO, Any, Final

PORT: Final = "/dev/virtio-ports/agent"


def serve(requests: IO[bytes], answers: IO[bytes]) -> None:
    """Answer until the port closes."""
    lock = threading.Lock()
    _send(answers, lock, {"boot": Path("/proc/sys/kernel/random/boot_id").read_text().strip()})
    for line in requests:
        threading.Thread(target=_answer, args=(answers, lock, json.loads(line)), daemon=True).start()


def _answer(answers: IO[bytes], lock: threading.Lock, request: dict[str, Any]) -> None:
    status, out, err = _run(request["argv"], base64.b64decode(request["input"]), request["timeout"])
    shown = {"out": base64.b64encode(out).decode(), "err": base64.b64encode(err).decode()}
    _send(answers, lock, {"id": request["id"], "status": status, **shown})


def _run(argv: list[str], data: bytes, timeout: float) -> tuple[int | None, bytes, bytes]:
    try:
        done = subprocess.run(argv, input=data, capture_output=True, timeout=timeout, cwd="/")
    except subprocess.TimeoutExpired as late:
        return None, late.stdout or b"", late.stderr or b""
    except OSError as error:
        return 127, b"", str(error).encode()
    return done.returncode, done.stdout, done.stderr


def _send(answers: IO[bytes], lock: threading.Lock, answer: dict[str, Any]) -> None:
    with lock:
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()


if __name__ == "__main__":
    descriptor = os.open(PORT, os.O_RDWR | os.O_CLOEXEC)  # the port can be opened once only
    with open(descriptor, "rb") as incoming, open(descriptor, "wb", closefd=False) as outgoing:
        serve(incoming, outgoing)
