"""containerd's configuration turned into ours: no key may vanish."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from imgsvc import config
from imgsvc.base.errors import InvalidArgument
from imgsvc.base.tomlfile import dotted
from imgsvc.config.containerd import Finding, Imported, Outcome, import_file
from imgsvc.registry.hosts.legacy import parse_legacy

DEFAULTS = Path(__file__).with_name("containerd-2.3-keys.toml")
CRI = 'plugins."io.containerd.grpc.v1.cri"'


def convert(tmp_path: Path, text: str) -> Imported:
    source = tmp_path / "config.toml"
    source.write_text(text)
    return import_file(source)


def import_with_registry(tmp_path: Path, text: str) -> Imported:
    """As the command does it."""
    source = tmp_path / "config.toml"
    source.write_text(text)
    return import_file(source, lambda tables: parse_legacy(tables, "registry"))


def finding(result: Imported, ending: str) -> Finding:
    found = [f for f in result.findings if f.key.endswith(ending)]
    assert len(found) == 1, [f.key for f in result.findings]
    return found[0]


def leaves(table: dict[str, Any], at: tuple[str, ...] = ()) -> Iterator[str]:
    for key, value in table.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, (*at, key))
        else:
            yield dotted((*at, key))


def test_every_default_key_of_containerd_is_carried_or_explained() -> None:
    result = import_file(DEFAULTS)

    assert sorted(f.key for f in result.findings) == sorted(leaves(tomllib.loads(DEFAULTS.read_text())))
    assert result.refused == []
    assert all(f.note for f in result.findings)
    assert all(re.search(r":\d+:\d+$", f.where) for f in result.findings)


def test_every_key_not_carried_is_named_in_the_result() -> None:
    result = import_file(DEFAULTS)

    for f in result.findings:
        if f.outcome is not Outcome.CARRIED:
            assert f"#   {f.key}: {f.note}" in result.toml


def test_the_result_is_a_configuration_with_containerds_values() -> None:
    loaded = config.parse(import_file(DEFAULTS).toml, "result").config

    assert loaded.images.max_concurrent_downloads == 3
    assert loaded.images.pinned_images == ("registry.k8s.io/pause:3.10",)
    assert loaded.runtime.default_runtime_name == "runc"
    assert loaded.runtime.runtimes["runc"].path == "runc"
    assert loaded.stream_processors["io.containerd.ocicrypt.decoder.v1.tar"].path == "ctd-decoder"
    assert loaded.registry.config_path == config.schema.Registry().config_path
    assert loaded.root == config.Config().root


def test_version_2_with_inline_mirrors_configs_and_auths(tmp_path: Path) -> None:
    result = convert(
        tmp_path,
        f"""version = 2
[{CRI}]
sandbox_image = "registry.example/pause:3.9"
systemd_cgroup = false
[{CRI}.containerd]
snapshotter = "native"
discard_unpacked_layers = true
[{CRI}.containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
[{CRI}.containerd.runtimes.runc.options]
SystemdCgroup = true
BinaryName = "/usr/bin/crun"
[{CRI}.containerd.runtimes.kata]
runtime_type = "io.containerd.kata.v2"
sandboxer = "shim"
privileged_without_host_devices = true
[{CRI}.containerd.runtimes.kata.options]
ConfigPath = "/etc/kata.toml"
[{CRI}.registry.mirrors."docker.io"]
endpoint = ["https://mirror.example"]
[{CRI}.registry.configs."mirror.example".auth]
username = "u"
password = "p"
[{CRI}.registry.configs."mirror.example".tls]
insecure_skip_verify = true
[{CRI}.registry.auths."https://old.example"]
auth = "dTpw"
[{CRI}.registry.headers]
User-Agent = ["x"]
""",
    )
    loaded = config.parse(result.toml, "result").config

    assert result.refused == []
    assert loaded.images.pinned_images == ("registry.example/pause:3.9",)
    assert loaded.images.snapshotter == "native"
    assert loaded.images.discard_unpacked_layers
    assert loaded.runtime.cgroup_driver == "systemd"
    assert loaded.runtime.runtimes["runc"].path == "/usr/bin/crun"
    assert loaded.runtime.runtimes["kata"].type == "io.containerd.kata.v2"
    assert loaded.runtime.runtimes["kata"].sandboxer == "shim"
    assert loaded.runtime.runtimes["kata"].options == {"ConfigPath": "/etc/kata.toml"}
    assert loaded.runtime.runtimes["kata"].privileged_without_host_devices
    assert loaded.registry.mirrors == {"docker.io": {"endpoint": ["https://mirror.example"]}}
    tls = {"insecure_skip_verify": True}
    assert loaded.registry.configs == {"mirror.example": {"auth": {"username": "u", "password": "p"}, "tls": tls}}
    assert loaded.registry.auths == {"https://old.example": {"auth": "dTpw"}}
    assert loaded.registry.headers == {"User-Agent": ["x"]}


@pytest.mark.parametrize(
    "text, key",
    [
        (f"[{CRI}]\nmax_concurent_downloads = 3\n", "max_concurent_downloads"),
        ('[plugins."io.containerd.nobody.v1.knows"]\nx = 1\n', "x"),
        (f'[{CRI}.containerd]\nsnapshotter = "devmapper"\n', "snapshotter"),
        ('[grpc]\ntcp_address = "0.0.0.0:1"\n', "tcp_address"),
        (f"[{CRI}]\ndisable_tcp_service = false\n", "disable_tcp_service"),
        (f"[{CRI}]\nenable_tls_streaming = true\n", "enable_tls_streaming"),
        ('[proxy_plugins.stargz]\ntype = "snapshot"\n', "type"),
        (f'[{CRI}.containerd.runtimes.a]\nruntime_type = "io.containerd.runc.v2"\noptions.ShimCgroup = "/x"\n', "ShimCgroup"),
        (f'[{CRI}.containerd.runtimes.a]\nruntime_type = "io.containerd.runc.v2"\nsandboxer = "shim"\n', "sandboxer"),
        ('[plugins."io.containerd.service.v1.tasks-service"]\nrdt_config_file = "/x"\n', "rdt_config_file"),
    ],
)
def test_what_imgsvc_does_not_do_is_refused_with_its_position(tmp_path: Path, text: str, key: str) -> None:
    result = convert(tmp_path, "version = 2\n" + text)

    assert finding(result, key).outcome is Outcome.REFUSED
    assert finding(result, key).where.startswith(f"{tmp_path}/config.toml:")


def test_imports_are_imported_too(tmp_path: Path) -> None:
    (tmp_path / "conf.d").mkdir()
    (tmp_path / "conf.d" / "a.toml").write_text(f'version = 2\n[{CRI}]\nsandbox_image = "b/c:1"\nnot_a_key = 1\n')

    result = convert(tmp_path, 'version = 2\nimports = ["conf.d/*.toml"]\n')

    assert [f.where for f in result.refused] == [f"{tmp_path}/conf.d/a.toml:4:1"]
    assert config.parse(result.toml, "result").config.images.pinned_images == ("b/c:1",)


def test_old_versions_are_errors_with_a_position(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="config migrate") as old:
        convert(tmp_path, "[plugins.cri]\nx = 1\n")
    assert old.value.where == f"{tmp_path}/config.toml"


@pytest.mark.parametrize(
    "text, key",
    [
        (f'[{CRI}]\nmax_concurrent_downloads = "many"\n', "max_concurrent_downloads"),
        (f"[{CRI}]\nmax_concurrent_downloads = 0\n", "max_concurrent_downloads"),
        (f'[{CRI}]\nstream_server_port = "http"\n', "stream_server_port"),
        (f'[{CRI}.containerd]\ndefault_runtime_name = "gone"\n', "default_runtime_name"),
        (f'[{CRI}.containerd.runtimes.a]\nruntime_type = "io.containerd.kata.v2"\nsnapshotter = "devmapper"\n', "snapshotter"),
        (f'[{CRI}.registry.mirrors."docker.io"]\nendpoint = ["ftp://x"]\n', "endpoint"),
        (f'[{CRI}.registry.mirrors."docker.io"]\nendpoint = ["http://x"]\nrewrite = 1\n', "rewrite"),
        ('[debug]\nlevel = "loud"\n', "level"),
    ],
)
def test_a_value_that_is_not_possible_here_is_refused_and_the_rest_is_carried(tmp_path: Path, text: str, key: str) -> None:
    result = import_with_registry(tmp_path, f"version = 2\n[grpc]\nuid = 7\n{text}")

    assert [f.key.rpartition(".")[2] for f in result.refused] == [key]
    assert result.refused[0].where.startswith(f"{tmp_path}/config.toml:")
    assert config.parse(result.toml, "result").config.grpc.uid == 7


def test_two_keys_for_one_of_ours_have_to_agree(tmp_path: Path) -> None:
    runtimes = f"[{CRI}.containerd.runtimes"
    options = 'runtime_type = "io.containerd.runc.v2"\noptions.SystemdCgroup ='
    text = f"version = 2\n{runtimes}.a]\n{options} true\n{runtimes}.b]\n{options} false\n"

    assert [f.key.partition("runtimes.")[2] for f in convert(tmp_path, text).refused] == ["b.options.SystemdCgroup"]
    assert convert(tmp_path, text.replace("false", "true")).refused == []


def test_a_drop_in_is_read_with_the_keys_beside_it_and_decides(tmp_path: Path) -> None:
    (tmp_path / "conf.d").mkdir()
    runtime = f"[{CRI}.containerd.runtimes.a"
    (tmp_path / "conf.d" / "a.toml").write_text(f'version = 2\n{runtime}.options]\nBinaryName = "crun"\nSystemdCgroup = true\n')

    result = convert(
        tmp_path,
        f'version = 2\nimports = ["conf.d/*.toml"]\n{runtime}]\nruntime_type = "io.containerd.runc.v2"\n'
        f"{runtime}.options]\nSystemdCgroup = false\n",
    )

    loaded = config.parse(result.toml, "result").config
    assert result.refused == []
    assert (loaded.runtime.runtimes["a"].path, loaded.runtime.cgroup_driver) == ("crun", "systemd")
    assert finding(result, "SystemdCgroup").where == f"{tmp_path}/conf.d/a.toml:4:1"


def test_version_4_names_its_servers_as_plugins(tmp_path: Path) -> None:
    server = '[plugins."io.containerd.server.v1.'
    result = convert(
        tmp_path,
        f'version = 4\n{server}grpc"]\naddress = "/run/c.sock"\ngid = 12\n{server}ttrpc"]\nuid = 0\n{server}metrics"]\n'
        f'address = "127.0.0.1:1338"\n{server}debug"]\naddress = ""\n{server}grpc-tcp"]\naddress = ""\ntls_ca = "x"\n',
    )

    loaded = config.parse(result.toml, "result").config
    assert result.refused == []
    assert (loaded.grpc.gid, loaded.metrics.address) == (12, "127.0.0.1:1338")
    tcp = convert(tmp_path, f'version = 4\n{server}grpc-tcp"]\naddress = "0.0.0.0:1"\n')
    assert [f.key.rpartition(".")[2] for f in tcp.refused] == ["address"]
