"""The CNI protocol against a plugin that writes down what it is told (cni.py, network.py, gotemplate.py)."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from imgsvc.base.errors import DeadlineExceeded, ImgsvcError, InvalidArgument, NotFound, Unavailable
from imgsvc.runtime.model import DNSConfig, PodSandboxConfig, PodSandboxMetadata, PortMapping
from imgsvc.runtime.network.cni import CNI, Attachment, CNIError, parse_network, pod_addresses
from imgsvc.runtime.network.plugin import PodNetwork, bandwidth, pod_args, pod_capabilities
from imgsvc.runtime.network.template import render
from imgsvc.runtime.settings import CNISettings

PLUGIN = """#!/bin/sh
dir=$(dirname "$0")
[ -e "$dir/fail-$CNI_COMMAND" ] && { cat "$dir/fail-$CNI_COMMAND"; exit 1; }
n=$(ls "$dir/calls" | wc -l)
{ env | grep ^CNI_; echo --; cat; } > "$dir/calls/$(printf %03d $n)-$CNI_COMMAND-$(basename "$0")"
[ "$CNI_COMMAND" = ADD ] && cat "$dir/result"
exit 0
"""
RESULT = {
    "cniVersion": "1.0.0",
    "interfaces": [{"name": "host0"}, {"name": "eth0", "sandbox": "/ns"}],
    "ips": [
        {"address": "10.0.0.1/24", "interface": 0},
        {"address": "10.0.0.5/24", "interface": 1},
        {"address": "fd00::5/64", "interface": 1},
    ],
}


class Plugins:
    def __init__(self, directory: Path) -> None:
        self.directory = directory / "bin"
        (self.directory / "calls").mkdir(parents=True)
        for name in ("one", "two"):
            (self.directory / name).write_text(PLUGIN)
            (self.directory / name).chmod(0o755)
        (self.directory / "result").write_text(json.dumps(RESULT))
        self.conf = directory / "net.d"
        self.conf.mkdir()
        self.cache = directory / "cache"

    def calls(self) -> list[tuple[str, dict[str, str], dict[str, Any]]]:
        found = []
        for path in sorted((self.directory / "calls").iterdir()):
            environment, _, request = path.read_text().partition("--\n")
            variables = dict(line.split("=", 1) for line in environment.splitlines())
            found.append((path.name[4:], variables, json.loads(request)))
        return found

    def write(self, file: str = "10-x.conflist", **fields: Any) -> None:
        plugins = [{"type": "one", "capabilities": {"portMappings": True}}, {"type": "two"}]
        self.conf.joinpath(file).write_text(json.dumps({"cniVersion": "1.0.0", "name": "net", "plugins": plugins} | fields))

    def network(self, **settings: Any) -> PodNetwork:
        values: Any = {"bin_dirs": (str(self.directory),), "conf_dir": str(self.conf), "cache_dir": str(self.cache)} | settings
        return PodNetwork(CNISettings(**values))


@pytest.fixture
def plugins(tmp_path: Path) -> Plugins:
    return Plugins(tmp_path)


POD = PodSandboxConfig(
    metadata=PodSandboxMetadata("pod", "uid", "ns"),
    port_mappings=(PortMapping(0, 80, 8080, "127.0.0.1"), PortMapping(1, 53, 0, "")),
    dns_config=DNSConfig(servers=("1.1.1.1",)),
    annotations={"kubernetes.io/ingress-bandwidth": "10M", "kubernetes.io/egress-bandwidth": "1Mi"},
)


def test_add_and_del_as_the_specification_wants_them(plugins: Plugins) -> None:
    plugins.write()
    network = plugins.network()
    assert asyncio.run(network.setup("sid", "/ns", POD)) == ("10.0.0.5", "fd00::5")
    asyncio.run(network.teardown("sid", "/ns"))
    calls = plugins.calls()
    assert [name for name, _, _ in calls] == ["ADD-one", "ADD-two", "DEL-two", "DEL-one"]
    _, environment, request = calls[0]
    assert environment["CNI_CONTAINERID"] == "sid"
    assert (environment["CNI_NETNS"], environment["CNI_IFNAME"]) == ("/ns", "eth0")
    assert environment["CNI_ARGS"].split(";")[:3] == ["IgnoreUnknown=1", "K8S_POD_NAMESPACE=ns", "K8S_POD_NAME=pod"]
    assert request["runtimeConfig"] == {"portMappings": [{"hostPort": 8080, "containerPort": 80, "protocol": "tcp", "hostIP": "127.0.0.1"}]}
    assert (request["name"], request["cniVersion"], "capabilities" in request, "prevResult" in request) == ("net", "1.0.0", False, False)
    assert "runtimeConfig" not in calls[1][2]
    assert calls[1][2]["prevResult"] == RESULT
    assert calls[2][2]["prevResult"] == RESULT
    assert list((plugins.cache / "results").iterdir()) == []


def test_a_pod_is_detached_with_the_configuration_it_was_attached_with(plugins: Plugins) -> None:
    plugins.write()
    asyncio.run(plugins.network().setup("sid", "/ns", POD))
    plugins.write("00-new.conflist", plugins=[{"type": "two"}])
    asyncio.run(plugins.network().teardown("sid", ""))
    assert [name for name, _, _ in plugins.calls()][2:] == ["DEL-two", "DEL-one"]
    assert plugins.calls()[-1][1]["CNI_NETNS"] == ""


def test_the_loopback_plugin_is_run_where_it_is_wanted(plugins: Plugins) -> None:
    plugins.write()
    network = plugins.network(use_internal_loopback=False)
    problem = asyncio.run(network.status())
    assert problem is not None
    assert "loopback" in str(problem)  # it is not there yet
    (plugins.directory / "loopback").write_text(PLUGIN)
    (plugins.directory / "loopback").chmod(0o755)
    network = plugins.network(use_internal_loopback=False)
    assert asyncio.run(network.status()) is None
    assert asyncio.run(network.setup("sid", "/ns", POD)) == ("10.0.0.5", "fd00::5")
    asyncio.run(plugins.network().teardown("sid", "/ns"))  # also when the setting has changed
    calls = [(name, environment["CNI_IFNAME"]) for name, environment, _ in plugins.calls() if "loopback" in name]
    assert calls == [("ADD-loopback", "lo"), ("DEL-loopback", "lo")]
    assert list((plugins.cache / "results").iterdir()) == []


def test_a_failed_add_still_owes_a_del(plugins: Plugins) -> None:
    plugins.write()
    (plugins.directory / "fail-ADD").write_text('{"code": 11, "msg": "try later", "details": "no\\u001b[31m address"}')
    with pytest.raises(CNIError) as caught:
        asyncio.run(plugins.network().setup("sid", "/ns", POD))
    assert (caught.value.cni_code, caught.value.plugin, caught.value.verb) == (11, "one", "ADD")
    assert "\x1b" not in str(caught.value)
    asyncio.run(plugins.network().teardown("sid", "/ns"))
    assert [name for name, _, _ in plugins.calls()] == ["DEL-two", "DEL-one"]


def test_every_network_is_left_even_when_one_refuses(plugins: Plugins) -> None:
    plugins.write("10-a.conflist", name="a")
    plugins.write("20-b.conflist", name="b", plugins=[{"type": "two"}])
    network = plugins.network(max_conf_num=0)
    asyncio.run(network.setup("sid", "/ns", POD))
    (plugins.directory / "fail-DEL").write_text("garbage")
    with pytest.raises(CNIError):
        asyncio.run(network.teardown("sid", "/ns"))
    assert len(list((plugins.cache / "results").iterdir())) == 2
    (plugins.directory / "fail-DEL").unlink()
    asyncio.run(network.teardown("sid", "/ns"))
    assert list((plugins.cache / "results").iterdir()) == []


def test_readiness_tells_the_truth(plugins: Plugins) -> None:
    network = plugins.network()
    assert isinstance(asyncio.run(network.status()), NotFound)
    plugins.write()
    assert asyncio.run(network.status()) is None
    plugins.write(plugins=[{"type": "absent"}])
    assert "absent" in str(asyncio.run(network.status()))
    (plugins.conf / "10-x.conflist").write_text("{")
    problem = asyncio.run(network.status())
    assert isinstance(problem, InvalidArgument)
    assert "10-x.conflist" in str(problem)
    plugins.write(cniVersion="1.1.0")
    (plugins.directory / "fail-STATUS").write_text('{"code": 50, "msg": "no addresses left"}')
    assert "no addresses left" in str(asyncio.run(plugins.network().status()))


def test_what_belongs_to_no_pod_is_detached_after_a_restart(plugins: Plugins) -> None:
    plugins.write(cniVersion="1.1.0")
    network = plugins.network()
    for pod in ("alive", "dead"):
        asyncio.run(network.setup(pod, "/ns", POD))
    asyncio.run(network.collect({"alive"}))
    calls = plugins.calls()
    assert {environment["CNI_CONTAINERID"] for name, environment, _ in calls if name.startswith("DEL")} == {"dead"}
    collected = [request for name, _, request in calls if name.startswith("GC")]
    assert len(collected) == 2
    assert collected[0]["cni.dev/valid-attachments"] == [{"containerID": "alive", "ifname": "eth0"}]


def test_a_plugin_that_hangs_is_killed(plugins: Plugins) -> None:
    (plugins.directory / "one").write_text("#!/bin/sh\nsleep 1000 & sleep 1000\n")
    client = CNI([str(plugins.directory)], plugins.cache, timeout_s=0.5)
    network = parse_network(b'{"name": "n", "cniVersion": "1.0.0", "type": "one"}', "x")
    with pytest.raises(DeadlineExceeded):
        asyncio.run(client.add(network, Attachment("sid", "/ns", "eth0")))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"name": 1}',
        '{"name": "x", "plugins": []}',
        '{"name": "x", "plugins": [{}]}',
        '{"name": "x", "type": "t", "cniVersion": "x"}',
    ],
)
def test_broken_configurations_are_named(text: str) -> None:
    with pytest.raises(InvalidArgument):
        parse_network(text.encode(), "/etc/cni/net.d/x")


def test_a_plugin_type_is_never_a_path(plugins: Plugins) -> None:
    client = CNI([str(plugins.directory)], plugins.cache)
    network = parse_network(b'{"name": "n", "cniVersion": "1.0.0", "plugins": [{"type": "../bin/one"}]}', "x")
    with pytest.raises(NotFound):
        asyncio.run(client.add(network, Attachment("sid", "/ns", "eth0")))


@pytest.mark.parametrize(
    "result, preference, expected",
    [
        (RESULT, "", ["10.0.0.5", "fd00::5"]),
        (RESULT, "ipv6", ["fd00::5", "10.0.0.5"]),
        ({"ips": [{"version": "4", "address": "1.2.3.4/8"}]}, "", ["1.2.3.4"]),
        ({"ip4": {"ip": "1.2.3.4/8"}, "ip6": {"ip": "::1/8"}}, "ipv4", ["1.2.3.4", "::1"]),
        ({}, "", []),
    ],
)
def test_addresses_from_results_of_all_versions(result: dict[str, Any], preference: str, expected: list[str]) -> None:
    assert pod_addresses(result, preference) == expected


def test_capabilities_and_arguments() -> None:
    offered = pod_capabilities(POD, "/kube/pod")
    assert offered["bandwidth"] == {"ingressRate": 10**7, "ingressBurst": 2**31 - 1, "egressRate": 2**20, "egressBurst": 2**31 - 1}
    assert offered["dns"] == {"servers": ["1.1.1.1"], "searches": [], "options": []}
    assert offered["cgroupPath"] == "/kube/pod"
    with pytest.raises(InvalidArgument):
        bandwidth({"kubernetes.io/ingress-bandwidth": "10 apples"})
    with pytest.raises(InvalidArgument):
        pod_args("sid", PodSandboxConfig(metadata=PodSandboxMetadata("a;K8S_POD_NAMESPACE=kube-system", "u", "n")))


TEMPLATE = '[{{range $i, $r := .PodCIDRRanges}}{{if $i}}, {{end}}{"subnet": "{{$r}}"}{{end}}] {{.PodCIDR}}'


def test_the_configuration_from_a_template(plugins: Plugins) -> None:
    assert render(TEMPLATE, {"PodCIDR": "a", "PodCIDRRanges": ["a", "b"]}) == '[{"subnet": "a"}, {"subnet": "b"}] a'
    assert render(TEMPLATE, {"PodCIDR": "", "PodCIDRRanges": []}) == "[] "
    for bad in (
        "{{.Nope}}",
        "{{range $i, $x := .PodCIDRRanges}}",
        "{{end}}",
        '{{printf "%s" .PodCIDR}}',
        "{{range $x := .PodCIDR}}{{end}}",
    ):
        with pytest.raises(InvalidArgument):
            render(bad, {"PodCIDR": "a", "PodCIDRRanges": ["a"]})
    template = plugins.conf.parent / "template"
    template.write_text('{"cniVersion": "1.0.0", "name": "t", "plugins": [{"type": "one", "subnet": "{{.PodCIDR}}"}]}')
    network = plugins.network(conf_template=str(template))
    with pytest.raises(InvalidArgument):
        network.update_pod_cidr('10.0.0.0/8", "x": "')
    network.update_pod_cidr("10.88.0.0/16,fd00::/64")
    assert [n.plugins[0]["subnet"] for n in network.networks()] == ["10.88.0.0/16"]


def test_unavailable_is_what_the_kubelet_may_retry() -> None:
    error = CNIError("net", "bridge", "ADD", 11, "later")
    assert isinstance(error, (Unavailable, ImgsvcError))
    assert error.retryable
