"""The unit of docs/deploy under systemd: readiness, what restarting it means for containers, what it writes to the journal."""

from __future__ import annotations

import os
import subprocess
import time

from imgsvc.api import cri_pb2 as pb
from tests.support import cri
from tests.vm.inside.node import Node, journal, processes, scope, shown, systemctl


def test_systemd_knows_when_it_is_ready_and_leaves_its_children_alone() -> None:
    unit = shown("imgsvc")
    assert (unit["ActiveState"], unit["SubState"], unit["Type"]) == ("active", "running", "notify")
    assert (unit["KillMode"], unit["Delegate"], unit["NRestarts"]) == ("process", "yes", "0")
    assert any(" ready" in line for line in journal())
    verified = subprocess.run(["systemd-analyze", "verify", "imgsvc.service"], capture_output=True, text=True, timeout=60)
    assert (verified.returncode, verified.stdout + verified.stderr) == (0, "")


def test_containers_live_through_restart_and_stop_and_their_exit_codes_are_found(node: Node) -> None:
    pod = node.pod_config("restart")
    for handler in ("crun", "runc"):
        pod.metadata.name = handler
        sandbox = node.run_pod(pod, handler)
        lives = node.run(sandbox, pod, "trap 'exit 7' TERM; while true; do sleep 0.2; done", "lives")
        ends = node.run(sandbox, pod, "sleep 4; exit 9", "ends")
        process = processes(scope("restart", lives))[0]
        main_pid = shown("imgsvc")["MainPID"]

        if handler == "crun":
            systemctl("restart", "imgsvc")
        else:
            systemctl("stop", "imgsvc")
            time.sleep(4)  # the other container ends while nobody is there
            systemctl("start", "imgsvc")

        assert shown("imgsvc")["MainPID"] != main_pid
        assert os.path.exists(f"/proc/{process}")
        again = Node()
        assert cri.status(again.runtime, lives).state == pb.CONTAINER_RUNNING
        assert cri.pod_status(again.runtime, sandbox).state == pb.SANDBOX_READY
        assert cri.wait_for_exit(again.runtime, ends).exit_code == 9
        cri.stop(again.runtime, lives, timeout=20)
        assert cri.wait_for_exit(again.runtime, lives).exit_code == 7
        again.close()


def test_zz_the_journal_has_no_errors_of_ours() -> None:
    """Last by name: it sees what the other tests caused."""
    lines = journal()
    assert [line for line in lines if " ERROR " in line or "Traceback" in line] == []
    assert not any("State 'stop-sigterm' timed out" in line for line in lines)
