"""Plain YAML data -> frozen spec objects, strictly, and back.

Unknown keys, wrong types and bad tags are errors that name their full path and, where a word is near, suggest it.
Conveniences, all visible in the resolved dump: `17/16` and `2e-3` are floats; a string stands for a tagged block
(`rounding: stochastic`), a named format (`format: nvfp4`), or a spec with one main field (`x: nvfp4`); `bf16` for an
optional slot means "not quantized".
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal, Union, get_args, get_origin

from fp4dist.errors import ConfigError
from fp4dist.spec.recipe import HIGH_PRECISION

NONE = type(None)
_DECIMAL = r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?"
_NUMBER = re.compile(rf"\s*{_DECIMAL}\s*(/\s*{_DECIMAL}\s*)?")


def build(tp: Any, value: Any, path: str = "") -> Any:
    """Return `value` (plain YAML data) as an instance of type `tp`, or raise ConfigError naming `path`."""
    origin, args = get_origin(tp), get_args(tp)
    if origin in (Union, types.UnionType):
        return _union(args, value, path)
    if origin is Literal:
        if value not in args:
            raise _error(path, f"{value!r} is not one of {', '.join(map(str, args))}", str(value), map(str, args))
        return value
    if origin is tuple:
        return _tuple(args, value, path)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise _error(path, f"expected a mapping, got {value!r}")
        return {build(args[0], k, _join(path, k)): build(args[1], v, _join(path, k)) for k, v in value.items()}
    if dataclasses.is_dataclass(tp):
        return _dataclass(typing.cast(type, tp), value, path)
    if tp is float:
        return _float(value, path)
    if tp is str and type(value) in (int, float):
        raise _error(path, f"expected str, got {value!r}; write it in quotes")
    if tp is not Any and type(value) is not tp:
        raise _error(path, f"expected {getattr(tp, '__name__', tp)}, got {value!r} ({type(value).__name__})")
    return value


def plain(value: Any) -> Any:
    """Inverse of `build`: dataclasses to mappings, named formats to their names, tuples to lists."""
    named = hasattr(type(value), "from_name") and value.name in type(value).names()
    if named and type(value).from_name(value.name) == value:
        return value.name
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return [plain(v) for v in value]
    return value


def _float(value: Any, path: str) -> float:
    """A finite number, a fraction such as '17/16', or an exponent form that YAML reads as a string ('2e-3')."""
    number = _parsed_number(str(value)) if type(value) in (int, float, str) else math.nan
    if not math.isfinite(number):
        raise _error(path, f"expected a finite number, got {value!r} ({type(value).__name__})")
    return number


def _parsed_number(text: str) -> float:
    """NaN where `text` is no number."""
    if not _NUMBER.fullmatch(text):
        return math.nan
    above, _, below = text.partition("/")
    divisor = float(below or 1)
    return float(above) / divisor if divisor else math.nan


def _tuple(args: tuple[Any, ...], value: Any, path: str) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise _error(path, f"expected a list, got {value!r}")
    items = [args[0]] * len(value) if len(args) == 2 and args[1] is ... else list(args)
    if len(items) != len(value):
        raise _error(path, f"expected {len(items)} items, got {len(value)}: {value!r}")
    return tuple(build(t, v, f"{path}[{i}]") for i, (t, v) in enumerate(zip(items, value, strict=True)))


def _dataclass(tp: type, value: Any, path: str) -> Any:
    if isinstance(value, tp):
        return value
    if isinstance(value, str):
        if hasattr(tp, "from_name"):
            if value not in tp.names():  # type: ignore[attr-defined]
                names = tp.names()  # type: ignore[attr-defined]
                raise _error(path, f"{value!r} is not one of {', '.join(names)}", value, names)
            return tp.from_name(value)  # type: ignore[attr-defined]
        if hasattr(tp, "SHORTHAND"):
            value = {tp.SHORTHAND: value}  # type: ignore[attr-defined]
    if not isinstance(value, Mapping):
        raise _error(path, f"expected a mapping for {tp.__name__}, got {value!r}")
    fields = {f.name: f for f in dataclasses.fields(tp)}
    hints = {k: v for k, v in typing.get_type_hints(tp).items() if k in fields}
    for key in value:
        if key not in hints:
            raise _error(_join(path, key), f"unknown key of {tp.__name__}", str(key), hints)
    missing = [
        n
        for n, f in fields.items()
        if n not in value and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise _error(path, f"{tp.__name__} needs {', '.join(missing)}")
    built = {k: build(hints[k], v, _join(path, k)) for k, v in value.items()}
    try:
        return tp(**built)
    except ConfigError:
        raise
    except ValueError as e:
        raise _error(path, str(e)) from e


def _union(args: tuple[Any, ...], value: Any, path: str) -> Any:
    if value is None and NONE in args:
        return None
    blocks: list[type] = [t for t in args if isinstance(t, type) and _is_block(t)]
    tags = {_tag(t): t for t in blocks}
    if tags:
        if isinstance(value, tuple(blocks)):
            return value
        value = {"kind": value} if isinstance(value, str) else value
        if not isinstance(value, Mapping) or "kind" not in value:
            raise _error(path, f"expected one of {', '.join(tags)}, or a mapping with that `kind`; got {value!r}")
        kind = value["kind"]
        if not isinstance(kind, str) or kind not in tags:
            raise _error(_join(path, "kind"), f"{kind!r} is not one of {', '.join(tags)}", str(kind), tags)
        return build(tags[kind], value, path)
    words = [word for t in args if get_origin(t) is Literal for word in get_args(t)]  # `row`, where a list could stand
    if words and isinstance(value, str):
        if value in words:
            return value
        if not any(dataclasses.is_dataclass(t) for t in args):
            raise _error(path, f"{value!r} is neither a list nor one of {', '.join(words)}", value, words)
    target = next(t for t in args if t is not NONE)
    if value == HIGH_PRECISION and NONE in args and hasattr(target, "SHORTHAND"):
        return None
    return build(target, value, path)


def _is_block(tp: type) -> bool:
    """Whether a class is one of several that their `kind` tells apart: its own has one value."""
    return len(get_args(typing.get_type_hints(tp).get("kind"))) == 1


def _tag(tp: Any) -> str:
    return get_args(typing.get_type_hints(tp)["kind"])[0]


def _join(path: str, key: object) -> str:
    return f"{path}.{key}".lstrip(".")


def _error(path: str, what: str, got: str = "", known: Iterable[str] = ()) -> ConfigError:
    near = difflib.get_close_matches(got, list(known), 1) if got else []
    return ConfigError(f"{path}: {what}".removeprefix(": ") + (f"; did you mean '{near[0]}'?" if near else ""))
