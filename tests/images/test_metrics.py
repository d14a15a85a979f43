"""Prometheus text, bounded."""

from __future__ import annotations

from imgsvc.images.telemetry.metrics import MAX_SERIES, Bounded, Counter, Gauge, Histogram, Page


def test_counters_gauges_and_histograms_as_text() -> None:
    counter, plain = Counter("c", "Things.", ("kind",)), Counter("p", "Plain.")
    histogram = Histogram("h", "Seconds.", ("op",), (1.0, 2.5))
    page = Page([counter, plain, Gauge("g", "Now.", ("of",), lambda: {("a",): 3.5}), histogram])
    counter.add('a"b\n', by=2)
    for value in (0.5, 1.0, 2.0, 9.0):
        histogram.observe(value, "x")

    assert page.text() == (
        "# HELP c Things.\n# TYPE c counter\n"
        'c{kind="a\\"b\\n"} 2\n'
        "# HELP p Plain.\n# TYPE p counter\np 0\n"
        '# HELP g Now.\n# TYPE g gauge\ng{of="a"} 3.5\n'
        "# HELP h Seconds.\n# TYPE h histogram\n"
        'h_bucket{op="x",le="1"} 2\nh_bucket{op="x",le="2.5"} 3\nh_bucket{op="x",le="+Inf"} 4\n'
        'h_sum{op="x"} 12.5\nh_count{op="x"} 4\n'
    )


def test_labels_never_grow_without_bound() -> None:
    counter, histogram = Counter("c", "x", ("who",)), Histogram("h", "x", ("who",))
    for number in range(10 * MAX_SERIES):
        counter.add(str(number))
        histogram.observe(1, str(number))

    lines = [line for line in Page([counter, histogram]).text().splitlines() if line.startswith(("c{", "h_count{"))]
    assert len(lines) <= 2 * (MAX_SERIES + 1)
    assert f'c{{who="other"}} {9 * MAX_SERIES}' in lines


def test_values_beyond_the_limit_are_other() -> None:
    bounded = Bounded(2)

    assert [bounded(value) for value in "abacb"] == ["a", "b", "a", "other", "b"]


def test_large_counts_keep_every_digit() -> None:
    counter, histogram = Counter("c", "x"), Histogram("h", "x")
    for _ in range(2):
        counter.add(by=123_456_789_012.5)
        histogram.observe(1_234_567.25)

    lines = Page([counter, histogram]).text().splitlines()
    assert "c 246913578025" in lines
    assert "h_sum 2469134.5" in lines
