"""Values of the configuration as people write them: sizes with units, lists, truth values."""

from __future__ import annotations

import re
import typing

_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(B|KiB|MiB|GiB|TiB|KB|MB|GB|TB)?\s*", re.ASCII)
_UNITS = {"": 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_UNITS |= {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def parse_size(text: str) -> int:
    """Bytes of "64MiB", "1.5 GiB", "200MB" or "4096". ValueError with what is accepted."""
    found = _SIZE.fullmatch(text)
    if not found:
        raise ValueError(f'{text!r} is not a size: write bytes, or a number with a unit such as "64MiB"')
    unit = _UNITS[found[2] or ""]
    return int(float(found[1]) * unit) if "." in found[1] else int(found[1]) * unit


def convert(key: str, kind: type, value: object) -> object:
    """`value` as the field's type `kind`; text (environment, command line) is parsed. `key` ends in the unit.

    ValueError with what is accepted. Pure.
    """
    if kind is bool:
        return _boolean(value)
    if kind is int:
        return _integer(key, value)
    if kind is float and not isinstance(value, bool) and isinstance(value, int | float | str):
        return float(value)
    if kind is str and isinstance(value, str):
        return value
    if typing.get_origin(kind) is tuple:
        return _strings(value)
    raise ValueError(f"{value!r} is not a {'text' if kind is str else kind.__name__}")


def _boolean(value: object) -> bool:
    words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in words:
        return words[value.lower()]
    raise ValueError(f"{value!r} is neither true nor false")


def _integer(key: str, value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str):
        return parse_size(value) if "_bytes" in key else int(value)
    raise ValueError(f"{value!r} is not a whole number")


def _strings(value: object) -> tuple[str, ...]:
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    if isinstance(value, list | tuple) and all(isinstance(part, str) for part in value):
        return tuple(value)
    raise ValueError(f"{value!r} is not a list of strings")
