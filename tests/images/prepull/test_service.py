"""What is wanted and what is here, kept together."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from imgsvc.base.concurrency import Threads
from imgsvc.base.errors import Unavailable
from imgsvc.base.metadb.database import MetaDB
from imgsvc.base.oci import MIB, Platform
from imgsvc.base.reference import Reference
from imgsvc.images.prepull.plan import Wanted
from imgsvc.images.prepull.service import FIRST_RETRY_S, LAST_RETRY_S, Memory, Prepull, PullPath, next_try
from imgsvc.images.prepull.throttle import Throttle
from imgsvc.images.pull import Pulled, PullRequest
from imgsvc.images.records import ImageStore
from tests.images.test_records import image

NOON = 1_795_000_000.0


class Node:
    """A pre-pull service whose pulls are told by the test."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory / "prepull.d"
        self.directory.mkdir(exist_ok=True)
        self.runner = asyncio.Runner()
        self.db = MetaDB(directory / "db", sync=False)
        self.images = ImageStore(self.db)
        self.threads = Threads(2, "test")
        self.now = NOON
        self.pulls: list[str] = []
        self.running = self.most = 0
        self.fail: Exception | None = None
        self.hold = asyncio.Event()
        self.hold.set()
        self.service = self.new()

    def new(self) -> Prepull:
        return Prepull(
            self.directory,
            root=self.directory,
            path=PullPath(self.pull, None, "native"),  # type: ignore[arg-type]  # the registry is asked only with a bandwidth
            images=self.images,
            db=self.db,
            threads=self.threads,
            clock=lambda: self.now,
            poll_s=0.01,
        )

    async def pull(self, request: PullRequest) -> Pulled:
        self.pulls.append(str(request.reference))
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await self.hold.wait()
            if self.fail is not None:
                raise self.fail
            other = "" if request.platform == Platform.host() else str(request.platform)
            record = image(request.reference.repository + other)
            return Pulled(await self.images.add(record, request.reference.tagged, ""), {})
        finally:
            self.running -= 1

    def write(self, text: str) -> bool:
        """Replace the file; true, so that it can be a step."""
        (self.directory / "a.toml").write_text(f"version = 1\n{text}")
        return True

    def run(self, *steps: Callable[[], Any]) -> None:
        """Let the service live; each step waits until its condition is true."""

        async def life() -> None:
            task = asyncio.ensure_future(self.service.run())
            for step in steps:
                async with asyncio.timeout(5):
                    while not step():  # noqa: ASYNC110  # whatever the service does, seen from outside
                        await asyncio.sleep(0.005)
            await asyncio.sleep(0.05)
            task.cancel()
            await asyncio.wait([task])

        self.runner.run(life())

    def states(self) -> dict[str, str]:
        return {image["reference"]: image["state"] for file in self.service.status()["files"] for image in file["images"]}


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    made = Node(tmp_path)
    yield made
    made.runner.close()
    made.db.close()
    made.threads.close()


A, B = "docker.io/library/a:1", "docker.io/library/b:1"


def wanted(*references: str, extra: str = "") -> str:
    return "".join(f'[[image]]\nreference = "{reference}"\n{extra}' for reference in references)


def test_what_is_wanted_is_pulled_once_also_across_a_restart(node: Node) -> None:
    node.write(wanted(A, B))
    node.run(lambda: set(node.states().values()) == {"present"})
    assert sorted(node.pulls) == [A, B]

    node.service = node.new()
    node.run(node.states)

    assert sorted(node.pulls) == [A, B]
    assert node.states() == {A: "present", B: "present"}


def test_an_image_that_somebody_removed_comes_back(node: Node) -> None:
    node.write(wanted(A))
    node.run(lambda: node.images.find(A))
    node.runner.run(node.images.remove(image("library/a").image_id))

    node.run(lambda: node.images.find(A))

    assert node.pulls == [A, A]


def test_a_tag_is_looked_at_again_when_it_is_time(node: Node) -> None:
    node.write(wanted(A, extra='every = "1h"\n'))
    node.run(lambda: node.states() == {A: "present"})
    assert len(node.pulls) == 1

    node.now += 3599
    node.run(node.states)
    assert len(node.pulls) == 1

    node.now += 2
    node.run(lambda: len(node.pulls) == 2)


def test_failures_are_tried_again_later_and_later(node: Node) -> None:
    node.fail = Unavailable("down")
    node.write(wanted(A))
    node.run(lambda: node.states() == {A: "failed"})
    assert len(node.pulls) == 1

    node.now += FIRST_RETRY_S
    node.run(lambda: len(node.pulls) == 2)
    node.now += FIRST_RETRY_S
    node.run(node.states)
    assert len(node.pulls) == 2

    node.fail = None
    node.now += FIRST_RETRY_S
    node.run(lambda: node.states() == {A: "present"})


def test_now_tries_at_once(node: Node) -> None:
    node.fail = Unavailable("down")
    node.write(wanted(A))
    node.run(lambda: node.states() == {A: "failed"})
    node.fail = None

    node.service.now()

    node.run(lambda: node.states() == {A: "present"})


def test_at_most_so_many_at_a_time(node: Node) -> None:
    node.write("concurrent = 2\n" + wanted(*(f"docker.io/library/i{n}:1" for n in range(7))))
    node.run(lambda: set(node.states().values()) == {"present"} and len(node.pulls) == 7)

    assert node.most == 2


def test_outside_its_window_nothing_is_pulled_and_what_runs_is_stopped(node: Node) -> None:
    minute = datetime.fromtimestamp(NOON).astimezone()
    inside = f"{minute.hour:02}:00-{(minute.hour + 1) % 24:02}:00"
    node.write(f'windows = ["{inside}"]\n' + wanted(A))
    node.now = NOON + 3600
    node.run(lambda: node.states() == {A: "waiting"})
    assert node.pulls == []

    node.now = NOON
    node.run(lambda: node.states() == {A: "present"})


def test_files_are_watched_and_a_broken_one_is_said_and_changes_nothing(node: Node) -> None:
    node.run(
        lambda: node.service.status()["files"] == [],
        lambda: node.write(wanted(A)),
        lambda: node.states() == {A: "present"},
        lambda: node.write("nonsense = 1\n"),
        lambda: node.service.status()["files"][0]["error"],
        lambda: node.write(wanted(A, B)),
        lambda: node.states() == {A: "present", B: "present"},
    )
    assert sorted(node.pulls) == [A, B]


def test_a_file_that_breaks_stays_in_force_as_it_was(node: Node) -> None:
    node.write(wanted(A, extra="pin = true\n"))
    node.run(lambda: node.images.find(A), lambda: node.write("nonsense = 1\n"), lambda: node.service.status()["files"][0]["error"])

    image = node.images.find(A)
    assert image is not None
    assert node.images.pinned(image)
    assert node.states() == {A: "present"}


def test_a_name_that_somebody_removed_comes_back_though_the_image_has_another(node: Node) -> None:
    async def rename() -> None:
        await node.images.tag(A, Reference.parse(B))
        await node.images.untag(A)

    node.write(wanted(A))
    node.run(lambda: node.states() == {A: "present"})
    node.runner.run(rename())
    node.run(lambda: node.images.find(A), lambda: len(node.pulls) == 2)


def test_images_of_one_name_for_several_platforms_are_all_pinned(node: Node) -> None:
    node.write(wanted(A, extra="pin = true\n") + wanted(A, extra='pin = true\nplatform = "linux/s390x"\n'))
    node.run(lambda: [node.images.pinned(image) for image in node.images.all()] == [True, True])

    assert {wanted["imageID"] for wanted in node.service.status()["files"][0]["images"]} == {i.image_id for i in node.images.all()}


def test_what_an_image_waits_for_is_said(node: Node) -> None:
    node.write('min_free = "999999GiB"\n' + wanted(A))
    node.run(lambda: node.states() == {A: "waiting"})
    assert node.service.status()["files"][0]["images"][0]["waitsFor"] == "less than min_free is free"


def test_pins_come_and_go_with_their_line_and_leave_others_alone(node: Node) -> None:
    node.images.pin([B])
    node.write(wanted(A, extra="pin = true\n") + wanted(B))
    node.run(lambda: node.images.find(A) and node.images.find(B))
    assert all(node.images.pinned(node.images.find(name)) for name in (A, B))  # type: ignore[arg-type]

    node.write(wanted(B))
    node.run(lambda: node.states() == {B: "present"})

    first, second = node.images.find(A), node.images.find(B)
    assert first is not None
    assert second is not None
    assert not node.images.pinned(first)
    assert node.images.pinned(second)


def test_too_little_space_pulls_nothing(node: Node) -> None:
    node.write('min_free = "999999GiB"\n' + wanted(A))

    node.run(lambda: node.states() == {A: "waiting"})

    assert node.pulls == []


def test_when_an_image_is_tried() -> None:
    once = Wanted(Reference.parse(A), image("x").config.platform)
    hourly = Wanted(once.reference, once.platform, every=3600.0)

    assert next_try(once, Memory(), present=False) == 0
    assert next_try(once, Memory(), present=True) == 0
    assert next_try(once, Memory(5, 5), present=True) is None
    assert next_try(once, Memory(5, 5), present=False) == 0
    assert next_try(hourly, Memory(5, 5), present=True) == 3605
    assert next_try(once, Memory(100, 5, failures=1), present=True) == 100 + FIRST_RETRY_S
    assert next_try(once, Memory(100, 5, failures=3), present=True) == 100 + 4 * FIRST_RETRY_S
    assert next_try(once, Memory(100, 5, failures=5000), present=True) == 100 + LAST_RETRY_S


def test_a_throttle_keeps_its_rate() -> None:
    now, slept = [0.0], [0.0]

    async def sleep(seconds: float) -> None:
        now[0] += seconds
        slept[0] += seconds

    async def spend() -> None:
        throttle = Throttle(10 * MIB, clock=lambda: now[0], sleep=sleep)
        for _ in range(100):
            await throttle.spend(MIB)

    asyncio.run(spend())
    assert 9.0 <= slept[0] <= 10.0


def test_a_round_that_fails_is_not_the_last(node: Node, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    node.write(wanted(A))
    read, failures = node.service._read_files, [OSError("Too many open files")]

    def once() -> bool:
        if failures:
            raise failures.pop()
        return read()

    monkeypatch.setattr(node.service, "_read_files", once)
    node.hold.set()
    node.run(lambda: node.states().get(A) == "present")
    assert "Too many open files" in caplog.text
