"""hosts.toml as data: every key, every spelling, every mistake people make with it (needs.md A2, B1)."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imgsvc.base.errors import InvalidArgument
from imgsvc.base.tomlfile import loads
from imgsvc.registry.hosts.hosts import (
    ALL_CAPABILITIES,
    Capability,
    HostsConfig,
    Tls,
    canonical_name,
    default_host,
    directory_names,
    docker_certificates,
    is_local,
    parse_hosts,
    trusted_token_hosts,
)

DIR = "/etc/x/docker.io"


def parse(text: str, namespace: str = "docker.io", prefix: str = "") -> HostsConfig:
    return parse_hosts(loads(text, "hosts.toml"), namespace, f"{DIR}/{prefix}".rstrip("/"), prefix)


def urls(text: str, namespace: str = "docker.io") -> list[str]:
    return [host.url for host in parse(text, namespace).hosts]


def refusal(text: str, namespace: str = "docker.io") -> InvalidArgument:
    with pytest.raises(InvalidArgument) as caught:
        parse(text, namespace)
    return caught.value


def test_hosts_keep_the_files_order_and_the_server_comes_last() -> None:
    text = 'server = "https://s"\n[host."https://z"]\n[host."https://a"]\n[host."https://z".header]\nx = "1"\n[host."https://m"]\n'
    assert urls(text) == ["https://z/v2", "https://a/v2", "https://m/v2", "https://s/v2"]
    assert [host.origin for host in parse(text).hosts] == ["hosts.toml:2:7", "hosts.toml:3:7", "hosts.toml:6:7", "hosts.toml:1:1"]


@pytest.mark.parametrize(
    "namespace, url",
    [
        ("docker.io", "https://registry-1.docker.io/v2"),
        ("quay.io", "https://quay.io/v2"),
        ("registry.corp:5000", "https://registry.corp:5000/v2"),
        ("localhost", "https://localhost/v2"),
        ("localhost:443", "https://localhost:443/v2"),
        ("localhost:80", "http://localhost:80/v2"),
        ("localhost:5000", "http://localhost:5000/v2"),
        ("127.0.0.1:5000", "http://127.0.0.1:5000/v2"),
        ("[::1]:5000", "http://[::1]:5000/v2"),
        ("10.0.0.1:5000", "https://10.0.0.1:5000/v2"),
    ],
)
def test_without_server_the_registry_itself_is_last(namespace: str, url: str) -> None:
    assert urls('[host."https://m"]\n', namespace) == ["https://m/v2", url]
    assert default_host(namespace, "").url == url
    assert default_host(namespace, "").canonical


def test_localhost_tries_tls_without_verifying_before_http() -> None:
    host = default_host("localhost:5000", "")
    assert (host.try_tls_first, host.tls.skip_verify, host.downgrade_is_safe) == (True, True, True)
    assert not default_host("localhost:80", "").try_tls_first
    configured = default_host("localhost:5000", "", Tls(ca=("/ca",)))
    assert not configured.downgrade_is_safe


@pytest.mark.parametrize("spelling", ["docker.io", "https://docker.io", "https://index.docker.io/", "https://registry-1.docker.io"])
def test_docker_hubs_names_are_one_registry(spelling: str) -> None:
    host = parse(f'server = "{spelling}"').hosts[-1]
    assert (host.url, host.canonical) == ("https://registry-1.docker.io/v2", True)


@pytest.mark.parametrize(
    "written, override, url",
    [
        ("mirror.test", False, "https://mirror.test/v2"),
        ("http://mirror.test:80", False, "http://mirror.test:80/v2"),
        ("https://mirror.test/", False, "https://mirror.test/v2"),
        ("https://mirror.test/v2", False, "https://mirror.test/v2"),
        ("https://mirror.test/v2/", False, "https://mirror.test/v2"),
        ("https://mirror.test/a//b/../c", False, "https://mirror.test/a/c/v2"),
        ("https://mirror.test/v2/proj", False, "https://mirror.test/v2/proj/v2"),
        ("https://mirror.test/v2/proj", True, "https://mirror.test/v2/proj"),
        ("https://mirror.test", True, "https://mirror.test"),
        ("https://MIRROR.test", False, "https://mirror.test/v2"),
        ("https://[2001:db8::1]:5000", False, "https://[2001:db8::1]:5000/v2"),
    ],
)
def test_the_api_path(written: str, override: bool, url: str) -> None:
    assert urls(f'[host."{written}"]\noverride_path = {str(override).lower()}\n')[0] == url


def test_a2_4_a_path_with_v2_in_the_middle_is_warned_about() -> None:
    config = parse('[host."https://h/v2/proj"]\n')
    assert "https://h/v2/proj/v2/<repository>" in config.warnings[0]
    assert "override_path" in config.warnings[0]
    assert not parse('[host."https://h/v2/proj"]\noverride_path = true\n').warnings


@pytest.mark.parametrize(
    "url",
    [
        "*",
        "https://*",
        "https://docker.i://x",
        "ftp://h",
        "https://",
        "https://h:99999",
        "https://u:p@h",
        "https://h?x=1",
        "https://h#x",
        "h h",
    ],
)
def test_a2_8_urls_are_checked(url: str) -> None:
    assert refusal(f'server = "{url}"').where == "hosts.toml:1:1"
    assert refusal(f'[host."{url}"]').where == "hosts.toml:1:7"


@pytest.mark.parametrize(
    "text, what",
    [
        ("[host.x]\ncapabilities = ['fly']", "unknown capability"),
        ("capabilities = 'fly'", "unknown capability"),
        ("capabilities = [1]", "list of strings"),
        ("skip_verify = 'yes'", "expected true or false"),
        ("dial_timeout = 5", "expected a string"),
        ("dial_timeout = '5'", "invalid duration"),
        ("client = 7", "client must be"),
        ("client = [['a', 'b', 'c']]", "pair"),
        ("client = [['']]", "pair"),
        ("ca = [['x']]", "list of strings"),
        ("header = 'x'", "expected a table"),
        ("[header]\n'bad name' = 'x'", "not a header name"),
        ('[header]\nx = "a\\nb"', "does not allow"),
        ("proxy = 'socks5://x'", "not a URL"),
        ("credentials = 'a b'", "not a name"),
        ("host = 'x'", "expected a table"),
        ("[host]\ncapabilities = ['pull']", "not a table"),
        ("[host.x]\nserver = 'y'", "inside a [host] table"),
        ("[host.x]\nplain_http = true", "unknown key"),
        ("auth = 'x'", "unknown key"),
        ("rewrites = 'x'", "unknown key"),
        ("[host.mirror.example.com]\nskip_verify = true", 'a table "example" inside [host.mirror]'),
        ("[[host]]\nurl = 'https://m'", "host is a list, expected a table"),
        ("fallback = false", "no host to ask"),
        ("fallback = false\nserver = 'https://x'", "contradict"),
    ],
)
def test_a2_3_what_is_not_understood_is_refused(text: str, what: str) -> None:
    error = refusal(text)
    assert what in error.what
    assert error.where.startswith("hosts.toml:")


def test_capabilities_are_case_insensitive_and_default_to_all() -> None:
    hosts = parse(
        'capabilities = ["RESOLVE"]\n[host.a]\ncapabilities = ["Pull", "referrers"]\n[host.b]\n[host.c]\ncapabilities = []\n'
    ).hosts
    assert [host.capabilities for host in hosts] == [
        {Capability.PULL, Capability.REFERRERS},
        ALL_CAPABILITIES,
        ALL_CAPABILITIES,
        {Capability.RESOLVE},
    ]


def test_root_level_fields_are_the_servers() -> None:
    text = 'ca = "root.pem"\nskip_verify = true\ndial_timeout = "3s"\n[header]\nx = ["1", "2"]\n[host.m]\n'
    mirror, server = parse(text).hosts
    assert (mirror.tls, mirror.headers, mirror.dial_timeout) == (Tls(), (), None)
    assert server.tls == Tls(ca=(f"{DIR}/root.pem",), skip_verify=True)
    assert (server.headers, server.dial_timeout, server.url) == ((("x", "1"), ("x", "2")), 3.0, "https://registry-1.docker.io/v2")
    assert server.canonical


@pytest.mark.parametrize(
    "client, pairs",
    [
        ('"c.pem"', [("c.pem", "")]),
        ('["c.pem", "/abs/d.pem"]', [("c.pem", ""), ("/abs/d.pem", "")]),
        ('[["c.cert", "c.key"], ["d.pem", ""]]', [("c.cert", "c.key"), ("d.pem", "")]),
    ],
)
def test_all_three_forms_of_client(client: str, pairs: list[tuple[str, str]]) -> None:
    def absolute(name: str) -> str:
        return name if name.startswith("/") or not name else f"{DIR}/{name}"

    expected = tuple((absolute(a), absolute(b)) for a, b in pairs)
    assert parse(f"client = {client}").hosts[0].tls.client == expected


@pytest.mark.parametrize(
    "url, options, tls_first",
    [
        ("http://h:5000", "skip_verify = false", True),
        ("http://h:5000", "ca = 'x'", True),
        ("http://h:5000", "", False),
        ("http://h:80", "ca = 'x'", False),
        ("http://h", "ca = 'x'", False),
        ("https://h:5000", "ca = 'x'", False),
    ],
)
def test_http_hosts_with_tls_options(url: str, options: str, tls_first: bool) -> None:
    host = parse(f'[host."{url}"]\n{options}\n').hosts[0]
    assert host.try_tls_first == tls_first
    assert not host.downgrade_is_safe


def test_our_additions() -> None:
    text = 'fallback = false\n[host.m]\nproxy = "http://p:1"\ncredentials = "robot"\nns = false\ntoken_hosts = "auth.m"\ninsecure_credentials = true\n'
    (host,) = parse(text).hosts
    assert (host.proxy, host.credential_policy, host.sends_ns, host.insecure_credentials) == ("http://p:1", "robot", False, True)
    assert trusted_token_hosts(host) == {"m", "auth.m"}
    assert parse("blocked = true").blocked.startswith("hosts.toml:1:1")
    assert not parse("blocked = true").hosts


@pytest.mark.parametrize(
    "prefix, rewrite, name, asked",
    [
        ("", None, "library/nginx", "library/nginx"),
        ("", "hub", "library/nginx", "hub/library/nginx"),
        ("", "", "library/nginx", "library/nginx"),
        ("library", None, "library/nginx", "library/nginx"),
        ("library", "hub/official", "library/nginx", "hub/official/nginx"),
        ("library", "", "library/nginx", "nginx"),
        ("org/app", "team/app-mirror", "org/app", "team/app-mirror"),
        ("org/app", "team", "org/app/sub", "team/sub"),
        ("org/app", "", "org/app", ""),
        ("org/app", "team", "org/application", ""),
    ],
)
def test_a2_9_rewrite_takes_the_place_of_the_files_prefix(prefix: str, rewrite: str | None, name: str, asked: str) -> None:
    line = "" if rewrite is None else f'rewrite = "{rewrite}"\n'
    table, server = parse(f'{line}[host."https://m"]\n{line}', prefix=prefix).hosts
    assert table.repository(name) == server.repository(name) == asked


@pytest.mark.parametrize("value", ["'/x'", "'x/'", "'a//b'", "'Upper'", "'../x'", "'^(.*)$'", "['x']", "true", "{'^(.*)$' = 'm/$1'}"])
def test_a2_9_rewrite_is_the_start_of_a_repositorys_name(value: str) -> None:
    error = refusal(f"[host.x]\nrewrite = {value}")
    assert error.where == "hosts.toml:2:1"
    assert "rewrite = " in error.hint


def test_credentials_files_above_count_down_to_the_registrys() -> None:
    assert parse("").directories == (DIR,)
    assert parse("", prefix="org/app").directories == (f"{DIR}/org/app", f"{DIR}/org", DIR)


def test_credentials_go_to_the_namespaces_own_host_by_default() -> None:
    mirror, server = parse('[host."https://m"]\n').hosts
    assert (mirror.credential_policy, server.credential_policy) == ("", "namespace")
    (replaced,) = parse('server = "https://m"\n').hosts
    assert replaced.credential_policy == "", "a mirror as server is a mirror"


def test_known_token_servers() -> None:
    assert "auth.docker.io" in trusted_token_hosts(default_host("docker.io", ""))
    assert trusted_token_hosts(default_host("quay.io", "")) == {"quay.io"}


@pytest.mark.parametrize(
    "namespace, names",
    [
        ("docker.io", ["docker.io", "_default"]),
        ("h.test:5000", ["h.test_5000_", "h.test:5000", "_default"]),
        ("a.b.corp.test", ["a.b.corp.test", "*.b.corp.test", "*.corp.test", "_default"]),
        ("a.corp.test:5000", ["a.corp.test_5000_", "a.corp.test:5000", "*.corp.test_5000_", "_default"]),
        ("10.1.2.3", ["10.1.2.3", "_default"]),
        ("[::1]:5000", ["[::1]_5000_", "[::1]:5000", "_default"]),
        ("[::1]", ["[::1]", "_default"]),
    ],
)
def test_directory_names(namespace: str, names: list[str]) -> None:
    assert directory_names(namespace) == names


@pytest.mark.parametrize("text, name", [("https://index.docker.io/v1/", "docker.io"), ("Registry.Corp:5000/v2/", "registry.corp:5000")])
def test_canonical_names(text: str, name: str) -> None:
    assert canonical_name(text) == name


@pytest.mark.parametrize(
    "name, local", [("localhost", True), ("127.9.9.9:1", True), ("[::1]:5", True), ("localhost.evil", False), ("10.0.0.1", False)]
)
def test_is_local(name: str, local: bool) -> None:
    assert is_local(name) == local


def test_dockers_certificate_directory() -> None:
    config = docker_certificates("r.test", "/d", ["b.crt", "a.crt", "c.cert", "c.key", "lone.cert", "other.txt"])
    (host,) = config.hosts
    assert host.tls.ca == ("/d/a.crt", "/d/b.crt")
    assert host.tls.client == (("/d/c.cert", "/d/c.key"), ("/d/lone.cert", ""))
    assert host.canonical


_fragments = st.sampled_from(
    [
        "server = ",
        "[host.",
        "]",
        '"https://a"',
        '"*"',
        "capabilities = ",
        "['pull']",
        "\n",
        "header",
        " = ",
        "x",
        "client",
        "[[",
        "]]",
        "true",
        "#",
    ]
)


@given(st.lists(_fragments, max_size=14))
def test_any_text_is_understood_or_refused(parts: list[str]) -> None:
    with contextlib.suppress(InvalidArgument):
        assert parse("".join(parts)).hosts
