"""tomlfile: positions, strictness and error texts."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imgsvc.base.errors import ImgsvcError, InvalidArgument
from imgsvc.base.tomlfile import Document, dotted, load, loads, parse_duration, suggestion

SAMPLE = """\
# a comment with [brackets] and = signs
server = "https://registry.test"   # trailing

[host."https://mirror.test:5000/v2"]
  capabilities = ["pull", # inner
    "resolve"]
  client = [["a.cert", "a.key"], ["b.pem", ""]]
  [host."https://mirror.test:5000/v2".header]
    x-one = ['a', \"\"\"b ] "quoted" \"\"\"]
[plain]
a.b = { c = 1, "d e" = { f = true } }
date = 1979-05-27 07:32:00
[[list]]
k = 1
[[list]]
k = 2
[list.sub]
z = 3
"""


@pytest.mark.parametrize(
    "keys, position",
    [
        (("server",), "2:1"),
        (("host",), "4:2"),
        (("host", "https://mirror.test:5000/v2"), "4:7"),
        (("host", "https://mirror.test:5000/v2", "capabilities"), "5:3"),
        (("host", "https://mirror.test:5000/v2", "capabilities", 1), "6:5"),
        (("host", "https://mirror.test:5000/v2", "client", 1), "7:34"),
        (("host", "https://mirror.test:5000/v2", "client", 1, 0), "7:35"),
        (("host", "https://mirror.test:5000/v2", "header", "x-one"), "9:5"),
        (("host", "https://mirror.test:5000/v2", "header", "x-one", 1), "9:19"),
        (("plain", "a", "b", "c"), "11:9"),
        (("plain", "a", "b", "d e", "f"), "11:26"),
        (("list", 0, "k"), "14:1"),
        (("list", 1, "k"), "16:1"),
        (("list", 1, "sub", "z"), "18:1"),
        (("plain", "missing", "deeper"), "10:2"),
    ],
)
def test_where_names_the_position_of_a_key(keys: tuple[str | int, ...], position: str) -> None:
    assert loads(SAMPLE, "hosts.toml").where(*keys) == f"hosts.toml:{position}"


def test_where_without_keys_or_with_unknown_ones_names_the_file() -> None:
    document = loads(SAMPLE, "hosts.toml")
    assert document.where() == "hosts.toml"
    assert document.where("nothing") == "hosts.toml"


def test_windows_line_ends_do_not_shift_positions() -> None:
    assert loads("a = 1\r\nb = 2\r\n", "f").where("b") == "f:2:1"


@pytest.mark.parametrize(
    "text, position",
    [
        ('server = "x"\n[host\nk = 1\n', "2:6"),
        ("a = \n", "1:5"),
        ("a = [1,\n", "1:8"),
        ("a = 1\na = 2\n", "2:6"),
        ("[t]\n[t]\n", "2:3"),
    ],
)
def test_syntax_errors_carry_line_and_column(text: str, position: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        loads(text, "f.toml")
    assert caught.value.where == f"f.toml:{position}"
    assert "at line" not in caught.value.what


@pytest.mark.parametrize("text", ["a = " + "[" * 100_000, "a = " + "9" * 10_000])
def test_hostile_text_is_an_error_not_a_crash(text: str) -> None:
    with pytest.raises(InvalidArgument):
        loads(text, "f.toml")


@pytest.mark.parametrize(
    "key, hint",
    [
        ("capabilites", 'did you mean "capabilities"?'),
        ("skip-verify", 'did you mean "skip_verify"?'),
        ("Server", 'did you mean "server"?'),
        ("zzz", "known keys: server, capabilities, skip_verify"),
    ],
)
def test_unknown_keys_are_refused_with_a_suggestion(key: str, hint: str) -> None:
    document = loads(f'[t]\n"{key}" = 1\n', "f.toml")
    with pytest.raises(InvalidArgument) as caught:
        document.check_keys(["server", "capabilities", "skip_verify"], "t")
    assert (caught.value.where, caught.value.hint) == ("f.toml:2:1", hint)
    assert suggestion(key, ["server", "capabilities", "skip_verify"]) == hint


def test_typed_values() -> None:
    document = loads('n = 1\ns = "x"\nb = true\nl = ["a"]\nd = "1m30s"\nbad = "soon"\n', "f.toml")
    assert document.typed(int, "n") == 1
    assert document.typed(str, "absent") is None
    assert document.strings("s") == ["x"]
    assert document.strings("l") == ["a"]
    assert document.strings("absent") == []
    assert document.duration("d") == 90.0
    with pytest.raises(InvalidArgument) as caught:
        document.typed(int, "b")
    assert str(caught.value) == "f.toml:3:1: b is true or false, expected an integer"
    with pytest.raises(InvalidArgument) as caught:
        document.duration("bad")
    assert caught.value.where == "f.toml:6:1"
    with pytest.raises(InvalidArgument):
        document.strings("n")


@pytest.mark.parametrize("text, seconds", [("0", 0), ("300ms", 0.3), ("1m30s", 90), ("1.5h", 5400), (".5s", 0.5), ("2us", 2e-6)])
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "5", "-1s", "1 s", "s", "1d", "1s "])
def test_bad_durations(text: str) -> None:
    with pytest.raises(InvalidArgument):
        parse_duration(text)


def test_load_reports_files_that_cannot_be_read(tmp_path: Path) -> None:
    cases = {
        "absent.toml": ("NOT_FOUND", None),
        "latin.toml": ("INVALID_ARGUMENT", b'a = 1\nb = "\xe9"\n'),
        "big.toml": ("INVALID_ARGUMENT", b"#" * (1024**2 + 1)),
    }
    for name, (code, content) in cases.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(ImgsvcError) as caught:
            load(tmp_path / name)
        assert caught.value.code == code
        assert caught.value.where.startswith(str(tmp_path / name))
    with pytest.raises(InvalidArgument):
        load(tmp_path)
    with pytest.raises(InvalidArgument) as latin:
        load(tmp_path / "latin.toml")
    assert latin.value.where.endswith(":2:6")


def test_dotted_quotes_what_needs_it() -> None:
    assert dotted(("host", "https://a.b", "client", 1)) == 'host."https://a.b".client[1]'


_keys = st.text(min_size=1, max_size=6).filter(lambda s: s.isprintable())
_scalars = st.one_of(st.integers(-9, 9), st.booleans(), st.text(max_size=8).filter(lambda s: s.isprintable()))
_values = st.recursive(
    _scalars, lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(_keys, inner, max_size=3)), max_leaves=8
)


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    if isinstance(value, list):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_toml(key)} = {_toml(item)}" for key, item in value.items()) + "}"
    return str(value)


def _paths(value: object, prefix: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    entries: list[tuple[str | int, object]] = []
    if isinstance(value, dict):
        entries = list(value.items())
    elif isinstance(value, list):
        entries = list(enumerate(value))
    found: list[tuple[str | int, ...]] = []
    for key, item in entries:
        found += [(*prefix, key), *_paths(item, (*prefix, key))]
    return found


@given(st.dictionaries(_keys, st.dictionaries(_keys, _values, max_size=3), max_size=3))
def test_every_key_of_any_document_has_a_position(data: dict[str, dict[str, object]]) -> None:
    text = "".join(f"[{_toml(t)}]\n" + "".join(f"{_toml(k)} = {_toml(v)}\n" for k, v in table.items()) for t, table in data.items())
    document: Document = loads(text, "f")
    assert document.data == tomllib.loads(text) == data
    assert set(document.positions) == set(_paths(data))
