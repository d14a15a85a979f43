"""Containers: volumes of pods and images, commands that cannot be started, what pods and handlers are configured with."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import grpc
import pytest

from imgsvc.api import cri_pb2 as pb
from imgsvc.base.errors import InvalidArgument, ResourceExhausted
from imgsvc.base.oci import ImageConfig, Platform, parse_config
from imgsvc.config.containerd import import_file
from imgsvc.runtime.containers import merge_resources
from imgsvc.runtime.handlers.oci.execerror import is_about_the_command
from imgsvc.runtime.model import ContainerConfig, LinuxContainerResources
from imgsvc.runtime.network.plugin import PodNetwork
from imgsvc.runtime.numbers.metrics import METRICS
from imgsvc.runtime.settings import CNISettings
from imgsvc.runtime.spec import build as spec
from imgsvc.runtime.spec import cdi, sysctls, volumes
from tests.runtime.harness import Daemon, assert_clean
from tests.runtime.images import BUSYBOX
from tests.runtime.test_handlers import KINDS
from tests.runtime.test_life import MakeNode

pytestmark = pytest.mark.root


def pod_volume(node: Daemon, name: str, container_path: str, **fields: Any) -> pb.Mount:
    """A host path volume with a file `pod` in it."""
    source = node.directory / "host" / name
    source.mkdir(parents=True, exist_ok=True)
    source.chmod(0o777)
    (source / "pod").touch()
    return pb.Mount(container_path=container_path, host_path=str(source), **fields)


def cgroups_for(kind: str) -> str:
    """crun takes no mixture of cgroup versions."""
    return "v1" if kind == "crun" and Path("/sys/fs/cgroup/unified").is_dir() else ""


def image_volume(**fields: Any) -> pb.Mount:
    """The busybox image at /vol."""
    return pb.Mount(container_path="/vol", image=pb.ImageSpec(image=BUSYBOX), readonly=True, **fields)


def test_S8_an_image_volume_cannot_be_made_writable(node: Daemon) -> None:
    pod = node.run_pod("volume")
    for option in ("rw", "suid", "dev", "bogus", "nosuid,rw"):
        with pytest.raises(grpc.RpcError) as caught:
            node.create(pod, node.container("true", mounts=[image_volume(mount_options=[option])]))
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT, option
    security = pb.LinuxContainerSecurityContext(
        capabilities=pb.Capability(add_capabilities=["ALL"]), seccomp=pb.SecurityProfile(profile_type=pb.SecurityProfile.Unconfined)
    )
    script = "mount -o remount,rw,bind /vol; mount -o remount,rw /vol; grep -c ' /vol .*rw' /proc/self/mounts; touch /vol/x 2>/dev/null || echo kept"
    for number, fields in enumerate([{}, {"image_sub_path": "etc"}]):
        volume = image_volume(mount_options=["noatime", "noexec"], **fields)
        assert "kept" in node.output(pod, script, name=f"c{number}", mounts=[volume], security=security)
    assert not list((node.directory / "images/rootfs").rglob("x"))


def test_P1_a_pods_mount_lies_on_top_of_an_images_volume(make_node: MakeNode) -> None:
    node = make_node({"image": {"volumes": ["/", "//deep/a", "/data", "/inner/x", "/proc"]}})
    rootfs = node.directory / "images/rootfs"
    (rootfs / "data").mkdir()
    (rootfs / "data/image").touch()
    mounts = [pod_volume(node, "sub", "/data/sub"), pod_volume(node, "deep", "//deep/a/b/"), pod_volume(node, "inner", "/inner")]
    seen = ["/data/image", "/data/sub/pod", "/deep/a/b/pod", "/inner/pod", "/proc/self/stat"]
    script = f"touch /data/sub/new /inner/x/new; ls {' '.join(seen)}"
    (node.directory / "host/inner/x").mkdir(parents=True)
    assert node.output(node.run_pod(), script, mounts=mounts) == seen
    assert (node.directory / "host/sub/new").exists()
    assert (node.directory / "host/inner/x/new").exists()


def test_P20_an_images_volume_on_a_link_does_not_cover_the_links_target(make_node: MakeNode) -> None:
    node = make_node({"image": {"volumes": ["/link", "/opt/app/data", "/chain/v"]}})
    rootfs = node.directory / "images/rootfs"
    (rootfs / "target").mkdir()
    (rootfs / "opt/app/data").mkdir(parents=True)
    (rootfs / "link").symlink_to("/target")
    (rootfs / "short").symlink_to("../../opt/app/data")
    (rootfs / "chain").symlink_to("dangling")
    (rootfs / "dangling").symlink_to("/made/later")
    (rootfs / "work").symlink_to("../../../../../made/work")
    mounts = [pod_volume(node, "target", "/target/sub"), pod_volume(node, "short", "/short"), pod_volume(node, "chain", "/made/later/v/w")]
    seen = ["/made/later/v/w/pod", "/opt/app/data/pod", "/target/sub/pod"]
    pod = node.run_pod()
    assert node.output(pod, f"ls {' '.join(seen)}", mounts=mounts) == seen
    assert node.output(pod, "pwd -P", working_dir="/work") == ["/made/work"]
    for path in ("/fd/7", "/proc/self/fd/7"):
        (rootfs / "fd").unlink(missing_ok=True)
        (rootfs / "fd").symlink_to("proc/self/fd")
        with pytest.raises(grpc.RpcError) as caught:
            node.create(pod, node.container("true", working_dir=path))
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT


def test_P1_paths_have_one_spelling(tmp_path: Path) -> None:
    assert [volumes.clean(p) for p in ("//a", "/a/", "a", "/a/./b/..", "/", "//", "/../a")] == ["/a", "/a", "/a", "/a", "/", "/", "/a"]
    assert [volumes.depth(p) for p in ("/", "//", "/a", "//a//b/")] == [0, 0, 1, 2]
    (tmp_path / "a").symlink_to("/b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(InvalidArgument):
        volumes.Places(tmp_path).find("/a/x")


def test_P20_what_lies_below_a_mount_is_not_looked_up_in_the_image(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/b").symlink_to("/c")
    places = volumes.Places(tmp_path, {"/dev"})
    assert places.find("/a/b") == "/c"
    assert places.mount("/a") == "/a"
    assert places.mount("/a/b") == "/a/b"
    assert places.is_covered("/a/b/c")
    assert places.is_covered("/dev/x")
    assert not places.is_covered("/c")


def userns_pod(node: Daemon) -> tuple[str, pb.LinuxContainerSecurityContext]:
    """A pod with a user namespace, and what its containers need to join it."""
    mapping = [pb.IDMapping(host_id=300000, container_id=0, length=65536)]
    user = pb.UserNamespace(mode=pb.POD, uids=mapping, gids=mapping)
    options = pb.NamespaceOption(network=pb.NODE, pid=pb.CONTAINER, userns_options=user)
    return node.run_pod("userns", namespaces=options), pb.LinuxContainerSecurityContext(namespace_options=options)


def test_P2_a_volume_in_a_user_namespace_has_the_images_owners(make_node: MakeNode) -> None:
    node = make_node({"image": {"volumes": ["/data", "/new", "/run/x"]}})
    rootfs = node.directory / "images/rootfs"
    (rootfs / "data").mkdir()
    (rootfs / "data/root").touch()
    (rootfs / "data/ann").touch(mode=0o600)
    os.chown(rootfs / "data", 1000, 1000)
    os.chown(rootfs / "data/ann", 1000, 1000)
    pod, security = userns_pod(node)
    mounts = [pod_volume(node, "token", "/data/secrets/token", readonly=True), pod_volume(node, "run", "/run/x/y")]
    script = (
        "stat -c %u:%g /data /data/root /data/ann /new; touch /data/made /new/made; stat -c %u /data/made; ls /data/secrets/token /run/x/y"
    )
    lines = node.output(pod, script, mounts=mounts, security=security)
    assert lines == ["1000:1000", "0:0", "1000:1000", "0:0", "0", "/data/secrets/token:", "pod", "", "/run/x/y:", "pod"]
    assert node.output(pod, "stat -c %u:%g /vol/data/root /vol/data/ann", mounts=[image_volume()], security=security) == [
        "0:0",
        "1000:1000",
    ]


@pytest.mark.parametrize("kind", list(KINDS))
def test_K4_a_command_that_cannot_be_started_fails_at_its_start(make_node: MakeNode, kind: str) -> None:
    node = make_node({"handlers": {"default": KINDS[kind][0]}}, cgroups=cgroups_for(kind))
    pod = node.run_pod()
    made = [
        node.create(pod, node.container("", f"c{n}", command=[program]))
        for n, program in enumerate(["nope", "/no/such", "/etc/passwd", "/etc"])
    ]
    if kind == "runc":
        node.kill()
        node.start()
    assert {c.state for c in node.cri.ListContainers(pb.ListContainersRequest()).containers} == {pb.CONTAINER_CREATED}
    assert len(node.cri.ListContainerStats(pb.ListContainerStatsRequest()).stats) == len(made)
    for container in made[1:]:
        with pytest.raises(grpc.RpcError) as caught:
            node.start_container(container)
        status = node.status(container)
        assert (status.state, status.exit_code, status.reason) == (pb.CONTAINER_EXITED, 128, "StartError")
        assert status.message
        assert status.message in (caught.value.details() or "")
    assert "/no/such" in node.status(made[1]).message
    node.cri.StopContainer(pb.StopContainerRequest(container_id=made[0], timeout=5))
    assert node.status(made[0]).state == pb.CONTAINER_EXITED
    for container in made:
        node.cri.RemoveContainer(pb.RemoveContainerRequest(container_id=container))
    node.remove_all()
    assert_clean(node)


def test_K4_what_is_wrong_beside_the_command_still_fails_the_creation(node: Daemon) -> None:
    pod = node.run_pod("beside")
    for fields in ({"devices": [pb.Device(host_path="/dev/none", container_path="/dev/none")]}, {"working_dir": "/etc/passwd"}):
        with pytest.raises(grpc.RpcError):
            node.create(pod, node.container("true", **fields))
    assert not node.cri.ListContainers(pb.ListContainersRequest(filter=pb.ContainerFilter(pod_sandbox_id=pod))).containers
    assert is_about_the_command('exec: "x": executable file not found in $PATH: unknown')
    assert is_about_the_command("executable file `x` not found in $PATH: No such file or directory")
    assert not is_about_the_command('error running createRuntime hook #0: exec: "x": executable file not found in $PATH')
    assert not is_about_the_command('error mounting "/x" to rootfs at "/y": not a directory')


def test_P5_sysctls_of_an_interface_are_set_when_it_is_there(make_node: MakeNode) -> None:
    node = make_node(bridge="rtfield")
    wanted = {"net.ipv4.conf.eth0.arp_ignore": "1", "net/ipv4/conf/eth0/arp_announce": "2", "net.ipv4.conf.all.arp_filter": "1"}
    pod = node.run_pod("sysctl", sysctls=wanted)
    directory = "/proc/sys/net/ipv4/conf"
    script = f"cat {directory}/eth0/arp_ignore {directory}/eth0/arp_announce {directory}/all/arp_filter"
    assert node.output(pod, script) == ["1", "2", "1"]
    with pytest.raises(grpc.RpcError) as caught:
        node.run_pod("none", sysctls={"net.ipv4.conf.eth7.arp_ignore": "1"})
    assert caught.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    node.remove_all()
    assert_clean(node)


def test_P5_names_of_sysctls_have_two_forms() -> None:
    assert sysctls.parts("net/ipv4/conf/eth0.100/arp_ignore") == ["net", "ipv4", "conf", "eth0.100", "arp_ignore"]
    assert sysctls.parts("net.ipv4.conf.eth0/100.arp_ignore") == ["net", "ipv4", "conf", "eth0.100", "arp_ignore"]
    assert sysctls.canonical("net/ipv4/conf/eth0.100/arp_ignore") == "net.ipv4.conf.eth0/100.arp_ignore"
    names = ["net.ipv4.conf.eth0.x", "net.ipv6.neigh.eth0/1.x", "net.ipv4.conf.all.x", "net.ipv4.conf.lo.x", "net.core.x", "net.ipv4.conf"]
    assert list(sysctls.of_interfaces(dict.fromkeys(names, "1"))) == names[:2]


def test_P4_an_entrypoint_of_one_empty_word_is_none() -> None:
    image = ImageConfig(Platform.host(), (), entrypoint=("",), cmd=("run",))
    assert spec.command_line(ContainerConfig(), image) == ["run"]
    assert spec.command_line(ContainerConfig(args=("a", "b")), image) == ["a", "b"]
    assert spec.command_line(ContainerConfig(), dataclasses.replace(image, entrypoint=("", "x"))) == ["", "x", "run"]


def test_S15_an_image_has_a_bounded_number_of_settings() -> None:
    def config(**values: object) -> bytes:
        return json.dumps({"architecture": "amd64", "os": "linux", "rootfs": {"diff_ids": []}, "config": values}).encode()

    assert len(parse_config(config(Env=[f"A{n}=1" for n in range(4096)]), "here").env) == 4096
    for name, value in (("Env", ["A=1"] * 4097), ("Volumes", {f"/v{n}": {} for n in range(257)})):
        with pytest.raises(ResourceExhausted, match="at most"):
            parse_config(config(**{name: value}), "here")


def test_R10_specifications_keep_to_the_letter(make_node: MakeNode) -> None:
    node = make_node(bridge="rtprop")
    pod = node.run_pod("prop", namespaces=pb.NamespaceOption(pid=pb.POD))
    container = node.run(pod, "sleep 100")
    made = json.loads((node.directory / "s/containers" / container / "config.json").read_text())
    pause = json.loads((node.directory / "s/containers" / pod / "config.json").read_text())
    assert (made["linux"]["rootfsPropagation"], made["hostname"]) == ("slave", "prop")
    assert any(text.startswith("PATH=") for text in pause["process"]["env"])
    assert node.exec(container, "hostname").stdout == b"prop\n"


@pytest.mark.parametrize("kind", ["runc", "crun"])
def test_R10_mounts_are_propagated_as_asked(make_node: MakeNode, kind: str) -> None:
    node = make_node({"handlers": {"default": KINDS[kind][0]}}, cgroups=cgroups_for(kind))
    source = node.directory / "shared"
    (source / "in").mkdir(parents=True)
    (source / "out").mkdir()
    inside = [*node.prefix, "mount"]
    subprocess.run([*inside, "--bind", source, source], check=True)
    subprocess.run([*inside, "--make-shared", source], check=True)
    try:
        pod = node.run_pod(privileged=True)
        slave = pb.Mount(host_path=str(source), container_path="/vol", propagation=pb.PROPAGATION_HOST_TO_CONTAINER)
        receiver = node.run(pod, "sleep 100", "receiver", mounts=[slave])
        shared = pb.Mount(host_path=str(source), container_path="/vol", propagation=pb.PROPAGATION_BIDIRECTIONAL)
        sender = node.run(pod, "sleep 100", "sender", mounts=[shared], security=pb.LinuxContainerSecurityContext(privileged=True))
        private = node.run(pod, "sleep 100", "private", mounts=[pb.Mount(host_path=str(source), container_path="/vol")])
        subprocess.run([*inside, "-t", "tmpfs", "none", source / "in"], check=True)
        assert node.exec(sender, "mount", "-t", "tmpfs", "none", "/vol/out").exit_code == 0
        seen = {c: node.exec(c, "grep", "-c", " /vol/", "/proc/self/mounts").stdout for c in (receiver, sender, private)}
        assert seen == {receiver: b"2\n", sender: b"2\n", private: b"0\n"}
        made = json.loads((node.directory / "s/containers" / sender / "config.json").read_text())
        assert made["linux"]["rootfsPropagation"] == "shared"
    finally:
        node.remove_all()
        subprocess.run([*node.prefix, "umount", "-R", source], check=True)


def test_R11_an_ambiguous_beginning_of_an_id_is_an_error(node: Daemon) -> None:
    pod = node.run_pod("alike")
    made: dict[str, str] = {}
    while True:  # until two containers begin alike
        container = node.create(pod, node.container("", f"c{len(made)}", command=["/none"]))
        if container[0] in made:
            break
        made[container[0]] = container
    short = container[0]
    for call in (
        lambda: node.cri.StopContainer(pb.StopContainerRequest(container_id=short)),
        lambda: node.cri.RemoveContainer(pb.RemoveContainerRequest(container_id=short)),
        lambda: node.cri.ContainerStatus(pb.ContainerStatusRequest(container_id=short)),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            call()
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    node.cri.StopContainer(pb.StopContainerRequest(container_id="f" * 64))
    node.cri.RemovePodSandbox(pb.RemovePodSandboxRequest(pod_sandbox_id="f" * 64))
    assert {"container_memory_total_active_file_bytes", "container_memory_total_inactive_file_bytes"} <= {m.name for m in METRICS}


def test_R11_an_update_keeps_what_its_unified_limits_do_not_name() -> None:
    old = LinuxContainerResources(cpu_shares=5, unified={"memory.high": "1", "memory.low": "2"})
    new = LinuxContainerResources(unified={"memory.high": "3"})
    assert merge_resources(old, new) == LinuxContainerResources(cpu_shares=5, unified={"memory.high": "3", "memory.low": "2"})


def test_R12_devices_of_cdi_1_1_bring_interfaces_and_cache_classes() -> None:
    made: dict[str, Any] = {"process": {"env": [], "user": {}}, "linux": {"devices": [], "resources": {}}, "mounts": []}
    rdt = {"closID": "gold", "schemata": ["L3:0=f"], "enableMonitoring": True}
    cdi.apply(made, [{"netDevices": [{"hostInterfaceName": "ens5", "name": "data0"}]}, {"intelRdt": rdt}])
    assert made["linux"]["netDevices"] == {"ens5": {"name": "data0"}}
    assert made["linux"]["intelRdt"] == rdt
    for edits in (
        {"netDevices": [{"hostInterfaceName": "ens5"}]},
        {"netDevices": [{"hostInterfaceName": "ens6", "name": "data0"}]},
        {"intelRdt": {"closID": "../x"}},
    ):
        with pytest.raises(InvalidArgument):
            cdi.apply(made, [edits])


def test_R12_keys_of_containerd_2_4_are_known(tmp_path: Path) -> None:
    source = tmp_path / "config.toml"
    source.write_text(
        """version = 3
[plugins.'io.containerd.cri.v1.runtime']
stats_retention_period = ''
enable_criu = true
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
runtime_type = 'io.containerd.runc.v2'
disable_pause_image_pull = false
[plugins.'io.containerd.metadata.v1.bolt']
no_sync = false
[plugins.'io.containerd.metrics.v1.grpc-prometheus']
grpc_histogram = false
"""
    )
    assert import_file(source).refused == []


def test_P19_a_broken_first_network_keeps_the_node_not_ready_and_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "cni.d").mkdir()
    (tmp_path / "cni.d/00-broken.conflist").write_text("{")
    (tmp_path / "cni.d/10-good.conflist").write_text('{"cniVersion": "1.0.0", "name": "n", "plugins": [{"type": "bridge"}]}')
    network = PodNetwork(CNISettings(conf_dir=str(tmp_path / "cni.d"), cache_dir=str(tmp_path / "cache")))
    for _ in range(2):
        with pytest.raises(InvalidArgument, match="00-broken"):
            network.networks()
    assert sum("00-broken" in record.message for record in caplog.records) == 1
    (tmp_path / "cni.d/00-broken.conflist").unlink()
    assert [n.name for n in network.networks()] == ["n"]
