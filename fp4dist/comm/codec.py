"""Values to records and back: the reference in torch, and which implementation runs where.

`encode_rows` and `decode_rows` define every bit; the Triton kernels (`fp4dist.kernels.triton.wire`) obtain the same.
Noise is counted, not drawn from a state: Philox key (seed, bucket), counter (index, rank, step, stage + 8 * stream),
where an element's index is its record's number * chunk + its place, so equal arguments give equal bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from fp4dist.comm import records as r
from fp4dist.numerics import codes as c
from fp4dist.numerics import quantize, rng, scales
from fp4dist.numerics.grouping import block_amax, blocked, flat, tree_sum
from fp4dist.numerics.rotation import butterflies
from fp4dist.numerics.tensor import Key
from fp4dist.spec.blocks import E4M3_NO_CLIP, AbsMax, Ceil, Eden, Nearest, Stochastic
from fp4dist.spec.formats import E2M1, FP8_E4M3, FP32, INT4, MXFP4, NVFP4, Format
from fp4dist.spec.recipe import QuantSpec
from fp4dist.spec.wire import HEADER, Wire

# Counter streams that no quantizer of a GEMM uses, so that wire and GEMM noise never coincide.
ROUNDING, SIGNS = 64, 65
EDEN = Eden()
ELEMENTS = {"nvfp4": E2M1, "mxfp4": E2M1, "fp8": FP8_E4M3, "int4": INT4}


@dataclass(frozen=True, slots=True)
class Noise:
    """Which message of a run this is: decides every random bit together with the sender's rank.

    seed     the run's seed
    step     optimizer step, or whatever counts the uses of a bucket
    bucket   number of the bucket, layer or tensor
    stage    0 to 7: what tells the codings of one bucket in one step apart; a collective that codes twice uses `after`
    """

    seed: int
    step: int
    bucket: int
    stage: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.stage < 8:
            raise ValueError(f"stage = {self.stage} must be in [0, 8)")

    @property
    def after(self) -> Noise:
        """That of the next coding of the same values."""
        return Noise(self.seed, self.step, self.bucket, (self.stage + 1) % 8)

    def key(self, rank: int, stream: int) -> Key:
        """The Philox key and counter words."""
        return Key(self.seed, self.bucket, self.step, rank, self.stage, stream)

    def sign_rank(self, wire: Wire, rank: int) -> int:
        """The rank that signs are keyed by: 0 for all, or rank + 1."""
        return rank + 1 if wire.signs == "per_rank" else 0


def encode_rows(rows: Tensor, counts: Tensor, numbers: Tensor, wire: Wire, noise: Noise, rank: int) -> Tensor:
    """[m, chunk] fp32 rows, zero beyond `counts` [m] -> [m, record_bytes] uint8, see `records`.

    numbers   [m] int64: each record's place among those of its message, for the noise
    rank      the sender, among all ranks of the job
    """
    m, chunk = rows.shape
    y = _rotated(rows, wire, noise, rank)
    finite = y.isfinite().all(dim=1)
    y = torch.where(finite[:, None], y, 0.0)
    key = _key(numbers, chunk, noise.key(rank, ROUNDING))
    if wire.rounding == "eden":
        payload, block_scales, g = _eden(y, key)
    else:
        q = quantize(y, _spec(wire), key)
        payload, block_scales = q.codes, q.scales
        g = q.global_scale.expand(m, 1)[:, 0]
        if block_scales.dtype == torch.float32:
            g, block_scales = block_scales[:, 0], block_scales.new_empty((m, 0), dtype=torch.uint8)
    g = torch.where(finite, g * (1.0 / (wire.rotation or 1)), float("nan"))
    payload = torch.where(finite[:, None], payload, 0)
    return r.assemble(payload, torch.where(finite[:, None], block_scales, 0), g, counts, chunk, wire)


def decode_rows(records: Tensor, chunk: int, wire: Wire, noise: Noise, ranks: list[int]) -> Tensor:
    """[s, m, record_bytes] records of `s` senders `ranks` -> [m, chunk] fp32: their sum, in that order from the first.

    The rotation is turned back once, after the sum, or for each sender where their signs differ.
    """
    total = None
    for sender, rank in zip(records, ranks, strict=True):
        values = _values(sender, chunk, wire)
        if wire.signs == "per_rank":
            values = _turned_back(values, wire, noise, rank)
        total = values if total is None else total + values
    assert total is not None
    return total if wire.signs == "per_rank" else _turned_back(total, wire, noise, ranks[0])


def encode(x: Tensor, wire: Wire, noise: Noise, rank: int = 0) -> Tensor:
    """Flat order of `x` (bf16 or fp32, any shape) -> uint8 message of wire.bytes_of(x.numel()) bytes."""
    from fp4dist.comm.parts import Parts, encode_parts  # which stand on this module

    return encode_parts(Parts.of([x], wire), noise, rank)


def decode(
    message: Tensor, n: int, wire: Wire, noise: Noise, rank: int = 0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """[n] values of a message of `n` elements that `rank` has encoded; checks tags on a CPU."""
    from fp4dist.comm.parts import Parts, decode_parts

    out = torch.empty(n, dtype=dtype, device=message.device)
    place = f"a message of rank {rank}, bucket {noise.bucket}"
    decode_parts(Parts.of([out], wire), message[None], noise, [rank], check=not message.is_cuda, place=place)
    return out


def roundtrip(x: Tensor, wire: Wire, noise: Noise, rank: int = 0) -> Tensor:
    """What a receiver sees of `x`: fp32, shape of x."""
    return decode(encode(x, wire, noise, rank), x.numel(), wire, noise, rank).reshape(x.shape)


def signs(wire: Wire, noise: Noise, rank: int, device: torch.device) -> Tensor:
    """[rotation] fp32 of +-1."""
    return rng.random_signs(wire.rotation or 0, noise.key(noise.sign_rank(wire, rank), SIGNS), device)


def _rotated(x: Tensor, wire: Wire, noise: Noise, rank: int) -> Tensor:
    if not wire.rotation:
        return x
    signed = (x.unflatten(-1, (-1, wire.rotation)) * signs(wire, noise, rank, x.device)).flatten(-2)
    return butterflies(signed, wire.rotation)


def _turned_back(y: Tensor, wire: Wire, noise: Noise, rank: int) -> Tensor:
    if not wire.rotation:
        return y
    x = butterflies(y, wire.rotation).unflatten(-1, (-1, wire.rotation))
    return (x * signs(wire, noise, rank, y.device)).flatten(-2)


def _values(records: Tensor, chunk: int, wire: Wire) -> Tensor:
    """[m, record_bytes] -> [m, chunk] fp32 values in the rotated basis."""
    end = HEADER + wire.payload_bytes(chunk)
    g = records[:, 8:12].contiguous().view(torch.float32)
    values = c.decode_stored(records[:, HEADER:end].contiguous(), ELEMENTS[wire.kind])
    if wire.block:
        stored = records[:, end:]
        decoded = c.decode_e4m3(stored) if wire.kind == "nvfp4" else c.decode_e8m0(stored)
        values = (values.unflatten(-1, (-1, wire.block)) * decoded[..., None]).flatten(-2)
    return values * g


def _key(numbers: Tensor, chunk: int, key: Key) -> Key:
    """`key` for rows that are records of these numbers."""
    found = numbers.tolist()
    run = bool(found) and found == list(range(found[0], found[0] + len(found)))
    runs = (found[0],) if run else tuple(found)
    return Key(key.seed, key.layer, key.step, key.micro_batch, key.slot, key.stream, runs, (0,), None, chunk)


@lru_cache(maxsize=64)
def _spec(wire: Wire) -> QuantSpec:
    """The quantizer of rows of one record each, in the basis they are in; not that of eden."""
    noisy = wire.rounding == "stochastic"
    rounding = Stochastic() if noisy else Nearest()
    if wire.kind == "nvfp4":
        rule = AbsMax(headroom=E4M3_NO_CLIP if noisy else 1.0)
        return QuantSpec(format=NVFP4, outer="row", scale=rule, rounding=rounding)
    if wire.kind == "mxfp4":
        return QuantSpec(format=MXFP4, scale=Ceil(), rounding=rounding)
    row = Format(element=ELEMENTS[wire.kind], scale=FP32, block="row")
    return QuantSpec(format=row, rounding=rounding)


def _eden(y: Tensor, key: Key) -> tuple[Tensor, Tensor, Tensor]:
    """(packed codes, E4M3 scales, [m] fp32 scale): `numerics.quantize`'s eden, each row a tensor of its own."""
    block = (1, 16)
    q = scales.divide(block_amax(y, block), scales.target_max(E2M1.max, EDEN.headroom))
    u = flat(blocked(y, block) * scales.guarded_reciprocal(q)[:, None, :, None])
    found = c.encode_nearest(u, E2M1)
    products = tree_sum(u * c.decode(found, E2M1), block)
    s = tree_sum(u * u, block) / products
    corrected = q * torch.where(products == 0, 1.0, s)
    g = scales.divide(corrected.amax(dim=1, keepdim=True), EDEN.budget)
    g = torch.where(g == 0, 1.0, g)
    noise = rng.scale_noise(corrected.shape, key, block[1], y.device)
    return c.pack(found), c.encode_e4m3_stochastic(corrected / g, noise), g[:, 0]
