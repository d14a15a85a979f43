"""Users and groups from hostile images (users.py)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from imgsvc.base.errors import ImgsvcError, InvalidArgument, NotFound, ResourceExhausted
from imgsvc.runtime.model import LinuxContainerSecurityContext as Security
from imgsvc.runtime.model import SupplementalGroupsPolicy, User
from imgsvc.runtime.spec.users import MAX_FILE, read_database, resolve_user, split_image_user

PASSWD = "root:x:0:0::/root:/bin/sh\nann:x:1000:1001::/:/bin/sh\n99999999999:x:0:0::/:\nbig:x:4294967296:0::/:\nbroken\nx:y\n"
GROUP = "root:x:0:\nann:x:1001:\nwheel:x:10:bob,ann\ngames:x:20:ann\nhuge:x:99999999999999:\n"


@pytest.fixture
def rootfs(tmp_path: Path) -> Path:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/passwd").write_text(PASSWD)
    (tmp_path / "etc/group").write_text(GROUP)
    return tmp_path


@pytest.mark.parametrize("user", ["4294967296", "2147483648:2147483648", "-1", "99999999999", "1e3", " 0", "0:-1", "+1", "ann:1e3", "a b"])
def test_c_c1_users_out_of_range_are_errors_not_names(rootfs: Path, user: str) -> None:
    with pytest.raises(InvalidArgument):
        resolve_user(Security(), user, rootfs)
    with pytest.raises(InvalidArgument):
        split_image_user(user)


def test_c_c1_a_passwd_entry_out_of_range_is_an_error(rootfs: Path) -> None:
    with pytest.raises(InvalidArgument):
        resolve_user(Security(), "big", rootfs)
    with pytest.raises(InvalidArgument):
        resolve_user(Security(), "ann:huge", rootfs)


def test_c_c2_a_sparse_file_of_ten_gigabytes_is_refused(rootfs: Path) -> None:
    os.truncate(rootfs / "etc/passwd", 10 * 1024**3)
    with pytest.raises(ResourceExhausted):
        resolve_user(Security(), "ann", rootfs)


@pytest.mark.parametrize("kind", ["fifo", "device", "directory", "kcore"])
def test_c_c2_what_is_not_a_regular_file_is_refused_without_hanging(rootfs: Path, kind: str) -> None:
    path = rootfs / "etc/passwd"
    path.unlink()
    match kind:
        case "fifo":
            os.mkfifo(path)
        case "device":
            if os.geteuid():
                pytest.skip("needs root")
            os.mknod(path, 0o20666, os.makedev(1, 5))
        case "directory":
            path.mkdir()
        case "kcore":
            path.symlink_to("/proc/kcore")
    if kind == "kcore":
        assert read_database(rootfs, "/etc/passwd") == []  # /proc of the image, which is empty
    else:
        with pytest.raises(InvalidArgument):
            read_database(rootfs, "/etc/passwd")


def test_c_c2_an_absolute_symlink_is_resolved_inside_the_root(rootfs: Path) -> None:
    (rootfs / "nix/store").mkdir(parents=True)
    (rootfs / "etc/passwd").rename(rootfs / "nix/store/passwd")
    (rootfs / "etc/passwd").symlink_to("/nix/store/passwd")
    assert resolve_user(Security(), "ann", rootfs).uid == 1000


def test_c_c2_a_symlink_cannot_leave_the_root(rootfs: Path) -> None:
    (rootfs / "etc/passwd").unlink()
    (rootfs / "etc/passwd").symlink_to("../../../../../../etc/hostname")
    assert read_database(rootfs, "/etc/passwd") == []


def test_c_c2_the_limit_holds_to_the_byte(rootfs: Path) -> None:
    line = b"u:x:5:5::/:\n"
    (rootfs / "etc/passwd").write_bytes(b"#" * (MAX_FILE - len(line) - 1) + b"\n" + line)
    assert resolve_user(Security(), "u", rootfs).uid == 5
    with (rootfs / "etc/passwd").open("ab") as stream:
        stream.write(b"#")
    with pytest.raises(ResourceExhausted):
        resolve_user(Security(), "u", rootfs)


STRICT = SupplementalGroupsPolicy.Strict


@pytest.mark.parametrize(
    "security, image, expected",
    [
        (Security(), "", User(0, 0, (0,))),
        (Security(), "ann", User(1000, 1001, (10, 20, 1001))),
        (Security(), "1000", User(1000, 1001, (10, 20, 1001))),
        (Security(), "1000:5", User(1000, 5, (5, 10, 20))),
        (Security(), "ann:wheel", User(1000, 10, (10, 20))),
        (Security(), "7", User(7, 0, (0,))),
        (Security(run_as_user=1000), "", User(1000, 1001, (10, 20, 1001))),
        (Security(run_as_user=1000, run_as_group=3), "root", User(1000, 3, (3, 10, 20))),
        (Security(run_as_user=1000, run_as_group=3, supplemental_groups=(77,)), "", User(1000, 3, (3, 10, 20, 77))),
        (Security(run_as_user=1000, supplemental_groups=(77,), supplemental_groups_policy=STRICT), "", User(1000, 1001, (77, 1001))),
        (Security(supplemental_groups_policy=STRICT), "ann", User(1000, 1001, (1001,))),
        (Security(run_as_username="ann"), "root", User(1000, 1001, (10, 20, 1001))),
        (Security(run_as_username="ann", run_as_group=4), "", User(1000, 4, (4, 10, 20))),
    ],
)
def test_c_c11_groups(rootfs: Path, security: Security, image: str, expected: User) -> None:
    assert resolve_user(security, image, rootfs) == expected


def test_c_c11_a_group_needs_a_user(rootfs: Path) -> None:
    with pytest.raises(InvalidArgument):
        resolve_user(Security(run_as_group=1), "", rootfs)


def test_unknown_names_are_not_found(rootfs: Path) -> None:
    for user in ("nobody", "ann:nogroup"):
        with pytest.raises(NotFound):
            resolve_user(Security(), user, rootfs)


def test_an_image_without_passwd_has_numbers_only(tmp_path: Path) -> None:
    assert resolve_user(Security(), "12:13", tmp_path) == User(12, 13, (13,))
    with pytest.raises(ImgsvcError):
        resolve_user(Security(), "ann", tmp_path)
