"""Several TOML files as one document that still knows where each key came from. Pure."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from imgsvc.base import tomlfile


@dataclass(frozen=True, slots=True)
class Merged(tomlfile.Document):
    """documents: the files, the heaviest last."""

    documents: tuple[tomlfile.Document, ...] = ()

    def where(self, *keys: str | int) -> str:
        """See Document; of several files that have a key, the one that decides."""
        for length in range(len(keys), 0, -1):
            for document in reversed(self.documents):
                if keys[:length] in document.positions:
                    return document.where(*keys[:length])
        return self.name


def merged(documents: Sequence[tomlfile.Document]) -> Merged:
    """Tables are merged key by key; of other values the last one stands."""
    data: dict[str, Any] = {}
    for document in documents:
        _merge(data, document.data)
    return Merged(documents[0].name, data, {}, tuple(documents))


def _merge(into: dict[str, Any], new: dict[str, Any]) -> None:
    for key, value in new.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = copy.deepcopy(value)
