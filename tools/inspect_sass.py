"""Compile csrc/ and list, per kernel and architecture: registers, spills, shared memory, FP4 instructions found.

Needs nvcc alone, no GPU and no torch. The SASS is read with nvdisasm (on PATH, beside nvcc, or in the triton wheel);
without one the instruction columns stay empty. Exit status 1 where a file does not compile or a kernel spills.

    python tools/inspect_sass.py                                  # every architecture that nvcc knows
    python tools/inspect_sass.py --archs sm_100a --out runs/sass.json
    FP4DIST_CUTLASS=1 python tools/inspect_sass.py --files 'cutlass/*.cu'     # CUTLASS's GEMMs: minutes, 6 GB each
    python tools/inspect_sass.py --docs docs/blackwell.md         # and write the table there
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import re
import runpy
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
BEGIN, END = "<!-- tools/inspect_sass.py -->", "<!-- end -->"
BUILD = runpy.run_path(str(CSRC / "build.py"))


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
    """`inspect`, kept in the temporary folder by the text of what is compiled, the compiler and the architecture."""
    texts = b"".join(path.read_bytes() for path in _with_includes(source))
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


def _with_includes(source: Path) -> list[Path]:
    """A file and what it includes of csrc/, and so on."""
    found, left = [], [source]
    while left:
        path = left.pop()
        if path in found or not path.is_file():
            continue
        found.append(path)
        names = re.findall(r'^#include "([^"]+)"', path.read_text(encoding="utf-8"), re.MULTILINE)
        left += [folder / name for name in names for folder in (path.parent, CSRC)]
    return sorted(found)


def inspect(source: Path, arch: str) -> list[Kernel]:
    """Compile one file; RuntimeError with the compiler's words if it does not."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "out.cubin"
        command = ["nvcc", *FLAGS, *_more_flags(source), f"-arch={arch}", "-o", str(cubin), str(source)]
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


def _more_flags(source: Path) -> list[str]:
    """Of the files in csrc/cutlass."""
    if source.parent == CSRC:
        return []
    headers = BUILD["cutlass_headers"]()
    if headers is None:
        raise RuntimeError(f"{source.name} needs CUTLASS's headers: set FP4DIST_CUTLASS, see csrc/build.py")
    return ["--expt-relaxed-constexpr", f"-I{headers}", f"-I{CSRC}"]


def fits(source: Path, arch: str) -> bool:
    """Whether a file is for an architecture: those of csrc/cutlass are for one kind."""
    return source.parent == CSRC or f"gemm_{BUILD['GEMMS'].get(arch)}_" in source.name


def table(kernels: list[Kernel]) -> str:
    """Markdown: of each file and architecture its kernels, their registers and shared memory, what was found."""
    lines = [
        "| file | architecture | kernels | registers | spilled bytes | shared bytes | instructions | found |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for file, arch in dict.fromkeys((k.file, k.arch) for k in sorted(kernels, key=lambda k: (k.file, k.arch))):
        here = [k for k in kernels if (k.file, k.arch) == (file, arch)]
        sums = {name: sum(k.found.get(name, 0) for k in here) for name in INSTRUCTIONS}
        found = ", ".join(f"{n} {name}" for name, n in sums.items() if n and name != "shuffles")
        numbers = [
            len(here), _range([k.registers for k in here]), sum(k.spill_bytes for k in here),
            max(k.shared_bytes for k in here), _range([k.instructions for k in here]),
        ]  # fmt: skip
        lines.append(f"| `{file}` | {arch} | {' | '.join(map(str, numbers))} | {found} |")
    return "\n".join(lines)


def _range(values: list[int]) -> str:
    return str(values[0]) if len(set(values)) == 1 else f"{min(values)}-{max(values)}"


def write_docs(page: Path, kernels: list[Kernel]) -> None:
    """Put the table between BEGIN and END of a page."""
    text = page.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise SystemExit(f"{page} has no lines {BEGIN} and {END} to put the table between")
    page.write_text(f"{before}{BEGIN}\n\n{table(kernels)}\n\n{END}{after}", encoding="utf-8")


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
    """Without namespaces, casts and parameters; of CUTLASS's kernels what tells them apart."""
    if "device_kernel" in name:  # too long for c++filt
        many = "grouped" if "GroupProblemShape" in name else "one"
        to = "bf16" if "bfloat16_t" in name else "fp32 + fp32"
        return f"gemm, {many}, to {to}"
    if "fill_table" in name:
        return "fill_table"
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
    parser.add_argument("--docs", type=Path, help="page whose table is to be replaced")
    parser.add_argument("--add", type=Path, nargs="*", default=[], help="reports of earlier calls that join the table")
    args = parser.parse_args()
    if shutil.which("nvcc") is None:
        raise SystemExit("nvcc is not on PATH; it comes with the CUDA toolkit (12.9 or newer for every architecture)")
    archs = [a for a in args.archs.split(",") if a] or known_architectures()
    jobs = [(source, arch) for arch in archs for source in sorted(CSRC.glob(args.files)) if fits(source, arch)]
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
    spilling = [k for k in kernels if (k.spill_bytes or k.stack_bytes) and not k.file.startswith("gemm_")]
    print(f"{len(kernels)} kernels for {', '.join(archs)}; {len(spilling)} beside CUTLASS's spill or use a stack")
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps([asdict(k) for k in kernels], indent=1) + "\n", encoding="utf-8")
    if args.docs is not None:
        earlier = [Kernel(**row) for path in args.add for row in json.loads(path.read_text(encoding="utf-8"))]
        write_docs(args.docs, [*kernels, *earlier])
    return bool(spilling) or not kernels


if __name__ == "__main__":
    sys.exit(main())
