"""containerd's configuration (versions 2 to 4) turned into ours, key by key: nothing is silently lost.

Every key of the file ends in one of three ways, and the report names it with its position:

    carried         the same setting here, under the name shown
    not applicable  nothing here depends on it; the reason is given
    refused         it asks for something imgsvc does not do, or is an unknown key; the administrator has to decide

Files that the configuration imports are merged first, as containerd does it: what a key means depends on its neighbours.

The CRI plugin moved from one section to three between version 2 and 3. Its keys are looked up in one table wherever they
stand: that is more lenient than containerd, which silently ignores a key under an old section.
`rules.py` is that table, `merging.py` merges.

Source: containerd 2.3 docs/cri/config.md, RELEASES.md (deprecated keys), `containerd config default`.
"""

from __future__ import annotations

import glob
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from imgsvc import config
from imgsvc.base import tomlfile
from imgsvc.base.errors import InvalidArgument
from imgsvc.config.containerd.merging import merged
from imgsvc.config.containerd.rules import CheckTables, Outcome, Verdict, judge

__all__ = ["Finding", "Imported", "Outcome", "import_file"]

VERSIONS: Final = (2, 3, 4)
_NAME: Final = "the imported configuration"


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
        """What the administrator has to decide."""
        return [f for f in self.findings if f.outcome is Outcome.REFUSED]


def import_file(path: Path, registry: CheckTables = lambda tables: None) -> Imported:
    """Read containerd's file with what it imports. Blocking.

    Args: registry: refuses inline registry tables that cannot be honoured.
    Raises: NotFound; InvalidArgument with the position: not TOML, or of a version we do not read.
    """
    main = tomlfile.load(path)
    _check_version(main)
    document = merged((main, *_imported(main, path)))
    result = _Result()
    for keys, value in _leaves(document.data, ()):
        where = document.where(*keys)
        try:
            verdict = judge(keys, value, document, registry)
        except InvalidArgument as error:
            verdict = Verdict(Outcome.REFUSED, _reason(error))
        result.add(Finding(tomlfile.dotted(keys), where, verdict.outcome, verdict.note), verdict)
    return Imported(result.proven(path), tuple(result.findings))


class _Result:
    """The configuration as it comes together, and which finding each of its keys is from."""

    def __init__(self) -> None:
        self.findings: list[Finding] = []
        self._values: dict[str, Any] = {}
        self._from: dict[tuple[str, ...], int] = {}

    def add(self, finding: Finding, verdict: Verdict) -> None:
        """One key's outcome. Two keys that map to one of ours must agree."""
        for target, value in verdict.values:
            table = self._values
            for key in target[:-1]:
                table = table.setdefault(key, {})
            before = table.get(target[-1])
            if target in self._from and before != value and not verdict.extends:
                other = self.findings[self._from[target]]
                note = f"{tomlfile.dotted(target)} is {before!r} already, by {other.key}; there is one for all"
                finding = replace(finding, outcome=Outcome.REFUSED, note=note)
                continue
            table[target[-1]] = [*before, *(item for item in value if item not in before)] if verdict.extends and before else value
            self._from.setdefault(target, len(self.findings))
        self.findings.append(finding)

    def proven(self, path: Path) -> str:
        """The whole as text that our own reader takes; what it does not take is refused."""
        while True:
            body = config.table_to_toml(self._values)
            try:
                config.parse(body, _NAME)
                return _header(path, self.findings) + body
            except InvalidArgument as error:
                self._refuse(body, error)

    def _refuse(self, body: str, error: InvalidArgument) -> None:
        """Take back the key that an error is about. Raises: `error`, when it is about none."""
        document = tomlfile.loads(body, _NAME)
        at = next((keys for keys in document.positions if document.where(*keys) == error.where), ())
        target = next((known for known in self._from if known == at[: len(known)]), None)
        if target is None:
            raise error
        table = self._values
        for key in target[:-1]:
            table = table[key]
        del table[target[-1]]
        number = self._from.pop(target)
        self.findings[number] = replace(self.findings[number], outcome=Outcome.REFUSED, note=_reason(error))


def _reason(error: InvalidArgument) -> str:
    return f"{error.what}; {error.hint}" if error.hint else error.what


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


def _leaves(table: Mapping[str, Any], at: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every key that is not a table, and every empty table, in file order."""
    for key, value in table.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, (*at, key))
        else:
            yield (*at, key), value


def _header(path: Path, findings: list[Finding]) -> str:
    lines = [f"# Imported from {path} by `imgsvc config import`.", f"version = {config.VERSION}"]
    for outcome in (Outcome.REFUSED, Outcome.NOT_APPLICABLE):
        met = [f for f in findings if f.outcome is outcome]
        if met:
            lines.append(f"\n# {outcome}:")
            lines += [f"#   {f.key}: {f.note}" for f in met]
    return "\n".join(lines) + "\n\n"
