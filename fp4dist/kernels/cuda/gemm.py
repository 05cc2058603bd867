"""The GEMMs that torch lacks: FP4 products added to fp32 (`main_grad`), and several products with scales of their own.

csrc/cutlass has them, for compute capability 10.x and 12.x, where the extension was built with FP4DIST_CUTLASS. No
machine of this project could run them (docs/blackwell.md), so the first use on a GPU multiplies small operands whose
sums are exact and refuses to go on where they are not.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fp4dist.errors import KernelUnavailable
from fp4dist.kernels.cuda import decode
from fp4dist.numerics import dequantize
from fp4dist.numerics.scales import fp32
from fp4dist.numerics.tensor import BlockScaledTensor
from fp4dist.spec.formats import MXFP4, NVFP4

_K, _N = 32, 8  # multiples of the contracted dimension and of B's rows that TMA's 16 bytes ask for
Pair = tuple[BlockScaledTensor, BlockScaledTensor]


def is_there(device: torch.device) -> bool:
    """Whether the extension has these GEMMs for `device`; KernelUnavailable where they give wrong sums."""
    if device.type != "cuda" or not hasattr(torch.ops.fp4dist, "gemm_capabilities"):
        return False
    if torch.cuda.get_device_capability(device)[0] not in torch.ops.fp4dist.gemm_capabilities():
        return False
    return _is_exact(device)


def takes(pairs: Sequence[Pair], into: Sequence[Tensor | None] | None, out: torch.dtype) -> bool:
    """Whether one launch can multiply these pairs, each of FP4 codes under one format's scales.

    into   fp32 tensors that the products are added to; None: they are written, in `out`
    """
    if into is None and out != torch.bfloat16:
        return False
    sums = () if into is None else into
    return (
        all(t is not None and t.dtype == torch.float32 and _is_plain(t) for t in sums)
        and len({a.format.scale.name for a, _ in pairs}) == 1
        and all(0 not in a.shape and 0 not in b.shape for a, b in pairs)
        and all(a.shape[1] % _K == 0 and b.shape[0] % _N == 0 for a, b in pairs)
        and all(_is_plain(q.codes) for pair in pairs for q in pair)
    )


def multiply(pairs: Sequence[Pair], into: Sequence[Tensor] | None, rotations: Sequence[int]) -> list[Tensor]:
    """A B^T of each pair, added to `into`, or as bf16; what `takes` allows. rotations: of the pairs' common bases."""
    a, b = ([pair[i] for pair in pairs] for i in (0, 1))
    alphas = [
        (x.global_scale * w.global_scale * fp32(1.0 / n)).reshape(1)
        for x, w, n in zip(a, b, rotations, strict=True)
    ]  # fmt: skip
    out = (
        [torch.empty((x.shape[0], w.shape[0]), dtype=torch.bfloat16, device=x.codes.device) for x, w in pairs]
        if into is None
        else list(into)
    )
    torch.ops.fp4dist.gemm(
        [q.codes for q in a], [decode.swizzled(q) for q in a], [q.codes for q in b], [decode.swizzled(q) for q in b],
        alphas, a[0].format.scale.name == "e8m0", into is not None, out,
    )  # fmt: skip
    return out


def _is_plain(x: Tensor) -> bool:
    return x.is_contiguous() and x.data_ptr() % 16 == 0


@cache
def _is_exact(device: torch.device) -> bool:
    for name in ("nvfp4", "mxfp4"):
        pairs = [(_small(name, rows, 256, device), _small(name, columns, 256, device)) for rows, columns in _SIZES]
        wanted = [(dequantize(a).double() @ dequantize(b).double().t()).float() for a, b in pairs]
        ones = [1] * len(pairs)
        sums = [torch.full_like(w, 0.5) for w in wanted]
        alone = multiply(pairs[:1], [torch.full_like(wanted[0], 0.5)], ones[:1])
        found = {
            "one product, added": (alone, wanted[:1], 0.5),
            "products, added": (multiply(pairs, sums, ones), wanted, 0.5),
            "products": (multiply(pairs, None, ones), wanted, 0.0),
        }
        for what, (got, want, more) in found.items():
            if not all(torch.equal(g.float(), (w + more).to(g.dtype).float()) for g, w in zip(got, want, strict=True)):
                raise KernelUnavailable(
                    f"csrc/cutlass: {name} {what}: sums that fit into fp32 come out wrong on {device}"
                    f" ({torch.cuda.get_device_name(device)}); rebuild the extension without FP4DIST_CUTLASS, which"
                    " leaves these GEMMs to torch, and please report it"
                )
    return True


_SIZES = ((136, 256), (128, 40), (300, 128))


def _small(name: str, rows: int, columns: int, device: torch.device) -> BlockScaledTensor:
    """Random codes under scales of 1/2, 1 and 2: sums of 256 products have few bits."""
    generator = torch.Generator().manual_seed(rows)
    format_: Any = NVFP4 if name == "nvfp4" else MXFP4
    block = 16 if name == "nvfp4" else 32
    powers = torch.tensor([0x30, 0x38, 0x40] if name == "nvfp4" else [126, 127, 128], dtype=torch.uint8)
    codes = torch.randint(0, 256, (rows, columns // 2), generator=generator).to(torch.uint8)
    scales = powers[torch.randint(0, 3, (rows, columns // block), generator=generator)]
    shared = torch.tensor(0.25, device=device)
    return BlockScaledTensor(codes.to(device), scales.to(device), shared, format_, (1, block), 1)
