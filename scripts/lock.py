"""Write the lock files anew: `python scripts/lock.py [--upgrade]`, from an environment with pip. `make lock` runs it.

requirements-lock.txt has what the daemon needs and what builds the package, requirements-lock-test.txt what tests and checks
need beside that. Versions stay as they are as long as pyproject.toml allows, unless --upgrade. Each has the hashes of all files
that the index has of it, whatever the platform.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import tomllib
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RUN = ROOT / "requirements-lock.txt"
TEST = ROOT / "requirements-lock-test.txt"
INDEX = "https://pypi.org/simple"
JSON = "application/vnd.pypi.simple.v1+json"
EDITABLE = "editables"  # which hatchling asks for when it makes an editable install


def pins(file: Path) -> list[str]:
    """The `name==version` lines of a lock file."""
    return re.findall(r"^[\w.-]+==[\w.!+-]+", file.read_text(encoding="ascii"), re.MULTILINE) if file.exists() else []


def resolved(wanted: list[str], constraints: Path) -> dict[str, str]:
    """Name → version of all that pip would install for some requirements."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--report", "-"]
    done = subprocess.run([*command, "--constraint", str(constraints), *wanted], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    found = (item["metadata"] for item in json.loads(done.stdout)["install"])
    return {item["name"]: item["version"] for item in found if item["name"] != "imgsvc"}


def hashes(name: str, version: str) -> list[str]:
    """SHA-256 of all files of one release, in order."""
    url = f"{INDEX}/{re.sub(r'[-_.]+', '-', name).lower()}/"
    request = urllib.request.Request(url, headers={"Accept": JSON})  # noqa: S310  # INDEX is https
    with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310  # likewise
        files = json.load(answer)["files"]
    of_release = re.compile(rf"[^-]+(-[^-]+)*-{re.escape(version)}(-.*\.whl|\.tar\.gz|\.zip)")
    found = sorted(file["hashes"]["sha256"] for file in files if of_release.fullmatch(file["filename"]))
    if not found:
        sys.exit(f"{INDEX} has no files of {name} {version}")
    return found


def write(file: Path, what: str, versions: dict[str, str]) -> None:
    """One lock file."""
    lines = [f"# {what}; written by `make lock`\n"]
    for name, version in sorted(versions.items(), key=lambda item: item[0].lower()):
        lines.append(" \\\n".join([f"{name}=={version}", *(f"    --hash=sha256:{digest}" for digest in hashes(name, version))]) + "\n")
    file.write_text("".join(lines), encoding="ascii")


def main() -> None:
    """Resolve, ask for hashes, write."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraints:
        if sys.argv[1:] != ["--upgrade"]:
            constraints.write("\n".join([*pins(RUN), *pins(TEST)]))
            constraints.flush()
        run = resolved([str(ROOT), *project["build-system"]["requires"], EDITABLE], Path(constraints.name))
        test = resolved([f"{ROOT}[test]", *project["build-system"]["requires"], EDITABLE], Path(constraints.name))
    write(RUN, "what imgsvc runs on and is built with", run)
    write(TEST, "what its tests and checks need beside that", {name: test[name] for name in test.keys() - run.keys()})


if __name__ == "__main__":
    main()
