"""The daemon's configuration: files, drop-ins, flags, origins, and what is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from imgsvc import config
from imgsvc.base.errors import InvalidArgument, NotFound


def write(directory: Path, text: str, name: str = "config.toml") -> Path:
    path = directory / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


def test_drop_ins_in_the_order_of_their_patterns_and_names_each_once(tmp_path: Path) -> None:
    main = write(tmp_path, 'version = 1\nimports = ["d/*.toml", "d/a.toml"]\n[gc]\nmin_free = 1\n[images]\nsync = "none"\n')
    write(tmp_path, "[gc]\nmin_free = 3\n", "d/b.toml")
    write(tmp_path, '[gc]\nmin_free = 2\n[metrics]\naddress = "127.0.0.1:1"\n', "d/a.toml")

    loaded = config.load(main, {"debug.level": ("--log-level", "error")})

    assert (loaded.config.gc.min_free, loaded.config.images.sync, loaded.config.debug.level) == (3, "none", "error")
    assert loaded.origin("gc.min_free") == f"{tmp_path}/d/b.toml:2:1"
    assert loaded.origin("metrics.address") == f"{tmp_path}/d/a.toml:4:1"
    assert (loaded.origin("debug.level"), loaded.origin("gc.schedule_delay")) == ("--log-level", "default")
    assert loaded.files == (str(main), f"{tmp_path}/d/a.toml", f"{tmp_path}/d/b.toml")


def test_a_name_that_is_imported_has_to_be_there(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"gone\.toml") as absent:
        config.load(write(tmp_path, 'version = 1\nimports = ["gone.toml"]\n'))
    assert absent.value.where == f"{tmp_path}/config.toml:2:1"


@pytest.mark.parametrize(
    "text, what",
    [
        ('[proxy_plugins.stargz]\ntype = "snapshot"\n', "other processes"),
        ('[plugins."io.containerd.cri.v1.images"]\nx = 1\n', "config import"),
        ('[runtime.runtimes.a]\nsnapshotter = "stargz"\n', "overlayfs, erofs or native"),
        ('[images]\nsnapshotter = "stargz"\n', "overlayfs, erofs or native"),
        ('[debug]\nlevel = "loud"\n', "info"),
        ("[imagess]\nx = 1\n", 'did you mean "images"'),
    ],
)
def test_what_is_refused_says_why_and_where(text: str, what: str) -> None:
    with pytest.raises(InvalidArgument, match=what) as refused:
        config.parse(f"version = 1\n{text}", "file")
    assert refused.value.where.startswith("file:")


def test_a_dump_as_json_has_every_key_and_no_secret(tmp_path: Path) -> None:
    loaded = config.load(write(tmp_path, 'version = 1\nimports = []\n[registry.configs."h".auth]\npassword = "hunter2"\n'))

    dumped = config.to_json(loaded.config, loaded.origins)

    assert dumped.keys() == dict(config.flatten(loaded.config)).keys()
    assert dumped["imports"] == {"value": (), "origin": f"{tmp_path}/config.toml:2:1"}
    assert "hunter2" not in str(dumped)
