"""Imports point down only, and the directories below imgsvc say where down is."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

import imgsvc

SOURCE = Path(imgsvc.__file__).parent
GENERATED = re.compile(r"imgsvc\.api\.\w+_pb2(_grpc)?")
# Top to bottom. A module imports from its own directory and from floors below; the directories of one floor do not know each other.
FLOORS: Final = (
    {"cli"},
    {"daemon"},
    {"images"},
    {"registry", "content", "snapshot", "decrypt", "runtime"},
    {"config"},
    {"base"},
    {"api"},
)
KNOW_CONFIG: Final = {"cli", "daemon", "config"}
SPEAK_GRPC: Final = {"cli", "daemon", "registry", "content", "snapshot", "decrypt", "runtime", "api"}
# Rules that work on what they are handed and open nothing; images/ may call them beside the interfaces.
PURE: Final = {"imgsvc.content.verify"}
OPENS_THINGS: Final = {"asyncio", "ctypes", "httpcore", "httpx", "pathlib", "shutil", "socket", "subprocess", "tempfile"}


@functools.cache
def modules() -> dict[str, Path]:
    """Dotted name → file, of everything that is written by hand."""
    files = (p for p in SOURCE.rglob("*.py") if "_pb2" not in p.name)
    return {".".join(("imgsvc", *p.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__"): p for p in files}


def imports(file: Path) -> Iterator[str]:
    """Dotted names of what a file imports, anywhere in it: "a" for `import a`, "a.b" for `from a import b`."""
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own(file: Path) -> set[str]:
    """Modules of imgsvc that a file imports from, written by hand or generated."""
    found = set()
    for name in imports(file):
        module = next((n for n in (name, name.rpartition(".")[0]) if n in modules() or GENERATED.fullmatch(n)), None)
        if module and module != "imgsvc":
            found.add(module)
    return found


def directory(module: str) -> str:
    """Name below imgsvc: "imgsvc.registry.client" is in "registry"."""
    return module.split(".")[1]


def floor(module: str) -> int:
    """0 is the top."""
    return next(number for number, names in enumerate(FLOORS) if directory(module) in names)


def test_every_directory_has_a_floor_and_nothing_lies_beside_them() -> None:
    assert {p.name for p in SOURCE.iterdir() if p.is_dir() and p.name != "__pycache__"} == set().union(*FLOORS)
    assert [p.name for p in SOURCE.glob("*.py")] == ["__init__.py"]


@pytest.mark.parametrize("module", sorted(set(modules()) - {"imgsvc"}))
def test_imports_point_down(module: str) -> None:
    for other in sorted(own(modules()[module])):
        if directory(other) == directory(module):
            continue
        assert floor(other) > floor(module), f"{module} imports {other}, which is not below it"
        assert directory(other) != "config" or directory(module) in KNOW_CONFIG, f"{module} knows the configuration: {other}"


@pytest.mark.parametrize("module", sorted(m for m in modules() if m.startswith("imgsvc.images.")))
def test_images_sees_packages_through_their_interfaces(module: str) -> None:
    seen = {m for m in own(modules()[module]) if directory(m) in FLOORS[3]} - PURE
    assert all(m.endswith(".interfaces") or m.count(".") == 1 for m in seen), f"{module} sees {sorted(seen)}"
    for package in (m for m in seen if m.count(".") == 1):
        assert f"{package}.interfaces" in seen, f"{module} takes more than the interfaces of {package}"


@pytest.mark.parametrize("module", sorted(PURE))
def test_rules_open_nothing(module: str) -> None:
    assert not {name.partition(".")[0] for name in imports(modules()[module])} & OPENS_THINGS


def test_images_config_and_base_do_not_speak_grpc() -> None:
    for module, file in modules().items():
        if module != "imgsvc" and directory(module) not in SPEAK_GRPC:
            assert not {n for n in imports(file) if n.split(".")[0] in ("grpc", "google")}, module
            assert not {n for n in imports(file) if n.startswith("imgsvc.api")}, module


def test_modules_do_not_import_in_a_circle() -> None:
    graph = {module: own(file) & modules().keys() for module, file in modules().items() if module != "imgsvc"}
    while leaves := {module for module, needs in graph.items() if not needs & graph.keys()}:
        graph = {module: needs for module, needs in graph.items() if module not in leaves}
    assert not graph, f"these import one another in a circle, or need one that does: {sorted(graph)}"
