"""The operators of csrc/ on a CPU: its device code, compiled by a host compiler against emulator/, through ctypes.

`load()` registers them as torch.ops.fp4dist.*, so that fp4dist.kernels.cuda runs as on a GPU, block by block. It comes
before the import of fp4dist.kernels.cuda.ops, in a process of its own: `python -m tests.kernels.cuda.emulated`.
"""

from __future__ import annotations

import ctypes
import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.kernels.cuda import emulated_grid, emulated_parts, emulated_wire

ROOT = Path(__file__).resolve().parents[3]
EMULATOR = Path(__file__).resolve().parent / "emulator"
FLAGS = ("-std=c++17", "-O1", "-ffp-contract=off", "-fPIC", "-Wno-unknown-pragmas", "-U_FORTIFY_SOURCE")


PARTS = ("data", "q_scales", "q_global", "outer", "when", "codes", "scales", "values", "top", "global_scale", "kept")


class Pointers(ctypes.Structure):
    """JobPointers of csrc/jobs.h."""

    _fields_ = [(name, ctypes.c_void_p) for name in PARTS]


def compiler() -> str | None:
    """A C++ compiler, or None."""
    return shutil.which("g++") or shutil.which("clang++")


def build() -> Path:
    """The shared library, from a cache by the text of its sources."""
    sources = [*sorted((ROOT / "csrc").glob("*.cu")), *sorted(EMULATOR.glob("*.cpp"))]
    texts = [*sources, *(ROOT / "csrc").glob("*.*h"), *EMULATOR.glob("*.h")]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(texts))).hexdigest()[:16]
    library = Path(tempfile.gettempdir()) / f"fp4dist-emulator-{digest}.so"
    if library.exists():
        return library
    cxx = compiler()
    assert cxx is not None
    with tempfile.TemporaryDirectory() as folder:
        command = [cxx, *FLAGS, f"-I{EMULATOR}", f"-I{ROOT / 'csrc'}", "-x", "c++", "-c"]

        def one(source: Path) -> Path:
            to = Path(folder) / f"{source.name}.o"
            run = subprocess.run([*command, "-o", str(to), str(source)], capture_output=True, text=True)
            if run.returncode:
                raise RuntimeError(f"{source.name}: {run.stderr[:2000]}")
            return to

        with ThreadPoolExecutor(2) as pool:
            objects = list(pool.map(one, sources))
        made = Path(folder) / "emulator.so"
        subprocess.run([cxx, "-shared", "-o", str(made), *map(str, objects)], check=True)
        shutil.copy(made, f"{library}.{digest}")
        Path(f"{library}.{digest}").replace(library)
    return library


def schemas() -> list[str]:
    """Those of csrc/bindings*.cpp."""
    text = "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "csrc").glob("bindings*.cpp")))
    return ["".join(re.findall(r'"([^"]*)"', found)) for found in re.findall(r"m\.def\((.*?)\);", text, re.DOTALL)]


_kept: list[Any] = []


def load() -> ctypes.CDLL:
    """Register the operators for CPU tensors."""
    library = ctypes.CDLL(str(build()))
    ops = torch.library.Library("fp4dist", "DEF")
    for schema in schemas():
        ops.define(schema)
    _kept.extend((library, ops))

    def at(x: Tensor | None) -> ctypes.c_void_p:
        return ctypes.c_void_p(0 if x is None else x.data_ptr())

    def longs(values: list[int]) -> ctypes.Array[ctypes.c_int64]:
        return (ctypes.c_int64 * len(values))(*values)

    def doubles(values: list[float]) -> ctypes.Array[ctypes.c_double]:
        return (ctypes.c_double * len(values))(*values)

    def done(error: int) -> None:
        if error:
            raise RuntimeError("no kernel for this job")

    def pointers(*parts: Tensor | None) -> Any:
        return ctypes.byref(Pointers(*(0 if x is None else x.data_ptr() for x in parts)))

    def amax(x: Tensor) -> Tensor:
        out = torch.empty(())
        kinds = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
        done(library.emulated_amax(at(x), ctypes.c_int64(x.numel()), kinds[x.dtype], at(out)))
        return out

    def quantize(source: Tensor, *rest: Any) -> None:
        read, (how, factors), out = rest[:4], rest[4:6], rest[6:]
        done(library.emulated_quantize(pointers(source, *read, *out), longs(how), doubles(factors)))

    def quantize_pair(source: Tensor, when: Any, outer: Any, how: Any, factors: Any, *rest: Any) -> None:
        out, (outer_t, how_t, factors_t), out_t = rest[:6], rest[6:9], rest[9:]
        done(
            library.emulated_quantize_pair(
                pointers(source, None, None, outer, when, *out), longs(how), doubles(factors),
                pointers(source, None, None, outer_t, when, *out_t), longs(how_t), doubles(factors_t),
            )
        )  # fmt: skip

    def eden_scales(
        corrected: Tensor, largest: Any, codes: Any, when: Any, columns: int, budget: float, swizzled: bool, place: Any,
        scales: Any, values: Any, global_scale: Any,
    ) -> None:  # fmt: skip
        done(
            library.emulated_eden_scales(
                at(corrected), at(largest), at(codes), at(when), ctypes.c_int64(corrected.numel()),
                ctypes.c_int64(columns), ctypes.c_double(budget), int(swizzled), longs(place), at(scales), at(values),
                at(global_scale),
            )
        )  # fmt: skip

    def decode(
        codes: Tensor, scales: Tensor, global_scale: Tensor, block: Any, e8m0: bool, turned: bool, to: int,
        factor: float, top: Any, values: Tensor, scale: Any, lost: Any, memory: Any,
    ) -> None:  # fmt: skip
        rows, width = codes.shape
        done(
            library.emulated_decode(
                at(codes), at(scales), at(global_scale), int(e8m0), rows, width * 2, *block, to, int(turned),
                ctypes.c_double(factor), at(top), at(values), at(scale), at(lost), at(memory),
            )
        )  # fmt: skip

    def largest_byte(scales: Tensor, top: Tensor) -> None:
        done(library.emulated_largest_byte(at(scales), ctypes.c_int64(scales.numel()), at(top)))

    def swizzle(scales: Tensor, repeat: int, out: Tensor) -> None:
        done(library.emulated_swizzle(at(scales), *scales.shape, repeat, at(out)))

    for function in (amax, quantize, quantize_pair, eden_scales, decode, largest_byte, swizzle):
        ops.impl(function.__name__, function, "CPU")
    for module in (emulated_grid, emulated_parts, emulated_wire):
        for function in module.implementations(library):
            ops.impl(function.__name__, function, "CPU")
    return library


def main() -> int:
    """The parity matrices, on a CPU."""
    load()
    from tests.kernels.cuda import more_parity, parity, parts

    cpu = torch.device("cpu")
    return parity.main(cpu) | more_parity.main(cpu) | parts.main(cpu)


if __name__ == "__main__":
    sys.exit(main())
