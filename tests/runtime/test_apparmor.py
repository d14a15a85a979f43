"""The default AppArmor profile compiles; whether it confines can be seen only where the kernel has AppArmor."""

from __future__ import annotations

import asyncio
import dataclasses
import shutil
import subprocess
from pathlib import Path

import pytest

from imgsvc.base.errors import FailedPrecondition
from imgsvc.runtime import host
from imgsvc.runtime.model import LinuxContainerSecurityContext, ProfileType, SecurityProfile
from imgsvc.runtime.settings import RuntimeSettings
from imgsvc.runtime.spec import security
from imgsvc.runtime.spec.apparmor import PROFILE, load_default

SETTINGS = RuntimeSettings(Path("/s"), Path("/r"))


def test_the_profile_compiles() -> None:
    if not shutil.which("apparmor_parser"):
        pytest.skip("apparmor_parser is not installed")
    done = subprocess.run(["apparmor_parser", "--skip-kernel-load", "--skip-cache"], input=PROFILE, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr


def test_without_apparmor_there_is_no_profile_and_a_named_one_is_refused() -> None:
    facts = dataclasses.replace(host.look(), apparmor=False)
    assert asyncio.run(load_default(facts)) == ""
    assert security.apparmor(LinuxContainerSecurityContext(), facts, SETTINGS) == ""
    named = LinuxContainerSecurityContext(apparmor=SecurityProfile(ProfileType.Localhost, "mine"))
    with pytest.raises(FailedPrecondition):
        security.apparmor(named, facts, SETTINGS)


def test_with_apparmor_the_default_is_used_unless_something_else_is_asked_for() -> None:
    facts = dataclasses.replace(host.look(), apparmor=True, apparmor_profile="imgsvc-default")
    assert security.apparmor(LinuxContainerSecurityContext(), facts, SETTINGS) == "imgsvc-default"
    open_ = LinuxContainerSecurityContext(apparmor=SecurityProfile(ProfileType.Unconfined))
    assert security.apparmor(open_, facts, SETTINGS) == ""
    assert security.apparmor(LinuxContainerSecurityContext(privileged=True), facts, SETTINGS) == ""
