from __future__ import annotations

import string

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from imgsvc.base.errors import InvalidArgument
from imgsvc.base.oci import Digest
from imgsvc.base.reference import Reference

DIGEST = "sha256:" + "ab" * 32


@pytest.mark.parametrize(
    "text, full",
    [
        ("nginx", "docker.io/library/nginx:latest"),
        ("nginx:1.27", "docker.io/library/nginx:1.27"),
        ("me/app", "docker.io/me/app:latest"),
        ("docker.io/nginx", "docker.io/library/nginx:latest"),
        ("docker.io/library/nginx", "docker.io/library/nginx:latest"),
        ("index.docker.io/nginx", "docker.io/library/nginx:latest"),
        ("DOCKER.IO/nginx", "docker.io/library/nginx:latest"),
        ("Registry.Example/app", "registry.example/app:latest"),
        ("localhost/app", "localhost/app:latest"),
        ("localhost:5000/app", "localhost:5000/app:latest"),
        ("localhost:5000", "docker.io/library/localhost:5000"),
        ("[::1]:5000/a/b:c", "[::1]:5000/a/b:c"),
        ("10.0.0.1:5000/a/b/c:d", "10.0.0.1:5000/a/b/c:d"),
        ("quay.io/a/b_c/d__e/f-g/h.i:V_1.0-x", "quay.io/a/b_c/d__e/f-g/h.i:V_1.0-x"),
        (f"nginx@{DIGEST}", f"docker.io/library/nginx@{DIGEST}"),
        (f"nginx:1@{DIGEST}", f"docker.io/library/nginx:1@{DIGEST}"),
        ("a/" * 30 + "b", "docker.io/" + "a/" * 30 + "b:latest"),
    ],
)
def test_names_are_normalised_as_docker_does(text: str, full: str) -> None:
    assert str(Reference.parse(text)) == full


@pytest.mark.parametrize(
    "text",
    [
        "",
        " nginx",
        "nginx ",
        "nginx\n",
        "Nginx",
        "nginx:",
        ":tag",
        "nginx:" + "t" * 129,
        "nginx:-x",
        "nginx@",
        "nginx@sha256:",
        "nginx@sha256:" + "a" * 63,
        f"nginx@{DIGEST}@{DIGEST}",
        "ab" * 32,  # image IDs
        DIGEST,
        "a//b",
        "/a",
        "a/",
        "a/../b",
        "../a",
        "a/./b",
        "a..b",
        "a___b",
        "-a",
        "a-",
        "a/b:c/d:e:f",
        "registry.example:99999999/a",
        "registry.example:/a",
        "-registry.example/a",
        "registry_x.example/a",
        "[::1/a",
        "user@registry.example/a",
        "http://registry.example/a",
        "registry.example/a?b=c",
        "registry.example/a%2fb",
        "registry.example/ä",
        "registry.example/a\0b",
        "registry.example/" + "a" * 255,
        "１０.0.0.1/a",  # full-width digits
    ],
)
def test_bad_names_are_refused(text: str) -> None:
    with pytest.raises(InvalidArgument):
        Reference.parse(text)


def test_the_error_says_which_part_is_wrong() -> None:
    with pytest.raises(InvalidArgument, match=r'invalid tag "b c" in image reference "a:b c"'):
        Reference.parse("a:b c")
    with pytest.raises(InvalidArgument, match="is an image ID"):
        Reference.parse("ab" * 32)


@given(st.text(alphabet=string.ascii_letters + string.digits + "./:@-_[]%?\\ \n\0é", max_size=120))
@example("a@sha256:" + "0" * 64)
def test_whatever_parses_prints_and_parses_to_itself(text: str) -> None:
    try:
        reference = Reference.parse(text)
    except InvalidArgument:
        return
    assert Reference.parse(str(reference)) == reference
    assert str(reference).isprintable()
    assert not {"..", ".", ""} & set(reference.repository.split("/"))


def test_the_digest_decides_what_is_fetched() -> None:
    assert Reference.parse(f"a:1@{DIGEST}").target == DIGEST
    assert Reference.parse("a:1").target == "1"
    assert str(Reference.parse("a:1").with_digest(Digest(DIGEST))) == f"docker.io/library/a@{DIGEST}"
    assert Reference.parse(f"a@{DIGEST}").tagged == ""
