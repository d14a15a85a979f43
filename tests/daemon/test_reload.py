"""What a reload changes: live settings, all or nothing; the rest keeps its value and is named."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest

from imgsvc import config
from imgsvc.base.errors import InvalidArgument
from imgsvc.config import Loaded
from imgsvc.daemon.reload import Live, Reloader


def loaded(text: str) -> Loaded:
    return config.parse(f"version = 1\n{text}", "file")


def live(*keys: str, put: Callable[[Loaded], None], check: Callable[[Loaded], None] = lambda new: None) -> Live:
    def prepare(new: Loaded) -> Callable[[], None]:
        check(new)
        return lambda: put(new)

    return Live(keys, prepare)


def test_what_is_live_changes_and_the_rest_is_named(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    seen: list[int] = []
    reloader = Reloader(
        loaded('[gc]\nmin_free = 1\n[mirror]\naddress = "127.0.0.1:1"\n'), [live("gc", put=lambda new: seen.append(new.config.gc.min_free))]
    )

    reloader.reload(loaded('[gc]\nmin_free = 2\n[mirror]\naddress = "127.0.0.1:2"\n[images]\nsync = "none"\n'))

    assert seen == [2]
    assert reloader.loaded.config.gc.min_free == 2
    assert reloader.loaded.config.mirror.address == "127.0.0.1:1"
    assert reloader.loaded.config.images.sync == "full"
    assert reloader.loaded.origin("gc.min_free") == "file:3:1"
    assert "changed: gc.min_free" in caplog.text
    assert "need a restart: images.sync, mirror.address" in caplog.text


def test_a_value_that_is_refused_changes_nothing_at_all() -> None:
    seen: list[int] = []

    def refuse(new: Loaded) -> None:
        if new.config.verify.policy:
            raise InvalidArgument("a broken policy")

    lives = [live("gc", put=lambda new: seen.append(new.config.gc.min_free)), live("verify", put=lambda new: None, check=refuse)]
    reloader = Reloader(loaded("[gc]\nmin_free = 1\n"), lives)

    with pytest.raises(InvalidArgument):
        reloader.reload(loaded('[gc]\nmin_free = 2\n[verify]\npolicy = "/broken"\n'))

    assert seen == []
    assert reloader.loaded.config.gc.min_free == 1


def test_what_waited_for_a_restart_is_named_at_every_reload_and_tables_change_as_a_whole(caplog: pytest.LogCaptureFixture) -> None:
    reloader = Reloader(loaded(""), [live("registry", put=lambda new: None)])
    text = '[registry.credentials.hosts."a.example"]\nusername = "u"\npassword_file = "/p"\n[cni]\nmax_conf_num = 2\n'

    for _ in range(2):
        caplog.clear()
        reloader.reload(loaded(text))
        assert "need a restart: cni.max_conf_num" in caplog.text
    assert reloader.loaded.config.registry.credentials.hosts["a.example"].username == "u"
    reloader.reload(loaded(""))
    assert reloader.loaded.config.registry.credentials.hosts == {}
