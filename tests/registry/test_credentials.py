"""The node's credentials: files, programs, plugins, and the order they are asked in (A4.1, A4.2, C-R7)."""

from __future__ import annotations

import asyncio
import base64
import json
from pathlib import Path

import pytest

from imgsvc.base.errors import ImgsvcError, InvalidArgument, PermissionDenied, Unavailable
from imgsvc.base.reference import Reference
from imgsvc.registry.auth.credentials import CredentialSettings, NodeCredentials, StoredCredential
from imgsvc.registry.auth.dockerconfig import credential_from_cri, entry_for, normalised_key, parse_docker_config
from imgsvc.registry.auth.helpers import Provider, image_matches, parse_providers
from imgsvc.registry.interfaces import Credential, PullFailed
from tests.fakes.registry import FakeRegistry, Reply
from tests.registry.support import client_for, fails, hosts_d, image_of, run


def auth(user: str, password: str) -> str:
    return base64.b64encode(f"{user}:{password}".encode()).decode()


def program(directory: Path, name: str, script: str) -> Path:
    directory.mkdir(exist_ok=True)
    path = directory / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def find(settings: CredentialSettings, registry: str, repository: str = "app", directory: str = "") -> Credential | None:
    return run(NodeCredentials(settings).find(registry, repository, directories=(directory,) if directory else ()))


def secret_file(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o600)
    return path


@pytest.mark.parametrize(
    "fields, expected",
    [
        ({}, None),
        ({"username": "u", "password": "p"}, ("u", "p", "", "")),
        ({"auth": auth("u", "p:q")}, ("u", "p:q", "", "")),
        ({"auth": auth("u", "p\0\0")}, ("u", "p", "", "")),
        ({"auth": auth("u", "p").rstrip("=")}, ("u", "p", "", "")),
        ({"identity_token": "i"}, ("", "", "i", "")),
        ({"username": "<token>", "password": "i"}, ("", "", "i", "")),
        ({"registry_token": "r"}, ("", "", "", "r")),
    ],
)
def test_a4_6_all_fields_of_cri_authconfig(fields: dict[str, str], expected: tuple[str, ...] | None) -> None:
    found = credential_from_cri(**fields, server_address="https://index.docker.io/v1/")
    if expected is None:
        assert found is None
    else:
        assert found is not None
        assert (found.username, found.password, found.identity_token, found.registry_token) == expected
        assert (found.host, found.source) == ("docker.io", "CRI request")


@pytest.mark.parametrize("text", ["%%%", "bm9jb2xvbg==", "/w=="])
def test_a_broken_auth_is_said_without_quoting_it(text: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        credential_from_cri(auth=text)
    assert text not in str(caught.value)
    assert caught.value.__cause__ is None


def test_docker_and_podman_keys() -> None:
    assert normalised_key("https://index.docker.io/v1/") == "docker.io"
    assert normalised_key("quay.io/org/app") == "quay.io/org/app"
    raw = {"auths": {"quay.io": {"auth": auth("all", "1")}, "quay.io/org": {"auth": auth("org", "2")}, "x": {}, "y": "no"}}
    config = parse_docker_config(json.dumps(raw).encode(), "auth.json")
    found = [entry_for(config, "quay.io", repository) for repository in ("other", "org/app", "organic")]
    assert [c and c.username for c in found] == ["all", "org", "all"]
    assert found[1] is not None
    assert found[1].source == "auth.json (quay.io/org)"
    assert entry_for(config, "evil.io", "quay.io") is None


def test_the_order_of_sources(tmp_path: Path) -> None:
    directory = tmp_path / "hosts"
    directory.mkdir()
    bins = tmp_path / "bin"
    program(bins, "docker-credential-x", 'echo \'{"Username":"helper","Secret":"s"}\'')
    config = secret_file(tmp_path / "config.json", json.dumps({"auths": {"r.test": {"auth": auth("file", "s")}}, "credsStore": "x"}))
    toml = secret_file(directory / "credentials.toml", '[namespace]\nusername = "directory"\npassword = "s"\n')
    stored = {"r.test": StoredCredential("configured", "s")}
    everything = CredentialSettings((str(config),), hosts=stored, environ={"PATH": f"{bins}:/bin:/usr/bin"})

    def user(settings: CredentialSettings) -> str:
        found = find(settings, "r.test", directory=str(directory))
        assert found is not None
        assert found.host == "r.test"
        return found.username

    assert user(everything) == "directory"
    toml.unlink()
    assert user(everything) == "configured"
    without = CredentialSettings((str(config),), environ=everything.environ)
    assert user(without) == "file"
    config.write_text(json.dumps({"credsStore": "x"}))
    assert user(without) == "helper"
    config.write_text("{}")
    assert find(without, "r.test") is None


def test_credentials_of_a_directory_may_be_named_and_kept_in_files(tmp_path: Path) -> None:
    secret_file(tmp_path / "pw", "from-file\n")
    secret_file(tmp_path / "credentials.toml", '[robot]\nusername = "r"\npassword_file = "pw"\n[ci]\nidentity_token = "t"\n')
    node = NodeCredentials(CredentialSettings())
    robot = run(node.named("robot", (str(tmp_path),)))
    assert (robot.username, robot.password) == ("r", "from-file")
    assert robot.source == f"{tmp_path}/credentials.toml:1:2"
    assert run(node.named("ci", (str(tmp_path),))).identity_token == "t"
    with pytest.raises(InvalidArgument):
        run(node.named("absent", (str(tmp_path),)))


@pytest.mark.parametrize(
    "text, mode", [('[robot]\nusername = "u"\npassword = "p"\n', 0o644), ("[other]\npassword = 'x'\n", 0o600), ("[robot\n", 0o600)]
)
def test_a_wrong_credentials_file_ends_the_pull_before_anything_is_asked(tmp_path: Path, text: str, mode: int) -> None:
    with FakeRegistry() as fake:
        fake.add(image_of(), "library/app")
        hosts_d(tmp_path, {"docker.io": f'server = "{fake.url}"\ncredentials = "robot"\n'})
        secret_file(tmp_path / "docker.io" / "credentials.toml", text).chmod(mode)

        async def main() -> None:
            async with client_for(tmp_path, credentials=NodeCredentials(CredentialSettings())) as client:
                await client.resolve(Reference.parse("app"))

        error = fails(main())
        assert "credentials.toml" in error.where
        assert not fake.requests


def test_a_broken_config_json_costs_the_credential_not_the_public_image(tmp_path: Path) -> None:
    async def main() -> None:
        with FakeRegistry() as fake:
            fake.add(image_of(), "app")
            node = NodeCredentials(CredentialSettings((str(secret_file(tmp_path / "config.json", "{")),)))
            async with client_for(tmp_path / "hosts", credentials=node) as client:
                resolved = await client.resolve(Reference.parse(f"{fake.address}/app"))
            assert "config.json" in resolved.attempts[0].credential.reason

    run(main())


def test_files_others_may_read_are_refused(tmp_path: Path) -> None:
    path = secret_file(tmp_path / "credentials.toml", '[namespace]\nusername = "u"\npassword = "p"\n')
    path.chmod(0o644)
    with pytest.raises(PermissionDenied) as caught:
        find(CredentialSettings(), "r.test", directory=str(tmp_path))
    assert caught.value.hint == f"chmod 600 {path}"


@pytest.mark.parametrize(
    "text",
    [
        'username = "u"',
        "[namespace]\n",
        "[namespace]\nuser = 'x'",
        "[namespace]\npassword = 'a'\npassword_file = 'b'",
        "[x]\npassword = 1\n[namespace]",
    ],
)
def test_credentials_toml_is_strict(tmp_path: Path, text: str) -> None:
    secret_file(tmp_path / "credentials.toml", text)
    with pytest.raises(ImgsvcError) as caught:
        find(CredentialSettings(), "r.test", directory=str(tmp_path))
    assert "credentials.toml" in caught.value.where


def helper_settings(tmp_path: Path, script: str, **changes: float) -> CredentialSettings:
    program(tmp_path / "bin", "docker-credential-test", script)
    return CredentialSettings(helpers={"r.test": "test", "docker.io": "test"}, environ={"PATH": f"{tmp_path}/bin:/usr/bin:/bin"}, **changes)  # type: ignore[arg-type]


def test_helpers_are_asked_in_dockers_way(tmp_path: Path) -> None:
    script = f'cat > {tmp_path}/asked; echo \'{{"ServerURL":"x","Username":"u","Secret":"s"}}\''
    settings = helper_settings(tmp_path, script)
    found = find(settings, "docker.io")
    assert found is not None
    assert (found.username, found.password, found.source) == ("u", "s", "docker-credential-test")
    assert (tmp_path / "asked").read_text() == "https://index.docker.io/v1/"
    find(settings, "r.test")
    assert (tmp_path / "asked").read_text() == "r.test"


def test_a_helper_that_knows_nothing_is_no_error(tmp_path: Path) -> None:
    settings = helper_settings(tmp_path, "echo credentials not found in native keychain; exit 1")
    assert find(settings, "r.test") is None


def test_an_identity_token_from_a_helper(tmp_path: Path) -> None:
    found = find(helper_settings(tmp_path, 'echo \'{"Username":"<token>","Secret":"id"}\''), "r.test")
    assert found is not None
    assert (found.username, found.identity_token) == ("", "id")


@pytest.mark.parametrize(
    "script, category",
    [
        ("exit 3", Unavailable),
        ("echo not json", Unavailable),
        ("echo '{}'", Unavailable),
        ("sleep 30", Unavailable),
        ("head -c 3000000 /dev/zero", Unavailable),
    ],
)
def test_c_r7_a_failed_helper_is_an_error_of_that_helper(tmp_path: Path, script: str, category: type[ImgsvcError]) -> None:
    with pytest.raises(category):
        find(helper_settings(tmp_path, script, timeout_s=0.5), "r.test")


def test_c_r7_a_missing_helper(tmp_path: Path) -> None:
    with pytest.raises(Unavailable) as caught:
        find(CredentialSettings(helpers={"r.test": "surely-not-installed"}, environ={}), "r.test")
    assert caught.value.where == "docker-credential-surely-not-installed"


def test_c_r7_a_failed_helper_does_not_bring_in_another_registrys_secret(tmp_path: Path) -> None:
    async def main() -> None:
        with FakeRegistry() as fake:
            fake.rule(lambda r: Reply(401, {"WWW-Authenticate": "Basic"}) if not r.authorization else None)
            config = secret_file(
                tmp_path / "config.json",
                json.dumps(
                    {"auths": {"docker.io": {"auth": auth("hub", "hub-secret")}}, "credHelpers": {fake.address: "surely-not-installed"}}
                ),
            )
            node = NodeCredentials(CredentialSettings((str(config),), environ={}))
            async with client_for(tmp_path / "hosts", credentials=node) as client:
                with pytest.raises(PullFailed) as caught:
                    await client.resolve(Reference.parse(f"{fake.address}/app"))
            assert caught.value.code == "UNAUTHENTICATED"
            assert "docker-credential-surely-not-installed" in str(caught.value)
            assert not any(request.authorization for request in fake.requests)

    run(main())


def provider_settings(tmp_path: Path, script: str, match: str = "*.test") -> CredentialSettings:
    program(tmp_path / "plugins", "ecr", script)
    config = {
        "kind": "CredentialProviderConfig",
        "apiVersion": "kubelet.config.k8s.io/v1",
        "providers": [
            {
                "name": "ecr",
                "matchImages": [match],
                "defaultCacheDuration": "1h",
                "apiVersion": "credentialprovider.kubelet.k8s.io/v1",
                "args": ["--x"],
                "env": [{"name": "REGION", "value": "eu"}],
            }
        ],
    }
    path = tmp_path / "providers.json"
    path.write_text(json.dumps(config))
    return CredentialSettings(provider_config=str(path), provider_directory=str(tmp_path / "plugins"), environ={"PATH": "/usr/bin:/bin"})


def response(tmp_path: Path, kind: str, duration: str, pattern: str = "*.test") -> str:
    answer = {
        "kind": "CredentialProviderResponse",
        "apiVersion": "credentialprovider.kubelet.k8s.io/v1",
        "cacheKeyType": kind,
        "cacheDuration": duration,
        "auth": {pattern: {"username": "u", "password": "p"}},
    }
    return f"cat > {tmp_path}/asked; echo run >> {tmp_path}/runs; echo \"$REGION $1\" > {tmp_path}/env; echo '{json.dumps(answer)}'"


def test_kubelet_plugins(tmp_path: Path) -> None:
    node = NodeCredentials(provider_settings(tmp_path, response(tmp_path, "Registry", "1h")))

    async def main() -> None:
        found = await node.find("r.test", "team/app", directories=())
        assert found is not None
        assert (found.username, found.password, found.host) == ("u", "p", "r.test")
        assert json.loads((tmp_path / "asked").read_text())["image"] == "r.test/team/app"
        assert (tmp_path / "env").read_text() == "eu --x\n"
        await node.find("r.test", "team/other", directories=())
        assert (tmp_path / "runs").read_text().count("run") == 1, "cached for the registry"
        await node.find("s.test", "team/other", directories=())
        assert (tmp_path / "runs").read_text().count("run") == 2
        await node.find("r.test", "team/app", directories=(), renew=True)
        assert (tmp_path / "runs").read_text().count("run") == 3, "asked anew when the last one was refused"
        assert await node.find("quay.io", "app", directories=()) is None

    run(main())


def test_a4_2_a_plugins_answer_is_kept_only_as_long_as_it_says(tmp_path: Path) -> None:
    node = NodeCredentials(provider_settings(tmp_path, response(tmp_path, "Global", "100ms")))

    async def main() -> None:
        for _ in range(2):
            await node.find("r.test", "app", directories=())
        assert (tmp_path / "runs").read_text().count("run") == 1
        await asyncio.sleep(0.12)
        await node.find("r.test", "app", directories=())
        assert (tmp_path / "runs").read_text().count("run") == 2

    run(main())


@pytest.mark.parametrize(
    "pattern, image, matches",
    [
        ("*.dkr.ecr.*.amazonaws.com", "1.dkr.ecr.eu-west-1.amazonaws.com/app", True),
        ("*.amazonaws.com", "1.dkr.ecr.eu-west-1.amazonaws.com/app", False),
        ("r.test/team", "r.test/team/app", True),
        ("r.test/team", "r.test/other/app", False),
        ("r.test:5000", "r.test/app", False),
        ("https://r.test", "r.test/app", True),
    ],
)
def test_plugin_patterns(pattern: str, image: str, matches: bool) -> None:
    assert image_matches(pattern, image) == matches


PROVIDERS = """\
apiVersion: kubelet.config.k8s.io/v1
kind: CredentialProviderConfig
providers:
- name: ecr            # as on every node of that cloud
  matchImages: ["*.dkr.ecr.*.amazonaws.com", r.test/team]
  defaultCacheDuration: 12h
  apiVersion: credentialprovider.kubelet.k8s.io/v1
  args: [--x]
  env:
  - {name: REGION, value: eu}
"""


def test_the_kubelets_own_file_is_yaml() -> None:
    assert parse_providers(PROVIDERS.encode(), "p.yaml") == [
        Provider(
            "ecr",
            ("*.dkr.ecr.*.amazonaws.com", "r.test/team"),
            43200.0,
            "credentialprovider.kubelet.k8s.io/v1",
            ("--x",),
            (("REGION", "eu"),),
        )
    ]


@pytest.mark.parametrize(
    "before, after, where, what",
    [
        ("- name: ecr ", "- nam: ecr ", "p.yaml: providers[0]", "name is missing"),
        ("12h", "12", "p.yaml: providers[0]", "defaultCacheDuration is not"),
        ("12h", "12 hours", "p.yaml: providers[0]", "invalid duration"),
        ("args: [--x]", "args: --x", "p.yaml: providers[0]", "args is not"),
        ("value: eu", "value: 1", "p.yaml: providers[0]", "env is not"),
        ("- name: ecr", "- ecr", "p.yaml:5:3", "not valid YAML"),
        ("kind: Cred", "kind: Kred", "p.yaml", "not a CredentialProviderConfig"),
        ("  args", "\targs", "p.yaml:8:1", "not valid YAML"),
    ],
)
def test_what_is_wrong_with_the_kubelets_file_is_named(before: str, after: str, where: str, what: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse_providers(PROVIDERS.replace(before, after, 1).encode(), "p.yaml")
    assert caught.value.where == where
    assert what in caught.value.what


def test_a_plugin_that_needs_a_pod_is_not_run_and_a_directory_is_read_in_order(tmp_path: Path) -> None:
    configs = tmp_path / "providers.d"
    configs.mkdir()
    needy = PROVIDERS.replace("name: ecr", "name: needy") + "  tokenAttributes: {requireServiceAccount: true}\n"
    (configs / "20.yml").write_text(PROVIDERS)
    (configs / "README").write_text("not read")
    program(tmp_path / "plugins", "ecr", response(tmp_path, "Image", "1h", "r.test/team"))
    settings = CredentialSettings(
        provider_config=str(configs), provider_directory=str(tmp_path / "plugins"), environ={"PATH": "/usr/bin:/bin"}
    )
    found = find(settings, "r.test", "team/app")
    assert found is not None
    assert found.source == "credential provider ecr"
    (configs / "10.yaml").write_text(needy)
    with pytest.raises(Unavailable, match="needy"):
        find(settings, "r.test", "team/app")


def test_a4_2_a_credential_that_was_replaced_meanwhile_is_picked_up(tmp_path: Path) -> None:
    """A 401 with a stored credential makes us look again once."""

    async def main() -> None:
        with FakeRegistry() as fake:
            fake.add(image_of(), "app")
            good = f"Basic {auth('u', 'new')}"
            config = tmp_path / "config.json"

            def write(password: str) -> None:
                secret_file(config, json.dumps({"auths": {fake.address: {"auth": auth("u", password)}}}))

            def rule(request: object) -> Reply | None:
                authorization = fake.requests[-1].authorization
                if authorization == good:
                    return None
                if authorization:
                    write("new")
                return Reply(401, {"WWW-Authenticate": "Basic"})

            write("old")
            fake.rule(rule)
            async with client_for(tmp_path / "hosts", credentials=NodeCredentials(CredentialSettings((str(config),)))) as client:
                await client.resolve(Reference.parse(f"{fake.address}/app"))

    run(main())


def test_a4_3_credential_policies_of_hosts(tmp_path: Path) -> None:
    async def main() -> None:
        with FakeRegistry() as fake:
            fake.add(image_of(), "library/app")
            fake.rule(lambda r: Reply(401, {"WWW-Authenticate": "Basic"}) if not r.authorization else None)
            caller = Credential("CRI request", "caller", "secret")
            config = secret_file(tmp_path / "config.json", json.dumps({"auths": {fake.address: {"auth": auth("own", "s")}}}))
            node = NodeCredentials(CredentialSettings((str(config),)))
            root = tmp_path / "hosts"
            expected = {"namespace": "caller", "robot": "robot", "": "own", "none": None}
            for policy, user in expected.items():
                line = f'credentials = "{policy}"\n' if policy else ""
                hosts_d(root, {"docker.io": f'server = "{fake.url}"\n{line}'})
                secret_file(root / "docker.io" / "credentials.toml", '[robot]\nusername = "robot"\npassword = "s"\n')
                fake.requests.clear()
                async with client_for(root, credentials=node) as client:
                    try:
                        await client.resolve(Reference.parse("app"), caller)
                    except PullFailed:
                        assert user is None
                users = {base64.b64decode(r.authorization[6:]).decode().split(":")[0] for r in fake.requests if r.authorization}
                assert users == ({user} if user else set())

    run(main())
