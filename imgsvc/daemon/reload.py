"""SIGHUP: which settings take effect while the daemon runs, and how. What cannot, keeps its old value and is named.

A new file is taken whole or not at all: everything that can refuse it is asked before anything changes.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from imgsvc import config
from imgsvc.config import Loaded

log = logging.getLogger(__name__)

S = TypeVar("S")
Commit = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Live:
    """Settings that can change. keys: dotted; a section means all its keys.

    prepare: checks new values and returns what puts them in force, which does not fail. Blocking, on the event loop's thread.
    It runs at every reload, so that files that are named may have changed, too.
    """

    keys: tuple[str, ...]
    prepare: Callable[[Loaded], Commit]

    def covers(self, key: str) -> bool:
        """Whether a dotted key is one of them."""
        return any(key == own or key.startswith(f"{own}.") for own in self.keys)


class Reloader:
    """Knows what the daemon runs with."""

    def __init__(self, loaded: Loaded, lives: Sequence[Live]) -> None:
        self.loaded = loaded
        self._lives = tuple(lives)

    def add(self, *lives: Live) -> None:
        """Add settings that can change; for objects that are built later."""
        self._lives += lives

    def reload(self, new: Loaded) -> None:
        """Go by a new configuration as far as that is possible. Raises: ImgsvcError, and nothing has changed then."""
        effective = Loaded(self._merged(self.loaded.config, new.config, ()), self._origins(new))
        commits = [live.prepare(effective) for live in self._lives]
        for commit in commits:
            commit()
        before, wanted, now = (dict(config.flatten(c)) for c in (self.loaded.config, new.config, effective.config))
        self.loaded = effective
        changed = sorted(key for key in before | now if before.get(key) != now.get(key))
        waiting = sorted(key for key in wanted | now if wanted.get(key) != now.get(key))
        log.info("configuration reloaded%s", f"; changed: {', '.join(changed)}" if changed else "")
        if waiting:
            log.warning("these changes need a restart: %s", ", ".join(waiting))

    def _merged(self, old: S, new: S, at: tuple[str, ...]) -> S:
        """`new` where that is live, `old` elsewhere."""
        values = {}
        for field in dataclasses.fields(old):  # type: ignore[arg-type]  # sections are dataclasses
            before, after = getattr(old, field.name), getattr(new, field.name)
            here = (*at, field.name)
            if any(live.covers(".".join(here)) for live in self._lives):
                values[field.name] = after
            elif dataclasses.is_dataclass(before):
                values[field.name] = self._merged(before, after, here)
            else:
                values[field.name] = before
        return type(old)(**values)

    def _origins(self, new: Loaded) -> dict[str, str]:
        def live(key: str) -> bool:
            return any(live.covers(key) for live in self._lives)

        kept = {key: where for key, where in self.loaded.origins.items() if not live(key)}
        return kept | {key: where for key, where in new.origins.items() if live(key)}
