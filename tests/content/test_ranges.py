"""RangeSet against a set of integers."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from imgsvc.content.ranges import RangeSet

OFFSET = st.integers(0, 40)
OPERATION = st.one_of(st.tuples(st.just("add"), OFFSET, OFFSET), st.tuples(st.just("clip"), OFFSET, OFFSET))


@given(st.lists(OPERATION, max_size=30), st.integers(0, 50))
def test_it_is_a_set_of_offsets(operations: list[tuple[str, int, int]], total: int) -> None:
    ranges, model = RangeSet(), set[int]()
    for name, first, second in operations:
        if name == "add":
            ranges.add(first, second)
            model.update(range(first, second))
        else:
            ranges.clip(first)
            model = {offset for offset in model if offset < first}
    listed = list(ranges)
    assert {offset for start, end in listed for offset in range(start, end)} == model
    assert all(a[1] < b[0] for a, b in itertools.pairwise(listed)), "sorted, disjoint, merged"
    assert ranges.end == max(model, default=-1) + 1
    assert ranges.prefix == next(n for n in range(100) if n not in model)
    gaps = ranges.missing(total)
    assert {offset for start, length in gaps for offset in range(start, start + length)} == set(range(total)) - model
    assert gaps == sorted(gaps)
