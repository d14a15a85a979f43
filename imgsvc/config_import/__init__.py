"""containerd's configuration (versions 2 to 4) turned into ours, key by key: nothing is silently lost.

Every key of the file ends in one of three ways, and the report names it with its position:

    carried         the same setting here, under the name shown
    not applicable  nothing here depends on it; the reason is given
    refused         it asks for something imgsvc does not do, or is a key nobody knows; somebody has to decide

The CRI plugin moved from one section to three between version 2 and 3. Its keys are looked up in one table wherever they
stand: that is more lenient than containerd, which ignores a key under an old section without a word (needs.md A2.10).
`rules.py` is that table.

Source: containerd 2.3 docs/cri/config.md, RELEASES.md (deprecated keys), `containerd config default`.
"""

from __future__ import annotations

import glob
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from imgsvc import config, tomlfile
from imgsvc.config_import.rules import Outcome, Verdict, judge
from imgsvc.errors import InvalidArgument

__all__ = ["Finding", "Imported", "Outcome", "import_file"]

VERSIONS: Final = (2, 3, 4)


@dataclass(frozen=True, slots=True)
class Finding:
    """What became of one key. where: file:line:column; note: our key when carried, else the reason."""

    key: str
    where: str
    outcome: Outcome
    note: str


@dataclass(frozen=True, slots=True)
class Imported:
    """The result. toml: a configuration that `config.load` reads; it may hold secrets that the source held in the clear."""

    toml: str
    findings: tuple[Finding, ...]

    @property
    def refused(self) -> list[Finding]:
        """What somebody has to decide."""
        return [f for f in self.findings if f.outcome is Outcome.REFUSED]


def import_file(path: Path) -> Imported:
    """Read containerd's file with what it imports. Blocking.

    Raises: NotFound; InvalidArgument with the position: not TOML, of a version we do not read, or a carried value that
    our configuration does not take.
    """
    values: dict[str, Any] = {}
    findings: list[Finding] = []
    main = tomlfile.load(path)
    _check_version(main)
    for document in (main, *_imported(main, path)):
        findings += _import(document, values)
    text = _header(path, findings) + config.table_to_toml(values)
    _prove(text, values, findings)
    return Imported(text, tuple(findings))


def _check_version(document: tomlfile.Document) -> None:
    version = document.typed(int, "version") or 1
    if version not in VERSIONS:
        raise document.error(
            f"containerd configuration version {version}; versions {VERSIONS[0]} to {VERSIONS[-1]} are read",
            "version",
            hint="convert it with `containerd config migrate` first",
        )


def _imported(document: tomlfile.Document, path: Path) -> list[tomlfile.Document]:
    """The files containerd would merge, in its order: as listed, each pattern sorted, relative to the file."""
    names = [name for pattern in document.strings("imports") for name in sorted(glob.glob(str(path.parent / pattern)))]
    return [tomlfile.load(name) for name in dict.fromkeys(names) if Path(name).resolve() != path.resolve()]


def _import(document: tomlfile.Document, values: dict[str, Any]) -> list[Finding]:
    findings = []
    for keys, value in _leaves(document.data, ()):
        verdict = judge(keys, value, document)
        _apply(verdict, values)
        findings.append(Finding(tomlfile.dotted(keys), document.where(*keys), verdict.outcome, verdict.note))
    return findings


def _leaves(table: Mapping[str, Any], at: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every key that is not a table, and every empty table, in file order."""
    for key, value in table.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, (*at, key))
        else:
            yield (*at, key), value


def _apply(verdict: Verdict, values: dict[str, Any]) -> None:
    for target, value in verdict.values:
        table = values
        for key in target[:-1]:
            table = table.setdefault(key, {})
        before = table.get(target[-1], []) if verdict.extends else []
        table[target[-1]] = [*before, *(item for item in value if item not in before)] if before else value


def _header(path: Path, findings: list[Finding]) -> str:
    lines = [f"# Imported from {path} by `imgsvc config import`.", f"version = {config.VERSION}"]
    for outcome in (Outcome.REFUSED, Outcome.NOT_APPLICABLE):
        met = [f for f in findings if f.outcome is outcome]
        if met:
            lines.append(f"\n# {outcome}:")
            lines += [f"#   {f.key}: {f.note}" for f in met]
    return "\n".join(lines) + "\n\n"


def _prove(text: str, values: Mapping[str, Any], findings: list[Finding]) -> None:
    """What we write must be what we read."""
    try:
        config.parse(text, "the imported configuration")
    except InvalidArgument as error:
        carried = {f.note: f.where for f in findings if f.outcome is Outcome.CARRIED}
        key = next((note for note in carried if note and note in error.what), "")
        raise InvalidArgument(error.what, where=carried.get(key, error.where), hint=error.hint) from error
