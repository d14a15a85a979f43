"""A bounded part of fuzz.py, and Hypothesis on the pure parser; see there for running it longer."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imgsvc.base.errors import ImgsvcError
from imgsvc.snapshot.unpack import tarheader
from imgsvc.snapshot.unpack.tarstream import TarStream
from tests.snapshot import fuzz
from tests.snapshot.layers import with_checksum


@pytest.mark.root
def test_mutated_layers_neither_crash_nor_escape(tmp_path: Path) -> None:
    fuzz.prepare(tmp_path)
    layers = fuzz.seeds()
    for seed in range(1500):
        fuzz.once(seed, tmp_path, layers)


@settings(max_examples=500, deadline=None)
@given(block=st.binary(min_size=512, max_size=512))
def test_any_block_is_a_header_or_our_error(block: bytes) -> None:
    with contextlib.suppress(ImgsvcError):
        tarheader.parse_header(with_checksum(block))


@settings(max_examples=500, deadline=None)
@given(data=st.binary(max_size=300))
def test_any_bytes_are_pax_records_or_our_error(data: bytes) -> None:
    with contextlib.suppress(ImgsvcError):
        assert len(tarheader.parse_pax(data)) <= len(data)


@settings(max_examples=300, deadline=None)
@given(field=st.binary(min_size=8, max_size=12))
def test_any_field_is_a_number_in_range_or_our_error(field: bytes) -> None:
    with contextlib.suppress(ImgsvcError):
        assert abs(tarheader.number(field, "field")) <= tarheader.MAX_NUMBER


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(min_value=1, max_value=2000), layer=st.sampled_from(fuzz.seeds()))
def test_chunks_may_end_anywhere(cut: int, layer: bytes) -> None:
    def entries(chunk: int) -> list[tuple[object, bytes]]:
        pieces = iter([layer[i : i + chunk] for i in range(0, len(layer), chunk)])
        stream = TarStream(lambda: next(pieces, b""))
        found: list[tuple[object, bytes]] = []
        while (entry := stream.next_entry()) is not None:
            data = b""
            while more := stream.read_data():
                data += more
            found.append((entry, data))
        return found

    assert entries(cut) == entries(1 << 20)
