"""Imports point down only. The layers are read from the docstring of imgsvc itself, so that it stays true."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

import imgsvc

SOURCE = Path(imgsvc.__file__).parent
LINE = re.compile(r"^    (edge|use cases|packages|base|leaf) +(\w+(?:, \w+)*)", re.MULTILINE)
GENERATED = re.compile(r"imgsvc\.api\.\w+_pb2(_grpc)?")
# Top to bottom: a module imports from layers below its own, and from its own where that is listed in SIDEWAYS.
LAYERS = ("edge", "use cases", "packages", "base", "leaf")
SIDEWAYS = {"edge", "use cases", "base"}
# Rules that work on what they are handed and open nothing; use cases may call them beside the interfaces.
PURE = {"imgsvc.content.verify"}
OPENS_THINGS = {"asyncio", "ctypes", "httpcore", "pathlib", "shutil", "socket", "subprocess", "tempfile"}
MAY_SPEAK_GRPC = {"edge", "packages", "leaf"}


def layers() -> dict[str, str]:
    """Top-level name below imgsvc → layer."""
    found = {name: layer for layer, names in LINE.findall(imgsvc.__doc__ or "") for name in re.findall(r"\w+", names)}
    assert set(found.values()) == set(LAYERS), "the docstring of imgsvc lists the layers"
    return found


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


def room(module: str) -> str:
    """Top-level name: "imgsvc.registry.hosts.hosts" is in "registry"."""
    return module.split(".")[1]


@pytest.mark.parametrize("module", sorted(set(modules()) - {"imgsvc"}))
def test_imports_point_down(module: str) -> None:
    where: Mapping[str, str] = layers()
    assert room(module) in where, f"say in imgsvc/__init__.py to which layer {room(module)} belongs"
    layer = where[room(module)]
    for other in sorted(own(modules()[module])):
        below = where[room(other)]
        if room(other) == room(module):
            continue
        allowed = LAYERS.index(below) > LAYERS.index(layer) or (below == layer and layer in SIDEWAYS)
        assert allowed, f"{module} ({layer}) imports {other} ({below})"


@pytest.mark.parametrize("module", sorted(m for m in modules() if m != "imgsvc" and layers().get(room(m)) == "use cases"))
def test_use_cases_see_packages_through_their_interfaces(module: str) -> None:
    where = layers()
    seen = {m for m in own(modules()[module]) if where[room(m)] == "packages"} - PURE
    assert all(m.endswith(".interfaces") or m.count(".") == 1 for m in seen), f"{module} sees {sorted(seen)}"
    for package in (m for m in seen if m.count(".") == 1):
        assert f"{package}.interfaces" in seen, f"{module} takes more than the interfaces of {package}"


@pytest.mark.parametrize("module", sorted(PURE))
def test_rules_open_nothing(module: str) -> None:
    assert not {name.partition(".")[0] for name in imports(modules()[module])} & OPENS_THINGS


def test_only_the_edge_and_packages_speak_grpc() -> None:
    where = layers()
    for module, file in modules().items():
        if module != "imgsvc" and where[room(module)] not in MAY_SPEAK_GRPC:
            assert not {n for n in imports(file) if n.split(".")[0] in ("grpc", "google")}, module
            assert not {n for n in imports(file) if n.startswith("imgsvc.api")}, module


def test_modules_do_not_import_in_a_circle() -> None:
    graph = {module: own(file) & modules().keys() for module, file in modules().items() if module != "imgsvc"}
    while leaves := {module for module, needs in graph.items() if not needs & graph.keys()}:
        graph = {module: needs for module, needs in graph.items() if module not in leaves}
    assert not graph, f"these import one another in a circle, or need one that does: {sorted(graph)}"
