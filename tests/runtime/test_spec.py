"""The OCI specification and what goes into it: pure parts (spec.py, security.py, validate.py, volumes.py)."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest

from imgsvc.base.errors import FailedPrecondition, ImgsvcError, InvalidArgument, NotFound
from imgsvc.base.oci import ImageConfig, Platform
from imgsvc.runtime.host import CAPABILITIES, Host
from imgsvc.runtime.model import (
    Capability,
    ContainerConfig,
    ContainerMetadata,
    DNSConfig,
    HugepageLimit,
    IDMapping,
    KeyValue,
    LinuxContainerConfig,
    LinuxContainerResources,
    LinuxContainerSecurityContext,
    LinuxPodSandboxConfig,
    LinuxSandboxSecurityContext,
    Mount,
    NamespaceMode,
    NamespaceOption,
    PodSandboxConfig,
    PodSandboxMetadata,
    ProfileType,
    Propagation,
    SecurityProfile,
    User,
    UserNamespace,
)
from imgsvc.runtime.settings import RuntimeSettings
from imgsvc.runtime.spec import build as spec
from imgsvc.runtime.spec import security, validate, volumes
from imgsvc.runtime.spec.seccomp import default_profile

ALL = frozenset(CAPABILITIES)
HOST = Host(False, frozenset({"cpu", "memory", "pids"}), True, ALL - {"CAP_SYS_RESOURCE"}, -1000, False, False, True)
IMAGE = ImageConfig(
    Platform.host(), (), env=("PATH=/image", "A=1", "=bad", "bad"), entrypoint=("/entry",), cmd=("c1", "c2"), working_dir="/work"
)
SETTINGS = RuntimeSettings(Path("/s"), Path("/r"))


def pod(**changes: object) -> PodSandboxConfig:
    base = PodSandboxConfig(metadata=PodSandboxMetadata("pod", "uid", "ns"), hostname="host")
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


def container(**changes: object) -> ContainerConfig:
    return dataclasses.replace(ContainerConfig(metadata=ContainerMetadata("c")), **changes)  # type: ignore[arg-type]


def plan(**changes: object) -> spec.ContainerPlan:
    base = spec.ContainerPlan(
        container_id="id",
        sandbox_id="sid",
        config=container(),
        pod=pod(),
        image=IMAGE,
        image_name="docker.io/library/x:1",
        handler="default",
        user=User(1000, 1000, (1000,)),
        host=HOST,
        rootfs=Path("/b/rootfs"),
        cwd="/work",
        namespaces={"mount": "", "pid": "", "network": "/n", "ipc": "/i", "uts": "/u"},
        user_namespace=None,
        cgroups_path="/pods/x",
        shm="/shm",
        files={"/etc/hosts": "/f/hosts"},
        mounts=(),
        devices=(),
        all_devices=False,
        granted=security.DEFAULT_CAPABILITIES,
        ambient=frozenset(),
        profile=None,
        apparmor="",
        selinux="",
        file_label="",
        hidden={},
        root_propagation="rslave",
    )
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "command, args, expected",
    [
        ((), (), ["/entry", "c1", "c2"]),
        ((), ("a",), ["/entry", "a"]),
        (("x",), (), ["x"]),
        (("x",), ("a",), ["x", "a"]),
    ],
)
def test_command_line(command: tuple[str, ...], args: tuple[str, ...], expected: list[str]) -> None:
    assert spec.command_line(container(command=command, args=args), IMAGE) == expected


def test_nothing_to_run_is_an_error() -> None:
    with pytest.raises(InvalidArgument):
        spec.command_line(container(), ImageConfig(Platform.host(), ()))


def test_environment_of_the_pod_wins() -> None:
    made = spec.environment((KeyValue("A", b"2"), KeyValue("B", b"\xff")), IMAGE)
    assert made == ["PATH=/image", "A=2", "B=\udcff"]


def test_c_c14_every_container_gets_an_environment_of_its_own() -> None:
    image_env = list(IMAGE.env)
    first = spec.build(plan(config=container(envs=(KeyValue("SECRET", b"one"),))))
    second = spec.build(plan(config=container()))
    assert "SECRET=one" in first["process"]["env"]
    assert not any("SECRET" in text for text in second["process"]["env"])
    assert list(IMAGE.env) == image_env


@pytest.mark.parametrize("path", ["/proc/self/fd/7", "/proc/1/fd/3/../..", "/proc/../etc", "/./proc/self/fd/8"])
def test_c_c17_a_working_directory_behind_a_descriptor_is_refused(path: str) -> None:
    with pytest.raises(InvalidArgument):
        spec.working_dir(container(working_dir=path), IMAGE)


def test_c_c12_inheritable_capabilities_are_empty() -> None:
    made = spec.build(plan())["process"]["capabilities"]
    assert made.get("inheritable", []) == []
    assert made["effective"] == sorted(security.DEFAULT_CAPABILITIES)


def test_capabilities() -> None:
    def made(add: tuple[str, ...] = (), drop: tuple[str, ...] = (), *, privileged: bool = False) -> frozenset[str]:
        return security.capability_set(Capability(add, drop), privileged=privileged, host=HOST)

    assert made() == security.DEFAULT_CAPABILITIES
    assert made(("NET_ADMIN",)) == security.DEFAULT_CAPABILITIES | {"CAP_NET_ADMIN"}
    assert made((), ("ALL",)) == frozenset()
    assert made(("cap_chown",), ("ALL",)) == {"CAP_CHOWN"}
    assert made(("ALL",), ("CHOWN",)) == HOST.capabilities - {"CAP_CHOWN"}
    assert made(privileged=True) == HOST.capabilities
    with pytest.raises(InvalidArgument):
        made(("NO_SUCH",))
    with pytest.raises(FailedPrecondition):
        made(("SYS_RESOURCE",))


def test_c_c16_hidden_paths_are_always_hidden() -> None:
    asked = LinuxContainerSecurityContext(masked_paths=("/proc/kcore", "/proc/keys"), readonly_paths=("/proc/sys",))
    made = security.hidden_paths(asked, SETTINGS, user_namespace=False)
    assert {"/proc/kcore", "/proc/keys", "/sys/devices/virtual/powercap"} <= set(made["maskedPaths"])
    assert made["readonlyPaths"] == ["/proc/sys"]
    assert security.hidden_paths(LinuxContainerSecurityContext(privileged=True), SETTINGS, user_namespace=False) == {}
    forgotten = security.hidden_paths(LinuxContainerSecurityContext(), SETTINGS, user_namespace=False)
    assert {"/proc/kcore", "/proc/keys", "/proc/acpi", "/proc/timer_list"} <= set(forgotten["maskedPaths"])
    assert "/proc/sys" in forgotten["readonlyPaths"]
    unmasked = security.hidden_paths(LinuxContainerSecurityContext(), SETTINGS, user_namespace=True)
    assert unmasked == {"maskedPaths": list(security.ALWAYS_MASKED), "readonlyPaths": []}


def test_c_c18_the_default_profile_allows_no_crypto_sockets() -> None:
    profile = default_profile(security.DEFAULT_CAPABILITIES)
    rules = [r for r in profile["syscalls"] if "socket" in r["names"]]
    assert profile["defaultAction"] == "SCMP_ACT_ERRNO"
    assert rules
    assert all("args" in r for r in rules)

    def allowed(family: int) -> bool:
        tests = {"SCMP_CMP_LT": int.__lt__, "SCMP_CMP_EQ": int.__eq__, "SCMP_CMP_GT": int.__gt__}
        return any(all(tests[a["op"]](family, a["value"]) for a in r["args"]) for r in rules)

    assert [f for f in range(50) if not allowed(f)] == [38, 40]


def test_the_default_profile_opens_with_capabilities_only() -> None:
    def names(capabilities: frozenset[str]) -> set[str]:
        rules = default_profile(capabilities)["syscalls"]
        return {n for r in rules if r["action"] == "SCMP_ACT_ALLOW" and not r.get("args") for n in r["names"]}

    assert not {"mount", "unshare", "init_module", "bpf", "clone3", "keyctl", "io_uring_setup"} & names(security.DEFAULT_CAPABILITIES)
    assert {"mount", "unshare", "bpf", "clone"} <= names(frozenset({"CAP_SYS_ADMIN"}))


@pytest.mark.parametrize("reference", ["", "relative.json", "../x.json", "/a/../b.json", "/a//b.json", "/no/such/profile.json"])
def test_c_c25_a_localhost_profile_is_never_unconfined(reference: str) -> None:
    asked = LinuxContainerSecurityContext(seccomp=SecurityProfile(ProfileType.Localhost, reference))
    with pytest.raises((InvalidArgument, NotFound)):
        security.seccomp(asked, frozenset(), HOST, SETTINGS)


def test_c_c25_a_profile_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text("{}")
    with pytest.raises(InvalidArgument):
        security.load_profile(str(tmp_path / "p.json"))
    (tmp_path / "p.json").write_text(json.dumps({"defaultAction": "SCMP_ACT_ALLOW", "listenerPath": "/evil"}))
    assert security.load_profile(str(tmp_path / "p.json")) == {"defaultAction": "SCMP_ACT_ALLOW"}


@pytest.mark.parametrize(
    "sysctls",
    [
        {"kernel.shm_rmid_forced": "1+kernel.core_pattern=|/x"},
        {"net.ipv4.ip_forward": "1\nkernel.core_pattern=x"},
        {"net/../kernel/core_pattern": "1"},
        {"net.ipv4..x": "1"},
        {"net.ipv4.x;y": "1"},
        {"kernel.core_pattern": "1"},
        {"kernel.shm_rmid_forced+": "1"},
        {"": "1"},
    ],
)
def test_c_c20_sysctls_that_would_reach_the_node(sysctls: dict[str, str]) -> None:
    with pytest.raises(InvalidArgument):
        validate.pod(pod(linux=LinuxPodSandboxConfig(sysctls=sysctls)))


@pytest.mark.parametrize("name", ["net.ipv4.ip_forward", "kernel.shm_rmid_forced", "fs.mqueue.msg_max"])
def test_c_c20_sysctls_of_a_namespace_that_is_the_nodes(name: str) -> None:
    validate.pod(pod(linux=LinuxPodSandboxConfig(sysctls={name: "1"})))
    shared = LinuxSandboxSecurityContext(namespace_options=NamespaceOption(network=NamespaceMode.NODE, ipc=NamespaceMode.NODE))
    with pytest.raises(InvalidArgument):
        validate.pod(pod(linux=LinuxPodSandboxConfig(sysctls={name: "1"}, security_context=shared)))


@pytest.mark.parametrize("bad", ["a\nb", "a\rb", "a\0b", "a:b\n", "-x", "x" * 65, "a b"])
def test_c_c21_host_names(bad: str) -> None:
    with pytest.raises(InvalidArgument):
        validate.pod(pod(hostname=bad))


def test_c_c21_texts_that_reach_generated_files() -> None:
    for dns in (DNSConfig(servers=("1.1.1.1\nnameserver 2.2.2.2",)), DNSConfig(searches=("a\nb",)), DNSConfig(options=("a b",))):
        with pytest.raises(InvalidArgument):
            validate.pod(pod(dns_config=dns))
    for labels in ({"a\nb": "1"}, {"a": "x\0"}):
        with pytest.raises(InvalidArgument):
            validate.pod(pod(labels=labels))
        with pytest.raises(InvalidArgument):
            validate.container(container(annotations=labels))
    user = LinuxContainerSecurityContext(run_as_username="root\nx")
    with pytest.raises(InvalidArgument):
        validate.container(container(linux=LinuxContainerConfig(security_context=user)))
    for envs in ((KeyValue("A=B", b""),), (KeyValue("", b""),), (KeyValue("A", b"\0"),)):
        with pytest.raises(InvalidArgument):
            validate.container(container(envs=envs))


def test_c_c22_annotations_pass_only_where_the_handler_lets_them() -> None:
    evil = {
        "io.kubernetes.cri-o.UnifiedCgroup.c": "x",
        "org.systemd.property.X": "y",
        "run.oci.handler": "krun",
        "io.katacontainers.config.hypervisor.path": "/x",
        "cdi.k8s.io/dev": "x",
    }
    closed = spec.build(plan(pod=pod(annotations=evil), config=container(annotations=evil)))["annotations"]
    assert all(key.startswith("io.kubernetes.cri.") for key in closed)
    opened = spec.build(plan(pod=pod(annotations=evil), annotation_globs=(("run.oci.*",), ())))["annotations"]
    assert {k for k in opened if not k.startswith("io.kubernetes.cri.")} == {"run.oci.handler"}


def test_c_c4_annotations_bring_no_devices_and_no_mounts() -> None:
    evil = {
        "cdi.k8s.io/x": "vendor.com/gpu=0",
        "io.kubernetes.cri-o.annotations.checkpoint.image": "other",
        "io.kubernetes.cri-o.Volumes": "[]",
    }
    made = spec.build(plan(pod=pod(annotations=evil), config=container(annotations=evil)))
    clean = spec.build(plan())
    assert made == clean


def test_c_c3_labels_of_an_image_are_never_configuration() -> None:
    labels = {"io.kubernetes.cri.container-type": "sandbox", "containerd.io/restart.loguri": "binary:///x", "run.oci.hooks": "x"}
    made = spec.build(plan(image=dataclasses.replace(IMAGE, labels=labels)))
    assert made["annotations"]["io.kubernetes.cri.container-type"] == "container"
    assert "hooks" not in made
    assert not any("loguri" in key or "hooks" in key for key in made["annotations"])


@pytest.mark.parametrize("bad", ["relative", "/a/../b", "/a//b", "/a/./b", "/a\nb"])
def test_c_c24_log_directories(bad: str) -> None:
    with pytest.raises(InvalidArgument):
        validate.pod(pod(log_directory=bad))


@pytest.mark.parametrize("bad", ["../x", "/etc/x", "a/../../x", "a//b", "./x", "a\nb"])
def test_c_c24_log_paths(bad: str) -> None:
    with pytest.raises(InvalidArgument):
        validate.container(container(log_path=bad))


def test_c_c24_pod_names_are_no_paths() -> None:
    for m in (PodSandboxMetadata("../x", "u", "n"), PodSandboxMetadata("x", "u/../..", "n"), PodSandboxMetadata("x", "u", "..")):
        with pytest.raises(InvalidArgument):
            validate.pod(pod(metadata=m))


def test_user_namespaces_that_are_refused() -> None:
    one = (IDMapping(100000, 0, 65536),)

    def check(user: UserNamespace) -> None:
        options = LinuxSandboxSecurityContext(namespace_options=NamespaceOption(userns_options=user))
        validate.pod(pod(linux=LinuxPodSandboxConfig(security_context=options)))

    check(UserNamespace(NamespaceMode.POD, one, one))
    for user in (
        UserNamespace(NamespaceMode.POD, one * 2, one * 2),
        UserNamespace(NamespaceMode.POD, one, (IDMapping(200000, 0, 65536),)),
        UserNamespace(NamespaceMode.POD, (IDMapping(1, 1, 5),), (IDMapping(1, 1, 5),)),
        UserNamespace(NamespaceMode.NODE, one, one),
        UserNamespace(NamespaceMode.CONTAINER),
    ):
        with pytest.raises(InvalidArgument):
            check(user)


def test_resources() -> None:
    wanted = LinuxContainerResources(cpu_shares=512, cpu_quota=5, cpu_period=10, memory_limit_in_bytes=100, cpuset_cpus="0-1")
    assert spec.resources(wanted, HOST) == {
        "cpu": {"shares": 512, "quota": 5, "period": 10, "cpus": "0-1"},
        "memory": {"limit": 100, "swap": 100},
    }
    pages = LinuxContainerResources(hugepage_limits=(HugepageLimit("2MB", 1),))
    assert "hugepageLimits" not in spec.resources(pages, HOST)
    with pytest.raises(FailedPrecondition):
        spec.resources(pages, HOST, tolerate=False)
    unified = LinuxContainerResources(unified={"memory.high": "1"})
    with pytest.raises(FailedPrecondition):
        spec.resources(unified, HOST)
    version_2 = dataclasses.replace(HOST, unified=True)
    assert spec.resources(unified, version_2)["unified"] == {"memory.high": "1"}
    with pytest.raises(InvalidArgument):
        spec.resources(LinuxContainerResources(unified={"../x": "1"}), version_2)


def test_oom_scores_are_what_the_daemon_can_give() -> None:
    bound = dataclasses.replace(HOST, oom_score_min=0)
    assert spec.oom_score(-998, bound, restrict=False) == 0
    assert spec.oom_score(500, bound, restrict=False) == 500
    assert spec.oom_score(-998, HOST, restrict=False) == -998
    with pytest.raises(InvalidArgument):
        spec.oom_score(1001, HOST, restrict=False)


def test_mounts_come_parents_first_and_the_pods_win() -> None:
    mounts = (
        volumes.BoundMount("/etc/hosts", "/mine", ("rbind",)),
        volumes.BoundMount("/a/b/c", "/x", ()),
        volumes.BoundMount("/a", "/y", ()),
    )
    made = spec.build(plan(mounts=mounts))["mounts"]
    places = [m["destination"] for m in made]
    assert places.index("/a") < places.index("/a/b/c")
    assert places.index("/dev") < places.index("/dev/shm")
    assert [m["source"] for m in made if m["destination"] == "/etc/hosts"] == ["/mine"]


def test_recursive_read_only_is_refused_rather_than_weakened(tmp_path: Path) -> None:
    def options(*, rro: bool = True, **changes: object) -> tuple[str, ...]:
        return volumes.host_mount(Mount(container_path="/v", host_path=str(tmp_path), **changes), rro=rro).options  # type: ignore[arg-type]

    assert options(readonly=True, recursive_read_only=True) == ("rbind", "rprivate", "rro")
    for changes in (
        {"recursive_read_only": True},
        {"recursive_read_only": True, "readonly": True, "propagation": Propagation.HOST_TO_CONTAINER},
    ):
        with pytest.raises(ImgsvcError):
            options(**changes)
    with pytest.raises(FailedPrecondition):
        options(readonly=True, recursive_read_only=True, rro=False)


def test_host_paths(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    os.symlink("real", tmp_path / "link")
    assert volumes.host_mount(Mount("/v", str(tmp_path / "link")), rro=True).source == str(tmp_path / "real")
    assert volumes.host_mount(Mount("/v", str(tmp_path / "new/one")), rro=True).source == str(tmp_path / "new/one")
    assert (tmp_path / "new/one").is_dir()
    os.symlink("nowhere", tmp_path / "dangling")
    for bad in ("relative", "", str(tmp_path / "dangling")):
        with pytest.raises(ImgsvcError):
            volumes.host_mount(Mount("/v", bad), rro=True)


def test_selinux_labels_are_those_of_processes_and_of_files() -> None:
    made = spec.build(plan(selinux="u:r:t:s0", file_label="u:object_r:f:s0"))
    assert (made["process"]["selinuxLabel"], made["linux"]["mountLabel"]) == ("u:r:t:s0", "u:object_r:f:s0")
    privileged = container(linux=LinuxContainerConfig(security_context=LinuxContainerSecurityContext(privileged=True)))
    made = spec.build(plan(config=privileged, selinux="u:r:t:s0", file_label="u:object_r:f:s0"))
    assert "selinuxLabel" not in made["process"]
    assert made["linux"]["mountLabel"] == "u:object_r:f:s0"


def test_what_a_base_specification_has_stays_where_nothing_else_is_said() -> None:
    base: dict[str, Any] = {
        "process": {"rlimits": [{"type": "RLIMIT_NOFILE", "soft": 9, "hard": 9}], "env": ["BASE=1", "K=base"]},
        "mounts": [{"destination": "/proc", "type": "tmpfs"}, {"destination": "/extra", "type": "tmpfs", "source": "tmpfs"}],
        "linux": {"maskedPaths": ["/proc/kcore"], "intelRdt": {"closID": "x"}},
        "hooks": {"prestart": [{"path": "/hook"}]},
    }
    made = spec.build(plan(base=base, config=container(envs=(KeyValue("K", b"pod"),))))
    assert made["hooks"] == base["hooks"]
    assert made["process"]["rlimits"] == base["process"]["rlimits"]
    assert {"BASE=1", "K=pod"} <= set(made["process"]["env"])
    assert [m["type"] for m in made["mounts"] if m["destination"] in ("/proc", "/extra")] == ["proc", "tmpfs"]
    assert (made["linux"]["maskedPaths"], made["linux"]["intelRdt"]) == (["/proc/kcore"], {"closID": "x"})
    privileged = LinuxContainerConfig(security_context=LinuxContainerSecurityContext(privileged=True))
    assert "maskedPaths" not in spec.build(plan(base=base, config=container(linux=privileged)))["linux"]


def test_on_cgroup_version_2_a_container_sees_its_own_cgroup_only() -> None:
    unified = dataclasses.replace(HOST, unified=True)
    assert spec.namespaces(container(), pod(), Path("/pins"), "", unified)["cgroup"] == ""
    assert "cgroup" not in spec.namespaces(container(), pod(), Path("/pins"), "", dataclasses.replace(HOST, unified=False))
    privileged = container(linux=LinuxContainerConfig(security_context=LinuxContainerSecurityContext(privileged=True)))
    assert "cgroup" not in spec.namespaces(privileged, pod(), Path("/pins"), "", unified)


@pytest.mark.parametrize("writable, namespace, expected", [(True, True, "rw"), (True, False, "ro"), (False, True, "ro")])
def test_cgroups_are_writable_in_a_namespace_of_their_own(*, writable: bool, namespace: bool, expected: str) -> None:
    made = spec.build(plan(cgroup_writable=writable, namespaces={"mount": "", **({"cgroup": ""} if namespace else {})}))
    assert next(m for m in made["mounts"] if m["destination"] == "/sys/fs/cgroup")["options"][-1] == expected
