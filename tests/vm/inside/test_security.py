"""AppArmor and user namespaces, on a kernel that has both."""

from __future__ import annotations

import subprocess
from pathlib import Path

import grpc
import pytest

from imgsvc.api import cri_pb2 as pb
from tests.support import cri
from tests.vm.inside.node import Node, processes, scope

PROFILE = "vm-test"  # etc/apparmor.d/vm-test
ProfileType = pb.SecurityProfile.ProfileType


def security(kind: int, profile: str = "") -> pb.LinuxContainerSecurityContext:
    return pb.LinuxContainerSecurityContext(apparmor=pb.SecurityProfile(profile_type=ProfileType.ValueType(kind), localhost_ref=profile))


@pytest.fixture
def profile() -> None:
    subprocess.run(["apparmor_parser", "--replace", f"/etc/apparmor.d/{PROFILE}"], check=True, timeout=60)


@pytest.mark.parametrize("handler", ["crun", "runc"])
def test_apparmor_profiles_confine_containers(node: Node, profile: None, handler: str) -> None:
    pod = node.pod_config(f"apparmor{handler}")
    sandbox = node.run_pod(pod, handler)
    current = "cat /proc/self/attr/current; "
    default = node.output(sandbox, pod, current + "true", "default", security_context=security(ProfileType.RuntimeDefault))
    assert default == ["imgsvc-default (enforce)"]
    local = security(ProfileType.Localhost, PROFILE)
    confined = node.output(
        sandbox, pod, current + "echo a > /tmp/allowed && echo a 2>&1 > /tmp/denied || echo no", "l", security_context=local
    )
    assert confined[0] == f"{PROFILE} (enforce)"
    assert confined[-1] == "no"
    free = node.output(
        sandbox, pod, current + "echo a > /tmp/denied && echo yes", "free", security_context=security(ProfileType.Unconfined)
    )
    assert free == ["unconfined", "yes"]


def test_a_container_with_a_profile_that_is_not_loaded_does_not_start_without_it(node: Node) -> None:
    pod = node.pod_config("missing")
    sandbox = node.run_pod(pod)
    missing = security(ProfileType.Localhost, "nowhere-loaded")
    code, text = cri.refusal(lambda: node.run(sandbox, pod, "echo ran", security_context=missing))
    assert "nowhere-loaded" in text
    assert code in (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND)


@pytest.mark.parametrize("handler", ["crun", "runc"])
def test_root_in_a_pod_with_a_user_namespace_is_nobody_outside(node: Node, handler: str) -> None:
    mapping = [pb.IDMapping(host_id=1_000_000, container_id=0, length=65536)]
    users = pb.UserNamespace(mode=pb.NamespaceMode.POD, uids=mapping, gids=mapping)
    options = pb.NamespaceOption(userns_options=users, pid=pb.NamespaceMode.CONTAINER)
    pod = node.pod_config(f"users{handler}", namespace_options=options)
    sandbox = node.run_pod(pod, handler)
    context = pb.LinuxContainerSecurityContext(namespace_options=options)
    script = "id -u; stat -c %u /bin/busybox; touch /mine && stat -c %u /mine; echo $$ > /pid; exec sleep 600"
    container = node.run(sandbox, pod, script, security_context=context)
    pid = processes(scope(f"users{handler}", container))[0]
    assert Path(f"/proc/{pid}/uid_map").read_text().split() == ["0", "1000000", "65536"]
    cri.stop(node.runtime, container)
    assert node.lines(container) == ["0", "0", "0"]
