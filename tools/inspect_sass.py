"""Compile csrc/ and list, per kernel and architecture: registers, spills, shared memory, FP4 instructions found.

Needs nvcc alone, no GPU and no torch. The SASS is read with nvdisasm (on PATH, beside nvcc, or in the triton wheel);
without one the instruction columns stay empty. Exit status 1 where a file does not compile or a kernel spills.

    python tools/inspect_sass.py                                  # every architecture that nvcc knows
    python tools/inspect_sass.py --archs sm_100a --out runs/sass.json
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

CSRC = Path(__file__).resolve().parents[1] / "csrc"
ARCHS = ("sm_90a", "sm_100a", "sm_103a", "sm_120a")
FLAGS = ("-std=c++17", "-O3", "-fmad=false", "-Xptxas", "-v", "-cubin")
# what is counted: name -> pattern of the SASS instruction
INSTRUCTIONS = {
    "to E2M1": r"F2FP\S*\.E2M1\.F32(?!\S*\.RS)\S*",
    "to E2M1 .RS": r"F2FP\S*\.E2M1\S*\.RS\S*",
    "to E4M3": r"F2FP\S*\.E4M3\.F32\S*",
    "FP4 MMA": r"UTCOMMA\S*|OMMA\S*",
    "shuffles": r"SHFL\S*",
    "local memory": r"(?:LDL|STL)\S*",
}


@dataclass
class Kernel:
    """One kernel of one file for one architecture. found: instructions by the names above."""

    file: str
    arch: str
    name: str
    registers: int
    spill_bytes: int
    stack_bytes: int
    shared_bytes: int
    instructions: int = 0
    found: dict[str, int] = field(default_factory=dict)


def known_architectures() -> list[str]:
    """Those of ARCHS that this nvcc compiles for."""
    listed = subprocess.run(["nvcc", "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    return [arch for arch in ARCHS if arch.rstrip("a") in listed]


def disassembler() -> str | None:
    """nvdisasm, or None."""
    places = [shutil.which("nvdisasm"), *(_beside(nvcc) for nvcc in [shutil.which("nvcc")] if nvcc)]
    spec = importlib.util.find_spec("triton")
    if spec is not None and spec.origin:
        places.append(str(Path(spec.origin).parent / "backends/nvidia/bin/nvdisasm"))
    return next((place for place in places if place and Path(place).is_file()), None)


def _beside(nvcc: str) -> str:
    return str(Path(nvcc).resolve().parent / "nvdisasm")


def cached(source: Path, arch: str) -> list[Kernel]:
    """`inspect`, kept in the temporary folder by the text of csrc/, the compiler and the architecture."""
    texts = b"".join(path.read_bytes() for path in sorted([source, *CSRC.glob("*.h"), *CSRC.glob("*.cuh")]))
    version = subprocess.run(["nvcc", "--version"], capture_output=True, check=True).stdout
    name = hashlib.sha256(b"%s %s %s" % (texts, version, Path(__file__).read_bytes())).hexdigest()[:20]
    kept = Path(tempfile.gettempdir()) / f"fp4dist-sass-{source.stem}-{arch}-{name}.json"
    if kept.exists():
        return [Kernel(**row) for row in json.loads(kept.read_text(encoding="utf-8"))]
    kernels = inspect(source, arch)
    own = kept.with_suffix(f".{os.getpid()}")
    own.write_text(json.dumps([asdict(k) for k in kernels]), encoding="utf-8")
    own.replace(kept)
    return kernels


def inspect(source: Path, arch: str) -> list[Kernel]:
    """Compile one file; RuntimeError with the compiler's words if it does not."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "out.cubin"
        command = ["nvcc", *FLAGS, f"-arch={arch}", "-o", str(cubin), str(source)]
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode:
            raise RuntimeError(f"{source.name} for {arch}: {run.stderr.strip()[:3000]}")
        kernels = list(_reported(source.name, arch, run.stderr))
        tool = disassembler()
        if tool is not None:
            listing = subprocess.run([tool, "-c", str(cubin)], capture_output=True, text=True).stdout
            _count(kernels, listing)
    readable = _demangled([k.name for k in kernels])
    for kernel in kernels:
        kernel.name = readable[kernel.name]
    return kernels


def _reported(file: str, arch: str, text: str) -> Iterator[Kernel]:
    """What `ptxas -v` says of each kernel."""
    for name, rest in re.findall(r"Compiling entry function '(\S+)'(.*?)(?=Compiling entry|\Z)", text, re.DOTALL):

        def number(pattern: str, rest: str = rest) -> int:
            return sum(int(n) for n in re.findall(pattern, rest)[:1])

        spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill", rest))
        stack, shared = number(r"(\d+) bytes stack frame"), number(r"(\d+) bytes smem")
        yield Kernel(file, arch, name, number(r"Used (\d+) registers"), spills, stack, shared)


def _count(kernels: list[Kernel], listing: str) -> None:
    """Count instructions of each kernel in nvdisasm's listing."""
    parts = re.split(r"^\.text\.(\S+):$", listing, flags=re.MULTILINE)
    bodies = dict(zip(parts[1::2], parts[2::2], strict=True))
    for kernel in kernels:
        body = bodies.get(kernel.name, "")
        codes = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\S*)", body, re.MULTILINE)
        kernel.instructions = sum(code != "NOP" for code in codes)
        kernel.found = {name: sum(bool(re.fullmatch(p, code)) for code in codes) for name, p in INSTRUCTIONS.items()}


def _demangled(names: list[str]) -> dict[str, str]:
    tool = shutil.which("c++filt") or shutil.which("cu++filt")
    if tool is None:
        return {name: name for name in names}
    text = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    return {name: _short(line) for name, line in zip(names, text.splitlines(), strict=True)}


def _short(name: str) -> str:
    """Without namespaces, casts and parameters."""
    bare = re.sub(r"\(fp4dist::Rule\)(\d+)", r"rule \1", re.sub(r"^void ", "", name))
    bare = bare.replace("(anonymous namespace)::", "").replace("fp4dist::", "")
    return re.sub(r"\((?:int|bool)\)", "", re.sub(r"\((?!int\)|bool\)).*$", "", bare))


def main() -> int:
    """Compile, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archs", default="", help="comma-separated; default: all that nvcc knows")
    parser.add_argument("--files", default="*.cu", help="glob in csrc/")
    parser.add_argument("--jobs", type=int, default=min(8, os.cpu_count() or 1))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if shutil.which("nvcc") is None:
        raise SystemExit("nvcc is not on PATH; it comes with the CUDA toolkit (12.9 or newer for every architecture)")
    archs = [a for a in args.archs.split(",") if a] or known_architectures()
    jobs = [(source, arch) for arch in archs for source in sorted(CSRC.glob(args.files))]
    try:
        with ThreadPoolExecutor(args.jobs) as pool:
            kernels = [k for found in pool.map(lambda job: cached(*job), jobs) for k in found]
    except RuntimeError as error:
        print(error)
        return 1
    print(f"{'arch':<8} {'registers':>9} {'spills':>6} {'stack':>5} {'shared':>6} {'instr':>6}  found / kernel")
    for k in kernels:
        found = ", ".join(f"{n} {name}" for name, n in k.found.items() if n)
        numbers = f"{k.registers:>9} {k.spill_bytes:>6} {k.stack_bytes:>5} {k.shared_bytes:>6} {k.instructions:>6}"
        print(f"{k.arch:<8} {numbers}  {k.file}: {k.name}  [{found}]")
    spilling = [k for k in kernels if k.spill_bytes or k.stack_bytes]
    print(f"{len(kernels)} kernels for {', '.join(archs)}; {len(spilling)} spill or use a stack")
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps([asdict(k) for k in kernels], indent=1) + "\n", encoding="utf-8")
    return bool(spilling) or not kernels


if __name__ == "__main__":
    sys.exit(main())
