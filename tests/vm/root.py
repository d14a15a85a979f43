"""The root file system of the machine: Debian by debootstrap, imgsvc's dependencies in a virtual environment, our agent.

Built once per content of its recipe and kept in $XDG_CACHE_HOME/imgsvc-vm; disk.py adds what changes more often. Needs root,
for chroot and owners.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Final

from scripts.lock import pins

PROJECT: Final = Path(__file__).resolve().parents[2]
HERE: Final = Path(__file__).resolve().parent
LOCKS: Final = (PROJECT / "requirements-lock.txt", PROJECT / "requirements-lock-test.txt")
SUITE: Final = "bookworm"
PACKAGES: Final = (
    *("linux-image-cloud-amd64", "initramfs-tools", "kmod", "udev", "systemd", "systemd-sysv", "dbus", "procps", "e2fsprogs"),
    *("runc", "crun", "conmon", "containernetworking-plugins", "iptables", "iproute2", "apparmor", "ca-certificates"),
    *("python3", "python3-venv", "busybox-static", "docker-registry"),
)
TEST_PACKAGES: Final = ("pytest", "pytest-timeout", "httpx")  # what the tests inside need besides imgsvc
BUILD_TIMEOUT: Final = 1800.0  # [seconds]; it took most of that with twenty others at work on two cores
STEP_TIMEOUT: Final = 600.0  # [seconds]
_KEPT: Final = 2  # roots: one more than this checkout's, for somebody who goes between two branches
_NAME_LENGTH: Final = 16

_FILES: Final = {
    "etc/hostname": "vm\n",
    "etc/hosts": "127.0.0.1 localhost vm\n",
    # Nothing reaches the disk before somebody asks for it: a power cut then takes everything that was not synced.
    "etc/fstab": "/dev/vda / ext4 defaults,commit=1000 0 0\n",
    "etc/sysctl.d/90-late.conf": "vm.dirty_writeback_centisecs=0\nvm.dirty_expire_centisecs=360000\n",
    "etc/initramfs-tools/conf.d/small": "MODULES=list\nCOMPRESS=gzip\n",
    "etc/initramfs-tools/modules": "virtio_pci\nvirtio_blk\n",
    "etc/docker/registry/config.yml": "version: 0.1\nlog: {level: error, accesslog: {disabled: true}}\n"
    "storage: {filesystem: {rootdirectory: /var/lib/docker-registry}}\nhttp: {addr: 127.0.0.1:5000}\n",
    "etc/systemd/system/vm-agent.service": "[Unit]\nDescription=Agent of the test's host\n[Service]\n"
    "ExecStart=/usr/bin/python3 -I -S /usr/local/lib/vm-agent.py\nRestart=always\n[Install]\nWantedBy=multi-user.target\n",
    "etc/systemd/journald.conf.d/vm.conf": "[Journal]\nStorage=persistent\n",
}
_UNWANTED: Final = (  # every second of it is ten when emulated
    *("apt-daily.timer", "apt-daily-upgrade.timer", "dpkg-db-backup.timer", "e2scrub_all.timer", "e2scrub_reap.service", "fstrim.timer"),
    *("systemd-timesyncd.service", "systemd-logind.service", "systemd-binfmt.service", "systemd-random-seed.service", "man-db.timer"),
    *("getty@tty1.service", "apparmor.service", *(f"modprobe@{name}.service" for name in ("drm", "efi_pstore", "dm_mod", "loop"))),
)


def missing() -> str:
    """Why no machine can be built and run here; "" when one can."""
    absent = [p for p in ("qemu-system-x86_64", "qemu-img", "debootstrap", "mkfs.ext4", "docker-registry") if not _which(p)]
    if os.geteuid() != 0:
        return "building a root file system needs root"
    if os.uname().machine != "x86_64":
        return "the machine is an x86_64"
    if absent:
        return f"not installed: {', '.join(absent)}"
    return "" if mirror() else "apt names no http mirror of Debian"


def _which(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def mirror() -> str:
    """The Debian mirror this machine itself uses; "" when it is no Debian."""
    directory = Path("/etc/apt/sources.list.d")
    for source in sorted(directory.glob("*.sources")) if directory.is_dir() else ():
        if found := re.search(r"^URIs:\s*(https?://\S+)", source.read_text(), re.MULTILINE):
            return found[1]
    try:
        found = re.search(r"^deb (?:\[.*\] )?(https?://\S+)", Path("/etc/apt/sources.list").read_text(), re.MULTILINE)
    except OSError:
        return ""
    return found[1] if found else ""


def copy_root(to: Path) -> None:
    """Copy the root file system; it is built when there is none of this recipe, which takes minutes. Raises: AssertionError."""
    place = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "imgsvc-vm"
    place.mkdir(parents=True, exist_ok=True)
    with (place / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        root = place / _recipe()
        if not root.is_dir():
            for old in sorted(place.glob("?" * _NAME_LENGTH), key=lambda path: path.stat().st_mtime)[: 1 - _KEPT]:
                shutil.rmtree(old)
            scratch = place / "new"
            shutil.rmtree(scratch, ignore_errors=True)
            _build(scratch)
            scratch.rename(root)
        os.utime(root)
        run(["cp", "-a", str(root), str(to)])


def _recipe() -> str:
    """Names everything that goes into the cached part."""
    digest = hashlib.sha256("\n".join(_requirements()).encode())
    for file in (Path(__file__), HERE / "agent.py", *LOCKS):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:_NAME_LENGTH]


def _requirements() -> list[str]:
    """The Python packages in the machine, imgsvc itself apart."""
    wanted = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["dependencies"]
    return [*wanted, *TEST_PACKAGES]


def _build(root: Path) -> None:
    # A mount namespace of its own: what debootstrap mounts below the root is gone with it, even when it is killed.
    command = ["unshare", "--mount", "debootstrap", "--variant=minbase", f"--include={','.join(PACKAGES)}", SUITE, str(root), mirror()]
    run(command, timeout=BUILD_TIMEOUT)
    for name, text in _FILES.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    shutil.copy(HERE / "agent.py", root / "usr/local/lib/vm-agent.py")
    run_in(root, "passwd", "--delete", "root")
    run_in(root, "update-initramfs", "-u")
    run_in(root, "systemctl", "enable", "vm-agent", "docker-registry")
    run_in(root, "systemctl", "mask", *_UNWANTED)
    _dependencies(root)
    for waste in ("var/cache/apt", "var/lib/apt/lists", "usr/share/doc", "usr/share/locale", "usr/share/man"):
        shutil.rmtree(root / waste, ignore_errors=True)


def _dependencies(root: Path) -> None:
    """The virtual environment /opt/imgsvc with all but imgsvc, in the versions of the lock."""
    wanted = _requirements()
    with tempfile.TemporaryDirectory() as scratch:
        kinds = ["--python-version=3.11", "--platform=manylinux2014_x86_64", "--platform=manylinux_2_28_x86_64", "--only-binary=:all:"]
        versions = Path(scratch) / "versions"
        versions.write_text("\n".join(pin for file in LOCKS for pin in pins(file)))  # without hashes, which would want all of them
        run([sys.executable, "-m", "pip", "download", "--quiet", "--dest", scratch, *kinds, f"--constraint={versions}", *wanted])
        versions.unlink()
        shutil.copytree(scratch, root / "tmp/wheels")
    run_in(root, "python3", "-m", "venv", "/opt/imgsvc")
    names = [re.split(r"[<>=;\s]", text)[0] for text in wanted]
    run_in(root, "/opt/imgsvc/bin/pip", "install", "--quiet", "--no-index", "--find-links=/tmp/wheels", *names)
    shutil.rmtree(root / "tmp/wheels")
    (root / "usr/local/bin/imgsvc").symlink_to("/opt/imgsvc/bin/imgsvc")


def run_in(root: Path, *command: str) -> None:
    """Run a command in a root file system, as run()."""
    run(["chroot", str(root), *command])


def run(command: list[str], timeout: float = STEP_TIMEOUT) -> None:
    """Run a command. timeout [seconds]. Raises: AssertionError with what it printed."""
    # The administrator's programs also for a PATH without sbin, and no translated messages; proxies and pip's settings stay.
    environment = os.environ | {"PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin:/usr/bin:/bin", "LC_ALL": "C.UTF-8"}
    done = subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout
    )
    if done.returncode:
        raise AssertionError(f"{' '.join(command)[:200]} failed with {done.returncode}:\n{done.stdout[-3000:]}")
