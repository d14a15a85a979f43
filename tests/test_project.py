"""What the project's own files promise one another."""

from __future__ import annotations

import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from scripts import lock, setup
from tests.test_layering import imports, modules

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCKED = dict(pin.split("==") for file in setup.LOCKS["test"] for pin in lock.pins(file))
GROUPS = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
WANTED = [Requirement(text) for group in GROUPS for text in group]


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.parametrize("wanted", [r for r in WANTED if r.name != "imgsvc"], ids=lambda r: r.name)
def test_the_lock_fits_the_ranges(wanted: Requirement) -> None:
    versions = {canonical(name): version for name, version in LOCKED.items()}
    assert canonical(wanted.name) in versions
    assert wanted.specifier.contains(versions[canonical(wanted.name)])


def test_S18_every_file_that_is_installed_has_a_hash_and_the_build_is_locked_too() -> None:
    for file in setup.LOCKS["test"]:
        releases = [text for text in file.read_text().replace("\\\n", "").splitlines() if not text.startswith("#")]
        assert releases
        assert all(re.fullmatch(r"[\w.-]+==\S+( +--hash=sha256:[0-9a-f]{64})+", text) for text in releases)
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    run = {canonical(pin.split("==")[0]) for pin in lock.pins(setup.LOCKS["run"][0])}
    assert {canonical(Requirement(text).name) for text in (*build, *PROJECT["dependencies"], lock.EDITABLE)} <= run


def test_every_runtime_dependency_has_a_range() -> None:
    for text in PROJECT["dependencies"]:
        assert {s.operator for s in Requirement(text).specifier} == {">=", "<"}, text


def test_the_daemon_needs_fewer_debian_packages_than_the_tests() -> None:
    run, test = setup.wanted_packages("run"), setup.wanted_packages("test")
    assert {"runc", "crun", "conmon", "containernetworking-plugins", "iptables"} <= run.keys() < test.keys()
    assert all(effect for effect in test.values())
    assert setup.SERVICES.keys() <= test.keys()


def test_the_environment_is_made_anew_when_its_room_differs() -> None:
    assert setup.fingerprint("run") != setup.fingerprint("test")
    assert setup.fingerprint("run") == setup.fingerprint("run")


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "docs/decisions/README.md"])
def test_links_of_pages_lead_to_files(page: str) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / page).read_text())
    assert [link for link in links if not (ROOT / page).parent.joinpath(link).exists()] == []


def test_every_decision_is_listed() -> None:
    decisions = ROOT / "docs" / "decisions"
    listed = set(re.findall(r"\]\(([\w.-]+\.md)\)", (decisions / "README.md").read_text()))
    assert listed == {page.name for page in decisions.glob("*.md")} - {"README.md"}


def test_commands_that_contributors_are_told_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    fenced = "".join(re.findall(r"```sh\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL))
    told = set(re.findall(r"^make ([\w-]+)", fenced, re.MULTILINE))
    assert {"quick", "test"} <= told <= targets
    assert [
        path for path in re.findall(r"`((?:tests|docs)/[\w./-]+)`", (ROOT / "CONTRIBUTING.md").read_text()) if not (ROOT / path).exists()
    ] == []


# Words that say who acts where the text should name the process, caller or file; and papers that are not in this repository.
DIALECT = re.compile(
    r"\b(somebody|anybody|everybody|whoever|anew|those who|(is|are) told of|st(an|oo)ds? for|what it knew|leave to (use|decrypt|run))\b"
    r"|\bnobody\b(?! =|\}|, )|(?<![-\w])(needs|contract|runtime|field|layout)\.md\b|\bfacts/",
    re.IGNORECASE,
)


def test_texts_are_plain_english_and_cite_what_readers_have() -> None:
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")]
    sources = [path for path in (ROOT / "imgsvc").rglob("*.py") if path.parent.name != "api"]
    found = [
        f"{path.relative_to(ROOT)}:{number}: {match[0]}"
        for path in (*pages, *sources)
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if (match := DIALECT.search(line))
    ]
    assert found == []


# Declared for httpcore, which imports it at every lock where it is there, and looks for it where it is not.
FOR_OTHERS = {"sniffio"}


def test_what_is_declared_is_imported_and_what_is_imported_is_declared() -> None:
    provided = {top: {canonical(name) for name in names} for top, names in packages_distributions().items() if not top.startswith("_")}
    mine = sys.stdlib_module_names | {"imgsvc"}
    tops = {name.split(".")[0] for file in modules().values() for name in imports(file)} - mine
    groups = [text for name, group in PROJECT["optional-dependencies"].items() if name != "test" for text in group]
    declared = {canonical(Requirement(text).name) for text in (*PROJECT["dependencies"], *groups)}
    # Several distributions may share a namespace, as google: one that is declared is meant.
    used = {top: provided.get(top, {top}) & declared or provided.get(top, {top}) for top in tops}
    undeclared = {top: names for top, names in used.items() if not names & declared}
    assert not undeclared, "imported, but not in pyproject.toml"
    assert declared - set().union(*used.values()) == FOR_OTHERS, "in pyproject.toml, but imported nowhere"
