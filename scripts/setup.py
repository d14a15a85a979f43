"""Set up this checkout: `python3 scripts/setup.py run|test`. Quick and silent when nothing is missing.

Needs only python3. Makes .venv with imgsvc in it; as root on Debian also installs the packages of debian-packages.txt.
Without root, or where there is no apt, it says which are missing and what that switches off, and goes on.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
LOCKS = {"run": [ROOT / "requirements-lock.txt"], "test": [ROOT / "requirements-lock.txt", ROOT / "requirements-lock-test.txt"]}
PACKAGES = ROOT / "debian-packages.txt"
POLICY = Path("/usr/sbin/policy-rc.d")
OLDEST = (3, 11)
# Package: the service it would start at boot.
SERVICES = {"containerd": "containerd", "docker-registry": "docker-registry", "nginx-light": "nginx"}


def say(text: str) -> None:
    """One line to the person at the terminal."""
    print(f"imgsvc setup: {text}", file=sys.stderr, flush=True)


def fail(text: str) -> NoReturn:
    """Stop with one line."""
    say(text)
    sys.exit(1)


def wanted_packages(room: str) -> dict[str, str]:
    """Debian packages of a room and what is off without each; "test" includes "run"."""
    rows = [line.split(None, 2) for line in PACKAGES.read_text().splitlines() if line and not line.startswith("#")]
    return {package: effect for row_room, package, effect in rows if room == "test" or row_room == "run"}


def missing_packages(room: str) -> dict[str, str]:
    """The wanted packages that are not installed; empty where this is not Debian."""
    wanted = wanted_packages(room)
    if not shutil.which("dpkg-query"):
        return {}
    query = ["dpkg-query", "--show", "--showformat=${Package} ${db:Status-Status}\n", *wanted]
    shown = subprocess.run(query, capture_output=True, text=True).stdout
    installed = {line.split()[0] for line in shown.splitlines() if line.endswith(" installed")}
    return {package: effect for package, effect in wanted.items() if package not in installed}


@contextmanager
def no_service_starts() -> Iterator[None]:
    """Packages installed inside do not start their daemons: Debian asks this file before it starts anything."""
    if POLICY.exists():
        yield
        return
    POLICY.write_text("#!/bin/sh\nexit 101\n")
    POLICY.chmod(0o755)
    try:
        yield
    finally:
        POLICY.unlink()


def apt_get(*arguments: str) -> bool:
    """Run apt-get without questions; on failure show why."""
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    done = subprocess.run(
        ["apt-get", "-qq", *arguments],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        say(f"apt-get {arguments[0]} failed:\n{done.stdout[-2000:].rstrip()}")
    return done.returncode == 0


def install_packages(packages: list[str]) -> None:
    """As root: install Debian packages without starting any service, now or at boot."""
    say(f"installing Debian packages: {' '.join(packages)}")
    apt_get("update")
    with no_service_starts():
        if not apt_get("install", "--yes", "--no-install-recommends", *packages):
            return
    for package in packages:
        if package in SERVICES:
            subprocess.run(["update-rc.d", SERVICES[package], "disable"], capture_output=True)


def set_up_debian(room: str) -> None:
    """Install what is missing, or say what stays off."""
    if not shutil.which("dpkg-query"):
        absent = [p for p in ("runc", "crun", "conmon") if not shutil.which(p)]
        if absent:
            say(f"this is not Debian; install {', '.join(absent)} and the CNI plugins yourself, containers do not run without them")
        return
    missing = missing_packages(room)
    if missing and os.geteuid() == 0 and shutil.which("apt-get"):
        install_packages(list(missing))
        missing = missing_packages(room)
    for package, effect in missing.items():
        say(f"without the Debian package {package}: {effect}")
    if missing:
        say(f"as root, this installs them: apt-get install {' '.join(missing)}")


def fingerprint(room: str) -> str:
    """Changes when the environment would come out differently."""
    digest = hashlib.sha256(f"{room} {ROOT} {sys.version}".encode())
    for file in (ROOT / "pyproject.toml", *LOCKS[room]):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def create_venv() -> None:
    """Make .venv with pip in it. Debian keeps pip out of python3; without python3-venv it comes out of its package, unpacked."""
    say(f"creating {VENV}")
    made = subprocess.run([sys.executable, "-m", "venv", "--clear", str(VENV)], capture_output=True, text=True)
    if made.returncode == 0:
        return
    with tempfile.TemporaryDirectory() as scratch:
        wheel = pip_wheel(Path(scratch)) if shutil.which("apt-get") and shutil.which("dpkg-deb") else None
        if wheel is None:
            shutil.rmtree(VENV, ignore_errors=True)
            fail(f"no virtual environment, install Debian's python3-venv: {(made.stdout + made.stderr).strip()[-600:]}")
        subprocess.run([sys.executable, "-m", "venv", "--clear", "--without-pip", str(VENV)], check=True)
        subprocess.run([str(PYTHON), f"{wheel}/pip", "install", "--quiet", "--no-index", str(wheel)], check=True)


def pip_wheel(scratch: Path) -> Path | None:
    """Debian's pip, downloaded and unpacked into `scratch` with apt's own checks, which needs no root; None when that fails."""
    own_lists = [f"-oDir::State={scratch}/state", f"-oDir::Cache={scratch}/cache"]
    (scratch / "state" / "lists" / "partial").mkdir(parents=True)
    # First with the machine's package lists; where it has none, with lists of our own.
    for arguments in (["download"], [*own_lists, "update"], [*own_lists, "download"]):
        wanted = ["python3-pip-whl"] if arguments[-1] == "download" else []
        subprocess.run(["apt-get", "-qq", *arguments, *wanted], cwd=scratch, capture_output=True)
        for package in scratch.glob("*.deb"):
            subprocess.run(["dpkg-deb", "--extract", str(package), str(scratch)], check=True)
            return next(scratch.glob("usr/share/python-wheels/pip-*.whl"), None)
    return None


def set_up_venv(room: str) -> None:
    """Make .venv and put imgsvc into it, editable; nothing to do when the stamp of an earlier run still fits."""
    stamps = {name: VENV / f".imgsvc-{name}" for name in ("run", "test")}
    # An environment made for tests also runs.
    if any(s.exists() and s.read_text() == fingerprint(name) for name, s in stamps.items() if name in (room, "test")):
        return
    if not PYTHON.exists():
        create_venv()
    say("installing imgsvc and its Python packages into .venv")
    pip = [str(PYTHON), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    locked = [f"--requirement={file}" for file in LOCKS[room]]
    # The lock files have everything, what builds imgsvc too; so its own installation fetches nothing.
    for arguments in (["--require-hashes", *locked], ["--no-index", "--no-build-isolation", "--editable", str(ROOT)]):
        if subprocess.run([*pip, *arguments]).returncode:
            fail("pip could not install the Python packages, see above; with the network back, run the same command again")
    stamps[room].write_text(fingerprint(room))


def main() -> None:
    """Command line: one argument, the room."""
    if len(sys.argv) != 2 or sys.argv[1] not in ("run", "test"):
        sys.exit("usage: setup.py run|test")
    if sys.version_info < OLDEST:
        fail(f"Python {sys.version.split()[0]} is too old; 3.11 or newer is needed (make PYTHON=python3.11 …)")
    set_up_debian(sys.argv[1])
    set_up_venv(sys.argv[1])


if __name__ == "__main__":
    main()
