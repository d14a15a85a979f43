"""Chains of stream processors, judged before anything runs."""

from __future__ import annotations

import pytest

from imgsvc.base.errors import InvalidArgument
from imgsvc.decrypt.processors import PLAIN_TAR, Processor, check_processors, child_environment, plan_chain

GZIP = PLAIN_TAR + "+gzip"
SECRET = GZIP + "+encrypted"


def processor(name: str, accepts: str | tuple[str, ...], returns: str, **more: object) -> Processor:
    accepted = (accepts,) if isinstance(accepts, str) else accepts
    return Processor(name, accepted, returns, "prog", **more)  # type: ignore[arg-type]  # keyword arguments of the test


def test_a_chain_follows_types_until_they_can_be_unpacked() -> None:
    table = [processor("b", "application/x-middle", GZIP), processor("a", SECRET, "application/x-middle")]
    chain = plan_chain(table, SECRET)

    assert [(s.processor.id, s.media_type, s.payload) for s in chain.steps] == [("a", SECRET, True), ("b", "application/x-middle", False)]
    assert chain.result == GZIP


def test_a_processor_comes_before_the_built_in_decompressor() -> None:
    table = [processor("gunzip", GZIP, PLAIN_TAR), processor("decrypt", SECRET, GZIP)]

    assert [s.processor.id for s in plan_chain(table, SECRET).steps] == ["decrypt", "gunzip"]


def test_plain_tar_ends_every_chain() -> None:
    table = [processor("a", (PLAIN_TAR, GZIP), PLAIN_TAR)]
    check_processors(table)

    assert plan_chain(table, PLAIN_TAR).steps == ()
    assert len(plan_chain(table, GZIP).steps) == 1


@pytest.mark.parametrize("media_type", [GZIP, SECRET, "", "application/octet-stream", SECRET.upper()])
def test_nothing_configured_means_no_steps(media_type: str) -> None:
    assert plan_chain([], media_type).steps == ()
    assert plan_chain([], media_type).result == media_type


def test_zstd_gets_a_payload_too() -> None:
    media_type = PLAIN_TAR + "+zstd+encrypted"
    (step,) = plan_chain([processor("anything", media_type, PLAIN_TAR + "+zstd")], media_type).steps

    assert step.payload


@pytest.mark.parametrize(
    "table, named",
    [
        ([processor("self", "x", "x")], "self"),
        ([processor("one", "x", "y"), processor("two", "y", "x")], "two"),
        ([processor("one", SECRET, "application/x-nobody")], "one"),
        ([processor("still", SECRET, SECRET.replace("gzip", "zstd"))], "still"),
        ([processor("one", SECRET, GZIP), processor("two", ("x", SECRET), GZIP)], "two"),
        ([processor("nothing", (), GZIP)], "nothing"),
        ([processor("empty", "x", "")], "empty"),
        ([Processor("program", ("x",), GZIP, "")], "program"),
        ([processor("env", "x", GZIP, env=("=x",))], "env"),
        ([processor("env", "x", GZIP, env=("NAME",))], "env"),
    ],
)
def test_a_table_that_cannot_work_is_refused_naming_the_entry(table: list[Processor], named: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        check_processors(table)
    assert caught.value.where == f'stream_processors."{named}"'


def test_the_environment_is_the_daemons_then_the_entrys_then_the_type() -> None:
    entry = processor("a", SECRET, GZIP, env=("A=entry", "B=x=y", "STREAM_PROCESSOR_MEDIATYPE=lie"))
    (step,) = plan_chain([entry], SECRET).steps

    assert child_environment(step, {"A": "daemon", "C": "daemon"}) == {
        "A": "entry",
        "B": "x=y",
        "C": "daemon",
        "STREAM_PROCESSOR_MEDIATYPE": SECRET,
    }
