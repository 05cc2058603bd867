"""Where the Triton codec and the reference differ: on a GPU, or on a CPU in Triton's interpreter.

TRITON_INTERPRET=1 python -m tests.comm.wire_parity            # exit status 1 if anything differs
python -m tests.comm.wire_parity 3 8                           # the compiled kernels, on a GPU: each eighth wire
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from fp4dist.comm import codec as c
from fp4dist.comm import parts as p
from fp4dist.comm.codec import Noise
from fp4dist.spec.wire import Wire

NOISE = Noise(seed=3_000_000_000, step=12, bucket=4_000_000_000, stage=2)


def wires(chunk: int) -> Iterator[Wire]:
    """Every kind, rounding and rotation that a wire may have."""
    for kind in ("nvfp4", "mxfp4", "fp8", "int4"):
        for rounding in ("nearest", "stochastic", "eden"):
            for rotation in (0, 32, 128):
                for signs in ("shared", "per_rank"):
                    try:
                        wire = Wire(
                            kind=kind,
                            rounding=rounding,
                            rotation=rotation,
                            signs=signs,
                            chunk=chunk,
                            tag=rotation != 32,
                        )  # type: ignore[arg-type]
                    except ValueError:
                        continue
                    if signs == "shared" or rounding == "eden":
                        yield wire


def family(n: int) -> Tensor:
    """[n] of runs of 512 with what a codec may get wrong: wide ranges, zeros, subnormals, ties, NaN, Inf, large."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(n, generator=generator)
    runs = x[: n // 512 * 512].view(-1, 512)
    for i, run in enumerate(runs):
        what = i % 16
        if what == 1:
            run *= torch.exp2(torch.randint(-30, 30, (512,), generator=generator).float())
        elif what == 2:
            run.zero_()
        elif what == 3:
            run *= 1e-40
        elif what == 4:
            run.copy_(torch.randint(-24, 25, (512,), generator=generator) / 4)
        elif what == 5:
            run *= 1e35
        elif what == 6:
            run[::16] = 0.0
            run[1::32] *= -0.0
        elif what == 7:
            run *= 1e-37
        elif what == 8:
            run.view(-1, 16).mul_((torch.arange(32) % 4 != 0)[:, None])
        elif what == 9:
            run[3] = float("nan")
        elif what == 11:
            run[200] = float("inf")
    return x


def differences(wire: Wire, x: Tensor, device: torch.device) -> Iterator[str]:
    """Texts for what differs between kernels on `device` and the reference on the CPU, for one wire and input."""
    on_gpu = device.type == "cuda"
    if x.numel() > 2 * wire.chunk + 1000:  # with and without 16-byte alignment, whole and ragged records
        pieces = [x[:704], x[712 : 712 + wire.chunk], x[777 : 777 + wire.chunk + 40], x[-5:]]
    else:
        pieces = [x]
    ours = p.Parts.of([t.to(device) for t in pieces], wire, wire.chunk, first=5)
    theirs = p.Parts.of(pieces, wire, wire.chunk, first=5)
    found = torch.stack([run_encode(ours, rank) for rank in (1, 3)]).cpu()
    wanted = torch.stack([reference_encode(theirs, rank) for rank in (1, 3)])
    if not torch.equal(found, wanted):
        where = (found != wanted).reshape(2, -1, ours.unit).nonzero()[0].tolist()
        yield f"{wire.label()} {x.dtype}: bytes differ, first at (sender, record, byte) {where}"
    for with_own, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        out = [torch.zeros_like(t, dtype=dtype, device=device) for t in pieces]
        want = [torch.zeros_like(t, dtype=dtype) for t in pieces]
        own = p.Parts.of(pieces, wire, wire.chunk) if with_own else None
        own_there = p.Parts.of(list(ours.tensors), wire, wire.chunk) if with_own else None
        bad = run_sum(p.Parts.of(out, wire, wire.chunk), wanted.to(device), own_there, 1 / 3)
        if bad != p._NONE_WRONG:
            yield f"{wire.label()}: the check found fault with record {bad}"
        p.decode_parts(p.Parts.of(want, wire, wire.chunk), wanted, NOISE, [1, 3], own, 1 / 3, check=True, place="here")
        for a, b in zip(out, want, strict=True):
            if not torch.equal(a.cpu().nan_to_num(nan=12345.0), b.nan_to_num(nan=12345.0)):
                yield f"{wire.label()} {x.dtype} own {with_own} {dtype}: sums differ"
    damaged = wanted.clone()
    if on_gpu or wire.rounding == "eden":  # the interpreter is slow
        yield from recoded(ours, wanted.to(device), wire)
    second = min(1, ours.records - 1)
    damaged[1, second * ours.unit + 16 + 7] ^= 4
    if wire.tag and run_sum(p.Parts.of(out, wire, wire.chunk), damaged.to(device), None, 1.0) != ours.records + second:
        yield f"{wire.label()}: a damaged byte was not found"


def recoded(own: p.Parts, messages: Tensor, wire: Wire) -> Iterator[str]:
    """Summing and coding again in one kernel, against one after the other."""
    sums = [torch.zeros_like(t, dtype=torch.float32) for t in own.tensors]
    run_sum(p.Parts.of(sums, wire, wire.chunk), messages, own, 1 / 3)
    wanted = reference_encode(p.Parts.of([t.cpu() for t in sums], wire, wire.chunk), 6)
    out = p.Parts.of(list(own.tensors), wire, wire.chunk)
    runs = ((0, out.records),)
    found, _ = p.recode_parts(out, messages, NOISE, [1, 3], own, 1 / 3, runs, NOISE, 6, False, None)
    if not torch.equal(found.cpu(), wanted):
        where = (found.cpu() != wanted).view(-1, out.unit).nonzero()[0].tolist()
        yield f"{wire.label()} {own.tensors[0].dtype}: coded again, bytes differ, first at (record, byte) {where}"


def run_encode(parts: p.Parts, rank: int) -> Tensor:
    """`encode_parts`, by the kernels on any device."""
    runs = ((0, parts.records),)
    base, offsets = p._placed(parts.tensors)
    out = torch.empty(parts.bytes, dtype=torch.uint8, device=base.device)
    shared, sign_rank = p._shared(parts, NOISE, rank, 3), NOISE.sign_rank(parts.wire, rank)
    for table, aligned in p._tables(parts.sizes, offsets, None, parts.chunk, parts.first, runs, True, base.device):
        p.wire_kernels(base.device).encode(base, table, out.view(-1, parts.unit), shared, sign_rank, aligned)
    return out


def reference_encode(parts: p.Parts, rank: int) -> Tensor:
    """`encode_parts`, by the reference."""
    index = torch.arange(parts.records)
    counts = torch.from_numpy(p._counts(parts.sizes, parts.chunk))
    return c.encode_rows(p._rows(parts), counts, index + parts.first, parts.wire, NOISE, rank).flatten()


def run_sum(out: p.Parts, messages: Tensor, own: p.Parts | None, factor: float) -> int:
    """`decode_parts` of two senders, by the kernels on any device; the first wrong record."""
    records = messages.reshape(2, -1, out.unit)
    bad = p._decode_on_gpu(out, records, NOISE, [1, 3], own, factor, ((0, out.records),), True, None)
    assert bad is not None
    return int(bad)


def plain_differences(device: torch.device) -> Iterator[str]:
    """The same for sums of plain messages of three senders."""
    x = family(9000)
    for kind, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32), ("bf16", torch.float32)):
        wire = Wire(kind=kind)  # type: ignore[arg-type]
        for cut in (4096 + 16, 4099):
            pieces = [x[:cut].to(dtype).clone(), x[cut : 2 * cut].to(dtype).clone()]
            messages = torch.stack(
                [p.encode_parts(p.Parts.of([t * k for t in pieces], wire), NOISE, 0) for k in (1, 2, 3)]
            )
            for own_at in (None, 0, 1, 3):
                own = p.Parts.of(pieces, wire) if own_at is not None else None
                there = p.Parts.of([t.to(device) for t in pieces], wire) if own_at is not None else None
                found = [torch.zeros(cut, dtype=dtype, device=device) for _ in pieces]
                want = [torch.zeros(cut, dtype=dtype) for _ in pieces]
                runs = ((0, 2 * cut),)
                p._sum_plain_on_gpu(p.Parts.of(found, wire), messages.to(device), there, 1 / 3, runs, own_at)
                p._sum_plain(p.Parts.of(want, wire), messages, own, 1 / 3, runs, own_at)
                for a, b in zip(found, want, strict=True):
                    if not torch.equal(a.cpu().nan_to_num(nan=12345.0), b.nan_to_num(nan=12345.0)):
                        yield f"plain {kind} {dtype} {cut} own at {own_at}: sums differ"


def main(part: int = 0, of: int = 1) -> int:
    """Print every difference; of the wires, each `of`-th from `part` on."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    faults: list[str] = []
    some = list(wires(4096 if on_gpu else 512))
    some += [Wire(chunk=chunk) for chunk in (512, 1024, 16384)] if on_gpu else []
    chosen = some[part::of] if on_gpu else [w for i, w in enumerate(some) if i % 4 == 0 or w.rounding == "eden"]
    for i, wire in enumerate(chosen):
        x, started = family(max(13 * 512, 5 * wire.chunk) + 37), time.monotonic()
        for dtype in (torch.float32, torch.bfloat16):  # compiling is what takes time: both for the default alone
            if (on_gpu and wire == Wire()) or ((part + i) % 2 == 0) == (dtype is torch.bfloat16):
                faults += differences(wire, x.to(dtype), device)
        if on_gpu:
            print(f"{wire.label()}, records of {wire.chunk}: {time.monotonic() - started:.1f} s", flush=True)
    if part == of - 1:
        faults += differences(Wire(chunk=512), family(300).to(torch.bfloat16), device)
        faults += plain_differences(device)
    print("\n".join(faults) or f"no difference in {len(chosen)} wires on {device}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:3])))
