"""Slurm's short form of host names: gb-r01-t[01-16],gb-r02-t[03,05-07] and back.

Only the last number of a name is folded, as `scontrol show hostlist` does for names of one dimension.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import groupby

from fp4dist.errors import ConfigError

_NAME = re.compile(r"^(.*?)(\d+)$")
_PART = re.compile(r"(?:[^,\[\]]|\[[^\[\]]*\])+")  # a comma inside brackets does not separate


def compress(hosts: Sequence[str]) -> str:
    """The short form of `hosts`, in their order; neighbours that differ in their last number by one share a range."""
    groups: list[str] = []
    for (stem, width), members in groupby(map(_split, hosts), key=lambda s: s[:2]):
        numbers = [number for _, _, number in members]
        if width == 0:
            groups += [stem] * len(numbers)
        elif len(numbers) == 1:
            groups.append(f"{stem}{numbers[0]:0{width}d}")
        else:
            groups.append(f"{stem}[{','.join(_ranges(numbers, width))}]")
    return ",".join(groups)


def expand(text: str) -> list[str]:
    """Every host of a list such as a[1-3,7],b; raises ConfigError on brackets that do not match or an empty range."""
    hosts: list[str] = []
    stripped = text.strip()
    if stripped.count("[") != stripped.count("]") or re.search(r"\[[^\]]*\[|\]\]|\[\]", stripped):
        raise ConfigError(f"host list {text!r}: brackets do not match; write name[01-16,18]")
    for part in _PART.findall(stripped):
        hosts += _expand_part(part.strip(), text)
    return hosts


def natural(name: str) -> tuple[tuple[int, int, str], ...]:
    """Sort key that counts digits as numbers, as `sort -V` does: t2 before t10."""
    pieces = re.findall(r"\d+|\D+", name)
    return tuple((0, int(p), p) if p.isdigit() else (1, 0, p) for p in pieces)


def _split(host: str) -> tuple[str, int, int]:
    """(stem, digits of the last number, the number); digits 0 where the name ends in none."""
    found = _NAME.match(host)
    return (found[1], len(found[2]), int(found[2])) if found else (host, 0, 0)


def _ranges(numbers: Iterable[int], width: int) -> list[str]:
    runs: list[list[int]] = []
    for n in numbers:
        if runs and runs[-1][1] + 1 == n:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return [f"{a:0{width}d}" if a == b else f"{a:0{width}d}-{b:0{width}d}" for a, b in runs]


def _expand_part(part: str, text: str) -> list[str]:
    head, bracket, rest = part.partition("[")
    if not bracket:
        return [part] if part else []
    inside, _, tail = rest.partition("]")
    names: list[str] = []
    for item in inside.split(","):
        first, dash, last = item.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()) or (dash and int(last) < int(first)):
            raise ConfigError(f"host list {text!r}: {item!r} is not a number or a rising range; write 01-16")
        names += [f"{head}{n:0{len(first)}d}" for n in range(int(first), int(last or first) + 1)]
    return [name + end for name in names for end in (_expand_part(tail, text) or [""])]
