# pyright: reportArgumentType=false, reportCallIssue=false
# (Triton's kernels: constants that the compiler takes in place of tl.constexpr, options beside the parameters)
"""What the machine's FP4 conversions do, against their documentation (`numerics.ptx`): for GPUs that have them.

Of `cvt.rs` the documentation leaves two things open; here the machine answers, and a difference is a finding, not a
fault: no kernel of this package uses that instruction under the name of stochastic rounding.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp4dist.numerics import ptx

NEAREST = (10, 0)  # compute capability with cvt.rn.satfinite.e2m1x2: 10.0, 10.3, 12.0
_BLOCK = 512

_NEAREST_ASM = "{ .reg .b8 t; cvt.rn.satfinite.e2m1x2.f32 t, $1, $2; cvt.u32.u8 $0, t; }"
_STOCHASTIC_ASM = "{ .reg .b16 t; cvt.rs.satfinite.e2m1x4.f32 t, {$1, $2, $3, $4}, $5; cvt.u32.u16 $0, t; }"


@triton.jit
def nearest_kernel(a, b, out, n, BLOCK: tl.constexpr, ASM: tl.constexpr):  # type: ignore[no-untyped-def]
    """out[i]: the byte of cvt.rn.satfinite.e2m1x2.f32 d, a[i], b[i]."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x, y = tl.load(a + i, mask=i < n), tl.load(b + i, mask=i < n)
    word = tl.inline_asm_elementwise(ASM, "=r,f,f", [x, y], dtype=tl.int32, is_pure=True, pack=1)
    tl.store(out + i, word, mask=i < n)


INTERPRETED = not isinstance(nearest_kernel, triton.JITFunction)  # by Triton, on a CPU


@triton.jit
def stochastic_kernel(x, noise, out, n, BLOCK: tl.constexpr, ASM: tl.constexpr):  # type: ignore[no-untyped-def]
    """out[i]: the 16 bits of cvt.rs.satfinite.e2m1x4.f32 d, {x[4i], x[4i + 1], x[4i + 2], x[4i + 3]}, noise[i]."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a, b, e, f = (
        tl.load(x + 4 * i, mask=i < n),
        tl.load(x + 4 * i + 1, mask=i < n),
        tl.load(x + 4 * i + 2, mask=i < n),
        tl.load(x + 4 * i + 3, mask=i < n),
    )
    r = tl.load(noise + i, mask=i < n)
    word = tl.inline_asm_elementwise(ASM, "=r,f,f,f,f,r", [a, b, e, f, r], dtype=tl.int32, is_pure=True, pack=1)
    tl.store(out + i, word, mask=i < n)


def check(device: torch.device) -> dict[str, str]:
    """Instruction -> `as documented`, or how it differs, or why it was not asked."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    if capability < NEAREST:
        return {"cvt.rn e2m1x2": _absent(capability), "cvt.rs e2m1x4": _absent(capability)}
    x = inputs()
    found = {"cvt.rn e2m1x2": _judge(nearest(x.to(device), x.flip(0).to(device)), documented_nearest(x, x.flip(0)))}
    if capability[0] != NEAREST[0]:
        return found | {"cvt.rs e2m1x4": f"not on compute capability {capability[0]}.{capability[1]}"}
    four, noise = quadruples()
    machine = stochastic(four.to(device), noise.to(device))
    return found | {"cvt.rs e2m1x4": _judge(machine, documented_stochastic(four, noise))}


def _absent(capability: tuple[int, int]) -> str:
    have = "no GPU" if capability == (0, 0) else f"compute capability {capability[0]}.{capability[1]}"
    return f"not there: {have}, the instruction came with 10.0"


def inputs() -> Tensor:
    """Every bf16 value, and the neighbours in fp32 of every tie."""
    every = (torch.arange(1 << 16, dtype=torch.int64) << 16).to(torch.int32).view(torch.float32)
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0])
    around = torch.cat([torch.nextafter(ties, torch.full_like(ties, end)) for end in (0.0, 9.0)])
    return torch.cat([every, ties, around, -ties, -around])


def quadruples() -> tuple[Tensor, Tensor]:
    """[n, 4] values between all levels, and [n] random bits: every byte, alone and beside others."""
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(1 << 16, 4, generator=generator) * 13 - 6.5
    noise = torch.randint(0, 1 << 32, (1 << 16,), generator=generator)
    noise[:1024] = torch.arange(1024) % 256 << (torch.arange(1024) // 256 * 8)
    return values, noise.to(torch.int32)


def nearest(a: Tensor, b: Tensor) -> Tensor:
    """[n] int32, by the machine."""
    out = torch.empty(len(a), dtype=torch.int32, device=a.device)
    nearest_kernel[(triton.cdiv(len(a), _BLOCK),)](a, b, out, len(a), _BLOCK, _NEAREST_ASM)
    return out.cpu()


def stochastic(x: Tensor, noise: Tensor) -> Tensor:
    """[n] int32 of [n, 4] values, by the machine."""
    out = torch.empty(len(x), dtype=torch.int32, device=x.device)
    stochastic_kernel[(triton.cdiv(len(x), _BLOCK),)](x.contiguous(), noise, out, len(x), _BLOCK, _STOCHASTIC_ASM)
    return out.cpu()


def documented_nearest(a: Tensor, b: Tensor) -> Tensor:
    """[n] int32, by the text."""
    return ptx.cvt_rn_satfinite_e2m1x2(ptx.bits_of(a), ptx.bits_of(b)).to(torch.int32)


def documented_stochastic(x: Tensor, noise: Tensor) -> Tensor:
    """[n] int32 of [n, 4] values, by the text."""
    a, b, e, f = (ptx.bits_of(x[:, i]) for i in range(4))
    return ptx.cvt_rs_satfinite_e2m1x4(a, b, e, f, noise.to(torch.int64) & 0xFFFFFFFF).to(torch.int32)


def _judge(machine: Tensor, text: Tensor) -> str:
    wrong = int((machine != text).sum())
    if not wrong:
        return f"as documented, {len(text)} words"
    first = int((machine != text).nonzero()[0])
    return f"differs in {wrong} of {len(text)} words, first {int(machine[first]):#x} instead of {int(text[first]):#x}"
