"""Listings: each line made once for each state of its record."""

from __future__ import annotations

from dataclasses import replace

from imgsvc.runtime.convert import Lines
from imgsvc.runtime.records import SandboxRecord


def test_lines_follow_their_records_and_forget_them() -> None:
    live = {name: SandboxRecord(name, boot_id="now") for name in ("a", "b", "c")}
    made: list[str] = []

    def make(record: SandboxRecord) -> str:
        made.append(record.id)
        return f"{record.id} {record.stopped_at}"

    lines = Lines(live, make)
    assert lines.of(live.values()) == lines.of(live.values()) == ["a 0", "b 0", "c 0"]
    live["b"] = replace(live["b"], stopped_at=7)
    assert lines.of([live["b"], live["a"]]) == ["b 7", "a 0"]
    assert made == ["a", "b", "c", "b"]
    again = live["c"]
    del live["b"], live["c"]
    assert lines.of(live.values()) == ["a 0"]
    live["c"] = again
    assert lines.of(live.values()) == ["a 0", "c 0"]
    assert made == ["a", "b", "c", "b", "c"]
