"""Whose wait status the daemon takes, and whose it leaves (reaper.py). Each case runs in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from typing import Final

import pytest

pytestmark = pytest.mark.root  # becoming a subreaper needs none, but the daemon is root and its orphans are

# Makes this process a subreaper as the daemon is, lets `orphan` make a grandchild that ends as our zombie child.
_PREAMBLE: Final = """
import asyncio, os, subprocess, sys, time
from imgsvc.base import children
from imgsvc.base import kernel, procfs
from imgsvc.runtime.processes.reaper import Reaper, _identity, _zombies

kernel.become_subreaper()
reaper = Reaper()

def until_zombie(pid):
    while (found := procfs.process(pid)) is None or not found.ended:
        time.sleep(0.01)

def orphan(program):
    script = "import os, sys, subprocess; print(subprocess.Popen(['sh', '-c', sys.argv[1]], **eval(sys.argv[2])).pid)"
    done = subprocess.run([sys.executable, "-c", script, *program], capture_output=True, check=True, start_new_session=True)
    pid = int(done.stdout)
    until_zombie(pid)
    return pid

def sweep(times):
    for _ in range(times):
        reaper.sweep()
"""


def check(script: str) -> None:
    """Run a case; its assertions are ours."""
    done = subprocess.run([sys.executable, "-c", _PREAMBLE + script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_an_orphan_in_a_group_that_is_not_its_own_is_taken_at_once() -> None:
    check("""
pid = orphan(["sleep 0.2; exit 4", "{}"])
reaper.reap()
assert reaper.exit_code(pid) == 4
assert not _zombies()
""")


def test_an_orphan_that_leads_its_group_is_taken_when_announced() -> None:
    check("""
pid = orphan(["sleep 0.2; exit 5", "{'start_new_session': True}"])
reaper.reap()
assert reaper.exit_code(pid) is None  # it looks like a child of ours
reaper.adopt(pid)
reaper.reap()
assert reaper.exit_code(pid) == 5
""")


def test_an_orphan_nobody_announced_is_taken_after_three_sweeps() -> None:
    check("""
pid = orphan(["sleep 0.2; exit 6", "{'start_new_session': True}"])
sweep(2)
assert _zombies()
sweep(1)
assert reaper.exit_code(pid) == 6
""")


@pytest.mark.parametrize("session", ["True", "False"])
def test_a_child_we_started_and_look_after_late_keeps_its_status(session: str) -> None:
    check(f"""
child = subprocess.Popen(["sh", "-c", "exit 7"], start_new_session={session})
children.started(child.pid)
until_zombie(child.pid)
sweep(10)
assert child.wait() == 7
children.waited(child.pid)
""")


def test_asyncio_children_keep_their_status() -> None:
    check("""
async def main():
    reaper.start()
    process = await asyncio.create_subprocess_exec("sh", "-c", "exit 8", start_new_session=True)
    for _ in range(20):
        reaper.sweep()
        await asyncio.sleep(0.01)
    assert await process.wait() == 8
    await reaper.stop()

asyncio.run(main())
""")


def test_a_program_whose_helper_keeps_the_pipes_open_keeps_its_status() -> None:
    check("""
import threading
from imgsvc.base.programs import run_blocking

results = []
script = "sleep 1 & exit 9"  # the shell is a zombie while its helper holds standard output
thread = threading.Thread(target=lambda: results.append(run_blocking(["sh", "-c", script], b"", timeout_s=20, limit=100)))
thread.start()
while not _zombies():
    time.sleep(0.01)
sweep(10)
thread.join()
assert results[0].status == 9, results
assert not children.owed()
""")


def test_a_number_given_anew_is_not_the_process_that_was_adopted() -> None:
    check("""
child = subprocess.Popen(["sh", "-c", "exit 3"], start_new_session=True)
until_zombie(child.pid)
earlier = _identity(child.pid)._replace(start=1)
reaper._adopted.add(earlier)
reaper.reap()
assert child.poll() == 3
reaper.sweep()
assert not reaper._adopted  # and is forgotten
""")


def test_the_unpack_server_that_died_keeps_its_status() -> None:
    check("""
import signal
from imgsvc.snapshot.interfaces import Limits
from imgsvc.snapshot.unpack.unpacker import WorkerUnpacker

async def main():
    unpacker = WorkerUnpacker(max_concurrent=1, limits=Limits(1 << 30, 1000, 100))
    await unpacker.warm()
    server = unpacker._server._process
    os.kill(server.pid, signal.SIGKILL)
    until_zombie(server.pid)
    sweep(10)
    await unpacker.close()
    assert server.returncode == -signal.SIGKILL
    assert not children.owed()

asyncio.run(main())
""")
