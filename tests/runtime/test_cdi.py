"""CDI devices (cdi.py)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from imgsvc.base.errors import FailedPrecondition, InvalidArgument, NotFound
from imgsvc.runtime.spec import cdi

SPEC = {
    "cdiVersion": "0.6.0",
    "kind": "vendor.com/gpu",
    "containerEdits": {"env": ["DRIVER=1"], "hooks": [{"hookName": "createContainer", "path": "/bin/hook", "args": ["hook"]}]},
    "devices": [
        {"name": "0", "containerEdits": {"deviceNodes": [{"path": "/dev/gpu0", "hostPath": "/dev/null"}], "env": ["GPU=0"]}},
        {"name": "gone", "containerEdits": {"deviceNodes": [{"path": "/dev/no-such-device"}]}},
    ],
}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "a.json").write_text(json.dumps(SPEC))
    return tmp_path


def blank() -> dict[str, Any]:
    return {
        "process": {"env": ["GPU=none"], "user": {"additionalGids": [5]}},
        "linux": {"devices": [], "resources": {}},
        "mounts": [],
    }


def test_edits_are_applied(directory: Path) -> None:
    spec = blank()
    cdi.apply(spec, cdi.edits_for(["vendor.com/gpu=0"], [str(directory)]))
    assert spec["process"]["env"] == ["DRIVER=1", "GPU=0"]
    assert spec["linux"]["devices"] == [{"path": "/dev/gpu0", "type": "c", "major": 1, "minor": 3}]
    assert spec["linux"]["resources"]["devices"] == [{"allow": True, "type": "c", "major": 1, "minor": 3, "access": "rwm"}]
    assert spec["hooks"] == {"createContainer": [{"path": "/bin/hook", "args": ["hook"]}]}


def test_what_is_not_there_is_an_error(directory: Path) -> None:
    with pytest.raises(NotFound):
        cdi.edits_for(["vendor.com/gpu=7"], [str(directory)])
    with pytest.raises(FailedPrecondition):
        cdi.apply(blank(), cdi.edits_for(["vendor.com/gpu=gone"], [str(directory)]))


@pytest.mark.parametrize("name", ["", "gpu", "../x=y", "vendor.com/gpu=", "a/b=c/../d", "vendor.com/gpu=0\n"])
def test_malformed_names(directory: Path, name: str) -> None:
    with pytest.raises(InvalidArgument):
        cdi.edits_for([name], [str(directory)])


def test_a_broken_file_is_named(directory: Path) -> None:
    (directory / "b.json").write_text("{")
    with pytest.raises(InvalidArgument, match=r"b\.json"):
        cdi.edits_for(["vendor.com/gpu=0"], [str(directory)])


YAML = """
cdiVersion: "0.6.0"
kind: vendor.com/nic
devices:
  - name: "0"
    containerEdits:
      env: [NIC=0]
      deviceNodes: [{path: /dev/nic0, hostPath: /dev/null, permissions: rw}]
"""


def test_a_specification_in_yaml(directory: Path) -> None:
    (directory / "b.yaml").write_text(YAML)
    spec = blank()
    cdi.apply(spec, cdi.edits_for(["vendor.com/nic=0", "vendor.com/gpu=0"], [str(directory)]))
    assert spec["process"]["env"] == ["NIC=0", "DRIVER=1", "GPU=0"]
    assert [d["access"] for d in spec["linux"]["resources"]["devices"]] == ["rw", "rwm"]


@pytest.mark.parametrize("text", ["", "a: [", "- 1", "kind: {}", "kind: !!python/object/apply:os.system ['false']", "[" * 5000])
def test_a_broken_file_in_yaml_is_named(directory: Path, text: str) -> None:
    (directory / "b.yaml").write_text(text)
    with pytest.raises(InvalidArgument, match=r"b\.yaml"):
        cdi.edits_for(["vendor.com/gpu=0"], [str(directory)])
