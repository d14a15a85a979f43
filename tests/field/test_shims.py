"""Handlers of containerd shims, and what is no handler."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import grpc
import pytest

from imgsvc.api import cri_pb2 as pb
from tests.runtime.harness import Daemon, assert_clean

pytestmark = [pytest.mark.root, pytest.mark.compat]

MakeNode = Callable[..., Daemon]
ROOT: Final = Path(__file__).parents[2]

# Debian's, which reads its options from standard input; that of containerd 2.3 or later, where a variable names one.
SHIMS: Final = ["containerd-shim-runc-v2", *filter(None, [os.environ.get("IMGSVC_TEST_SHIM_RUNC_V2")])]


def shim_node(make_node: MakeNode, program: str, **extra: Any) -> Daemon:
    """A daemon whose handler starts this shim of runc."""
    path = shutil.which(program)
    assert path, f"{program} is not installed"
    return make_node({"handlers": {"default": {"type": "io.containerd.runc.v2", "path": path}}, **extra})


def test_R3_a_shim_that_wants_its_parameters_on_standard_input_starts(make_node: MakeNode, directory: Path) -> None:
    program = directory / "podshim"
    program.write_text(
        f'#!/bin/sh\nPODSHIM_PLAIN=1 PODSHIM_PARAMETERS=1 PYTHONPATH={ROOT} exec {sys.executable} -m tests.runtime.podshim "$@"\n'
    )
    program.chmod(0o755)
    node = make_node({"handlers": {"default": {"type": "io.containerd.podshim.v1", "path": str(program)}}})
    pod = node.run_pod()
    assert node.output(pod, "echo in") == ["in"]
    node.remove_all()
    assert_clean(node)


@pytest.mark.parametrize("program", SHIMS)
def test_R3_shims_of_every_generation_start(make_node: MakeNode, program: str) -> None:
    node = shim_node(make_node, program)
    assert node.output(node.run_pod(), "echo in") == ["in"]
    node.remove_all()
    assert_clean(node)


def test_R3_an_oci_binary_that_works_only_as_a_shim_is_a_handler_that_is_off(make_node: MakeNode, directory: Path) -> None:
    handlers = {"default": {"path": "runc"}}
    for name in ("runsc", "containerd-shim-kata-v2", "neither"):
        program = directory / name
        program.write_text("no program at all")
        program.chmod(0o755)
        handlers[name] = {"path": str(program)}
    node = make_node({"handlers": handlers})
    for name, reason in (
        ("runsc", '"io.containerd.runsc.v1"'),
        ("containerd-shim-kata-v2", '"io.containerd.kata.v2"'),
        ("neither", "format"),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            node.cri.RunPodSandbox(pb.RunPodSandboxRequest(config=node.pod(), runtime_handler=name))
        assert reason in (caught.value.details() or "")
