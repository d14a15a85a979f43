"""containerd's image verifiers: every program in a directory has to agree.

Called as `PROGRAM -name NAME -digest DIGEST -stdin-media-type application/vnd.oci.descriptor.v1+json`, with the
descriptor as JSON on stdin. Exit code 0 agrees, any other refuses; stdout is the reason. A program that cannot be started
or takes too long refuses, too.

Source: containerd docs/image-verification.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import json
import logging
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from imgsvc.base.concurrency import Threads, time_limit
from imgsvc.base.errors import from_os_error, printable
from imgsvc.base.oci import Descriptor
from imgsvc.images.verification.confine import confined

log = logging.getLogger(__name__)

MEDIA_TYPE: Final = "application/vnd.oci.descriptor.v1+json"
MAX_OUTPUT: Final = 32 * 1024  # [bytes] kept of stdout and of stderr each; the rest is read and dropped
_SHOWN: Final = 512  # [characters] of a reason that enter an error
_numbers = itertools.count()


@dataclass(frozen=True, slots=True)
class Judgement:
    """What the programs say together. asked: how many there were; reason: why not, or what they said."""

    ok: bool
    asked: int
    reason: str
    skipped: int = 0


@dataclass(frozen=True, slots=True)
class Programs:
    """A directory of verifiers. limit: how many are asked, the first ones by name; negative: all. timeout [s] of each."""

    directory: Path
    limit: int
    timeout_s: float
    threads: Threads

    def fingerprint(self) -> str:
        """Changes when a program comes, goes or is replaced. Blocking."""
        seen = hashlib.sha256(f"{self.limit}".encode())
        for path in self._programs()[0]:
            stat = path.stat()
            seen.update(f"{path.name}\0{stat.st_ino}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
        return seen.hexdigest()

    def any(self) -> bool:
        """Whether there is a verifier to ask. Blocking."""
        return bool(self._programs()[0])

    async def judge(self, name: str, target: Descriptor) -> Judgement:
        """Ask them one after the other until one refuses. Raises: PermissionDenied, … when the directory cannot be read."""
        chosen, skipped = await self.threads.run(self._programs)
        if skipped:
            log.warning("%s: max_verifiers = %d leaves out %d of them", self.directory, self.limit, skipped)
        said = []
        for program in chosen:
            refusal, reason = await self._ask(program, name, target)
            if refusal:
                return Judgement(False, len(chosen), f"{program.name} {refusal}" + (f": {reason}" if reason else ""), skipped)
            said.append(f"{program.name} => {reason}")
        return Judgement(True, len(chosen), ", ".join(said), skipped)

    def _programs(self) -> tuple[list[Path], int]:
        try:
            names = sorted(os.listdir(self.directory))
        except FileNotFoundError:
            return [], 0
        except OSError as error:
            raise from_os_error(error, "listing image verifiers", where=str(self.directory)) from error
        chosen = names if self.limit < 0 else names[: self.limit]
        return [self.directory / name for name in chosen], len(names) - len(chosen)

    async def _ask(self, program: Path, name: str, target: Descriptor) -> tuple[str, str]:
        """One program: (why it did not agree or "", what it said)."""
        argv = [str(program), "-name", name, "-digest", target.digest, "-stdin-media-type", MEDIA_TYPE]
        if not os.access(program, os.X_OK):
            return "cannot be started: it is not an executable file", ""
        with confined(f"{os.getpid()}-{next(_numbers)}") as confinement:
            try:
                child = await asyncio.create_subprocess_exec(
                    *confinement.wrap(argv),
                    stdin=asyncio.subprocess.PIPE,
                    stdout=asyncio.subprocess.PIPE,
                    stderr=asyncio.subprocess.PIPE,
                    start_new_session=True,
                )
            except OSError as error:
                return f"cannot be started: {error.strerror}", ""
            try:
                async with time_limit(self.timeout_s):
                    status, reason = await _converse(child, json.dumps(target.to_json()).encode())
            except TimeoutError:
                return f"gave no answer within {self.timeout_s:g} s", ""
            finally:
                # Also when it has ended: what it left behind goes with it.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
                await child.wait()
        return ("" if status == 0 else f"refused it (exit code {status})", printable(reason.strip(), _SHOWN))


async def _converse(child: asyncio.subprocess.Process, given: bytes) -> tuple[int, str]:
    assert child.stdin is not None
    assert child.stdout is not None
    assert child.stderr is not None
    _, stdout, stderr = await asyncio.gather(_give(child.stdin, given), _take(child.stdout), _take(child.stderr))
    for line in stderr.decode("utf-8", "replace").splitlines():
        log.debug("image verifier: %s", printable(line))
    return await child.wait(), stdout.decode("utf-8", "replace")


async def _give(stdin: asyncio.StreamWriter, data: bytes) -> None:
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it need not read
        stdin.write(data)
        await stdin.drain()
    stdin.close()


async def _take(stream: asyncio.StreamReader) -> bytes:
    kept = b""
    while data := await stream.read(MAX_OUTPUT):
        kept += data[: MAX_OUTPUT - len(kept)]
    return kept
