"""Finding the directory of a namespace, on real files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from imgsvc.base.errors import FailedPrecondition, ImgsvcError, InvalidArgument
from imgsvc.registry.hosts.hostdirs import HostDirectories, split_config_path
from imgsvc.registry.hosts.legacy import parse_legacy
from tests.registry.support import hosts_d

FILE = 'server = "https://{}"\n'


def used(root: Path, namespace: str) -> str:
    config, searched = HostDirectories((str(root),)).search(namespace)
    assert [place.path for place in searched if place.outcome == "used"] == ([config.directory] if config.directory else [])
    return Path(config.directory).name


def test_spellings_in_order(tmp_path: Path) -> None:
    for name in ("_default", "h.test:5000", "h.test_5000_"):
        assert used(tmp_path, "h.test:5000") != name
        hosts_d(tmp_path, {name: FILE.format("x")})
        assert used(tmp_path, "h.test:5000") == name
    assert used(tmp_path, "other.test") == "_default"


def test_a_directory_without_the_port_does_not_match_and_is_explained(tmp_path: Path) -> None:
    hosts_d(tmp_path, {"h.test": FILE.format("x")})
    config, searched = HostDirectories((str(tmp_path),)).search("h.test:5000")
    assert config.origin == "built-in default"
    assert any("does not match" in place.outcome and place.path.endswith("/h.test") for place in searched)


def test_the_first_root_wins_and_the_other_is_named(tmp_path: Path) -> None:
    first, second = tmp_path / "1", tmp_path / "2"
    hosts_d(first, {"_default": FILE.format("first")})
    hosts_d(second, {"docker.io": FILE.format("second")})
    config, searched = HostDirectories((str(first), str(second))).search("docker.io")
    assert config.hosts[0].url == "https://first/v2"
    assert any(place.path == str(second / "docker.io") and "not read" in place.outcome for place in searched)


def origin(root: Path, reference: str) -> str:
    """The directory whose file decides about a reference, below `root`."""
    namespace, _, repository = reference.partition("/")
    config, searched = HostDirectories((str(root),)).search(namespace, repository)
    assert [place.path for place in searched if place.outcome.startswith("used")] == [config.directory]
    return os.path.relpath(config.directory, root)


def test_a2_9_the_longest_prefix_of_the_repository_that_has_a_file_decides(tmp_path: Path) -> None:
    for name in ("r.test", "r.test/org", "r.test/org/team/app", "_default"):
        hosts_d(tmp_path, {name: FILE.format("x")})
    assert origin(tmp_path, "r.test/other") == "r.test"
    assert origin(tmp_path, "r.test/organic/app") == "r.test"
    assert origin(tmp_path, "r.test/org") == "r.test/org"
    assert origin(tmp_path, "r.test/org/team/other") == "r.test/org"
    assert origin(tmp_path, "r.test/org/team/app") == "r.test/org/team/app"
    assert origin(tmp_path, "r.test/org/team/app/sub") == "r.test/org/team/app"
    assert origin(tmp_path, "s.test/org/team/app") == "_default"
    _, searched = HostDirectories((str(tmp_path),)).search("r.test", "org/team/app")
    told = {place.path.removeprefix(f"{tmp_path}/"): place.outcome for place in searched}
    assert told["r.test/org/team/app"] == "used, for r.test/org/team/app and below"
    assert "has no hosts.toml" in told["r.test/org/team"]
    assert all("more specific" in told[name] for name in ("r.test/org", "r.test"))
    assert HostDirectories((str(tmp_path),)).namespaces() == [("r.test", ""), ("r.test", "org"), ("r.test", "org/team/app")]


def test_a2_9_all_but_one_prefix_can_be_blocked_and_one_prefix_too(tmp_path: Path) -> None:
    hosts_d(tmp_path, {"*.a.test": "blocked = true", "*.a.test/open": "", "b.test": "", "b.test/evil": "blocked = true"})
    (tmp_path / "*.a.test" / "open" / "hosts.toml").write_text("# the registry itself\n")
    directories = HostDirectories((str(tmp_path),))
    assert directories.lookup("x.a.test", "open/app").hosts[0].url == "https://x.a.test/v2"
    for namespace, repository, file in (("x.a.test", "opening/app", "*.a.test"), ("b.test", "evil/app", "b.test/evil")):
        with pytest.raises(FailedPrecondition, match="is blocked") as caught:
            directories.lookup(namespace, repository)
        assert caught.value.where == f"{tmp_path}/{file}/hosts.toml:1:1"
    assert not directories.lookup("b.test", "good/app").warnings, "a directory of prefixes needs no file of its own"


def test_a2_9_nothing_left_of_a_name_is_an_error(tmp_path: Path) -> None:
    hosts_d(tmp_path, {"r.test/app": '[host."https://m"]\nrewrite = ""\n'})
    directories = HostDirectories((str(tmp_path),))
    assert directories.lookup("r.test", "app/sub").hosts[0].repository("app/sub") == "sub"
    with pytest.raises(InvalidArgument) as caught:
        directories.lookup("r.test", "app")
    assert caught.value.where == f"{tmp_path}/r.test/app/hosts.toml:1:7"


def test_a_wrong_file_of_a_prefix_is_no_reason_to_take_the_registrys(tmp_path: Path) -> None:
    hosts_d(tmp_path, {"r.test": FILE.format("x"), "r.test/org": "server = 1\n"})
    directories = HostDirectories((str(tmp_path),))
    with pytest.raises(InvalidArgument, match="expected a string"):
        directories.lookup("r.test", "org/app")
    assert directories.lookup("r.test", "other").hosts[0].url == "https://x/v2"


def test_config_path_is_a_list() -> None:
    assert split_config_path("/a:/b::") == ("/a", "/b")


@pytest.mark.parametrize("content", [None, b""])
def test_certificates_without_hosts_toml(tmp_path: Path, content: bytes | None) -> None:
    directory = tmp_path / "r.test"
    directory.mkdir()
    (directory / "ca.crt").write_text("x")
    if content is not None:
        (directory / "hosts.toml").write_bytes(content)
    config = HostDirectories((str(tmp_path),)).lookup("r.test")
    assert config.hosts[0].tls.ca == (str(directory / "ca.crt"),)


def test_an_empty_directory_counts_and_is_warned_about(tmp_path: Path) -> None:
    (tmp_path / "r.test").mkdir()
    hosts_d(tmp_path, {"_default": FILE.format("x")})
    config = HostDirectories((str(tmp_path),)).lookup("r.test")
    assert config.hosts[0].url == "https://r.test/v2"
    assert "neither" in config.warnings[0]


def test_a_missing_certificate_is_an_error_at_its_host(tmp_path: Path) -> None:
    hosts_d(tmp_path, {"r.test": '[host."https://m"]\n  ca = "nope.pem"\n'})
    with pytest.raises(InvalidArgument) as caught:
        HostDirectories((str(tmp_path),)).lookup("r.test")
    assert caught.value.where == f"{tmp_path}/r.test/hosts.toml:1:7"
    assert "nope.pem" in caught.value.what


def test_what_is_there_but_no_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "r.test" / "hosts.toml").mkdir(parents=True)
    (tmp_path / "s.test").mkdir()
    os.mkfifo(tmp_path / "s.test" / "hosts.toml")
    (tmp_path / "t.test").mkdir()
    (tmp_path / "t.test" / "hosts.toml").symlink_to("gone")
    for namespace in ("r.test", "s.test", "t.test"):
        with pytest.raises(ImgsvcError):
            HostDirectories((str(tmp_path),)).lookup(namespace)


def test_legacy_tables_serve_where_no_directory_matches(tmp_path: Path) -> None:
    """A3.7: both at once is no reason to refuse to start."""
    legacy = parse_legacy(
        {"mirrors": {"docker.io": {"endpoint": ["https://m/custom", "https://n"]}, "*": {"endpoint": ["https://all"]}}}, "c.toml"
    )
    hosts_d(tmp_path, {"quay.io": FILE.format("from-file")})
    directories = HostDirectories((str(tmp_path),), legacy.hosts)
    assert [h.url for h in directories.lookup("quay.io").hosts] == ["https://from-file/v2"]
    assert [h.url for h in directories.lookup("docker.io").hosts] == [
        "https://m/custom",
        "https://n/v2",
        "https://registry-1.docker.io/v2",
    ]
    assert [h.url for h in directories.lookup("gcr.io").hosts] == ["https://all/v2", "https://gcr.io/v2"]
