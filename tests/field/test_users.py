"""Users: what ImageStatus tells and what the process runs with are one reading of the same text."""

from __future__ import annotations

from pathlib import Path

import pytest

from imgsvc.base.errors import InvalidArgument
from imgsvc.base.numerals import whole_number
from imgsvc.runtime.model import LinuxContainerSecurityContext as Security
from imgsvc.runtime.model import User
from imgsvc.runtime.signals import stop_signal_name
from imgsvc.runtime.spec.users import MAX_SHOWN, announced_user, resolve_user

ZEROS = "0" * 24
LONG = "9" * 5000  # more digits than int() takes


def write_database(rootfs: Path, passwd: str = "", group: str = "") -> None:
    (rootfs / "etc").mkdir()
    (rootfs / "etc/passwd").write_text(passwd)
    (rootfs / "etc/group").write_text(group)


@pytest.mark.parametrize("user", [ZEROS + "1000", f"{ZEROS}1000:{ZEROS}7", "0" * 6000 + "1000", "1000"])
def test_S1_a_user_of_many_zeros_is_one_number(tmp_path: Path, user: str) -> None:
    made = resolve_user(Security(), user, tmp_path)
    assert announced_user(user) == (1000, "") == (made.uid, "")
    assert made.gid == (7 if ":" in user else 0)
    by_name = Security(run_as_username=user.partition(":")[0])
    assert resolve_user(by_name, "", tmp_path).uid == 1000


def test_S1_a_passwd_line_of_many_zeros_is_one_number(tmp_path: Path) -> None:
    write_database(tmp_path, f"ann:x:{ZEROS}1000:{ZEROS}1001::/:/bin/sh\n", f"wheel:x:{ZEROS}10:ann\n")
    assert resolve_user(Security(), "ann", tmp_path) == User(1000, 1001, (10, 1001))
    assert resolve_user(Security(), "ann:wheel", tmp_path).gid == 10


@pytest.mark.parametrize("number", ["2147483648", "4294967296", LONG, ZEROS + "4294967296", "٣", "-1", "+0"])
def test_S1_a_number_out_of_range_is_no_uid_and_is_refused_at_use(tmp_path: Path, number: str) -> None:
    write_database(tmp_path, f"ann:x:{number}:0::/:/bin/sh\nbob:x:5:{number}::/:/bin/sh\n", f"wheel:x:{number}:\n")
    assert announced_user(number) == (None, number if len(number) <= MAX_SHOWN else number[:MAX_SHOWN] + "…")
    for user in (number, f"0:{number}"):
        with pytest.raises(InvalidArgument):
            resolve_user(Security(), user, tmp_path)
    with pytest.raises(InvalidArgument):
        resolve_user(Security(run_as_username=number), "", tmp_path)


@pytest.mark.parametrize("number", ["2147483648", LONG, ZEROS + "4294967296"])
def test_S1_a_database_entry_out_of_range_is_refused_at_use(tmp_path: Path, number: str) -> None:
    write_database(tmp_path, f"ann:x:{number}:0::/:/bin/sh\nbob:x:5:{number}::/:/bin/sh\n", f"wheel:x:{number}:\n")
    for user in ("ann", "bob", "5", "0:wheel"):
        with pytest.raises(InvalidArgument):
            resolve_user(Security(), user, tmp_path)


def test_S1_no_number_is_cut_before_it_is_read() -> None:
    assert whole_number(ZEROS + "42", 100) == 42
    assert whole_number("101", 100) == whole_number(LONG, 100) == 101
    assert [whole_number(text, 9) for text in ("", " 1", "1_0", "٣", "-1", "1e1")] == [None] * 6
    assert stop_signal_name(0, LONG) == stop_signal_name(0, "٣") == "SIGTERM"
    assert stop_signal_name(0, ZEROS + "9") == "9"
