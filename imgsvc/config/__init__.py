"""The daemon's configuration: typed sections, strict TOML, and the origin of every value.

    schema      every section and key
    reading     files, drop-ins and flags → Config; unknown keys and wrong values are errors with file:line:column
    writing     Config → TOML

Order of weight: defaults, the file, its imports (drop-ins, in name order), flags.
"""

from imgsvc.config.reading import Loaded, load, parse
from imgsvc.config.schema import LOG_LEVELS, VERSION, Config, Stream
from imgsvc.config.writing import flatten, table_to_toml, to_json, to_toml

__all__ = [
    "LOG_LEVELS",
    "VERSION",
    "Config",
    "Loaded",
    "Stream",
    "flatten",
    "load",
    "parse",
    "table_to_toml",
    "to_json",
    "to_toml",
]
