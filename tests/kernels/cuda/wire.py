"""Where the wire codec of csrc/ and the reference differ, over the matrix of tests/comm/wire_parity.py.

python -m tests.kernels.cuda.wire            # on a GPU, with the extension built; exit status 1 if anything differs
python -m tests.kernels.cuda.wire emulated   # on a CPU: the same sources, compiled by a host compiler
python -m tests.kernels.cuda.wire gpu 3 8    # every eighth wire from the fourth on
python -m tests.kernels.cuda.wire faked      # whose codec runs on GPUs that are not there
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch

from fp4dist.comm import parts as p
from fp4dist.spec.wire import Wire
from tests.comm import wire_parity as matrix


def use_ours() -> None:
    """The matrix, with these kernels in place of Triton's."""
    from fp4dist.kernels.cuda import wire
    from fp4dist.kernels.wire import WireKernels

    ours = WireKernels(wire.encode, wire.accumulate, wire.recode, wire.sum_plain, "cuda")
    p.wire_kernels = lambda device: ours


def differences(device: torch.device, part: int = 0, of: int = 1) -> Iterator[str]:
    """What differs; on a CPU in short records alone, and in one message of each longer kind."""
    long = device.type == "cuda"
    some = [*matrix.wires(4096 if long else 512), *(Wire(chunk=chunk) for chunk in (1024, 8192, 16384))]
    some += [Wire(kind=kind, chunk=8192) for kind in ("mxfp4", "fp8", "int4")]
    for i, wire in enumerate(some[part::of]):
        x = matrix.family((max(13 * 512, 5 * wire.chunk) if long or wire.chunk < 8192 else wire.chunk + 300) + 37)
        for dtype in (torch.float32, torch.bfloat16):
            if long or (i % 2 == 0) == (dtype is torch.bfloat16):
                yield from matrix.differences(wire, x.to(dtype), device)
                yield from matrix.recoded(p.Parts.of([x.to(dtype).to(device)], wire), *sent(wire, x.to(dtype), device))
    yield from matrix.differences(Wire(chunk=512), matrix.family(300).to(torch.bfloat16), device)
    yield from matrix.plain_differences(device)


def sent(wire: Wire, x: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, Wire]:
    """Two senders' messages of x, and the wire."""
    whole = p.Parts.of([x], wire)
    return torch.stack([matrix.reference_encode(whole, rank) for rank in (1, 3)]).to(device), wire


def whose() -> None:
    """Print the backend of each function on a GPU of two compute capabilities."""
    from fp4dist.kernels import wire
    from tests.kernels.cuda import emulated, faked

    emulated.load()
    for capability in ((10, 0), (9, 0)):
        faked.pretend(capability)
        faked.register()
        wire.wire_kernels.cache_clear()
        found = wire.wire_kernels(torch.device("cuda"))
        modules = {getattr(found, name).__module__ for name in ("encode", "accumulate", "recode", "sum_plain")}
        print(capability[0], found.backend, *sorted(modules))


def main() -> int:
    """Print every difference."""
    if sys.argv[1:2] == ["faked"]:
        whose()
        return 0
    device = torch.device("cuda")
    if sys.argv[1:2] == ["emulated"]:
        from tests.kernels.cuda import emulated

        emulated.load()
        device = torch.device("cpu")
    use_ours()
    found = list(differences(device, *map(int, sys.argv[2:4])))
    print("\n".join(found) or f"no difference in the wire codec on {device}")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
