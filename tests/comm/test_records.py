"""Records read from their documented layout alone: numpy tables, a Hadamard matrix, no code of the codec."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from fp4dist.comm.codec import Noise, decode, encode, roundtrip
from fp4dist.comm.parts import rooms
from fp4dist.errors import WireError
from fp4dist.kernels.triton.wire import UNIT
from fp4dist.numerics import quantize, rng
from fp4dist.numerics.tensor import Key
from fp4dist.spec.build import build
from fp4dist.spec.recipe import QuantSpec
from fp4dist.spec.wire import Wire

NOISE = Noise(seed=11, step=3, bucket=5, stage=1)
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
KINDS = ("nvfp4", "mxfp4", "fp8", "int4")


def e4m3(code: np.ndarray) -> np.ndarray:
    exponent, mantissa = (code >> 3) & 15, code & 7
    value = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent.astype(float) - 10))
    return np.where(code & 127 == 127, np.nan, np.where(code & 128, -value, value))


def read(message: Tensor, wire: Wire, n: int) -> tuple[np.ndarray, np.ndarray]:
    """([m, 4] header words, [m, C] values in the basis of the codes) of a message of `n` elements."""
    chunk = wire.chunk_of(n)
    records = message.numpy().reshape(-1, wire.record_bytes(chunk))
    header = records[:, :16].copy().view("<u4")
    size = chunk if wire.kind == "fp8" else chunk // 2
    payload, scales = records[:, 16 : 16 + size], records[:, 16 + size :].astype(int)
    codes = payload if wire.kind == "fp8" else np.stack((payload & 15, payload >> 4), -1).reshape(len(records), chunk)
    if wire.kind == "fp8":
        values = e4m3(codes.astype(int))
    else:
        levels = np.arange(8.0) if wire.kind == "int4" else E2M1
        values = np.where(codes & 8, -1.0, 1.0) * levels[codes & 7]
    if wire.kind == "nvfp4":
        values = values * np.repeat(e4m3(scales), 16, axis=1)
    if wire.kind == "mxfp4":
        values = values * np.repeat(2.0 ** (scales.astype(float) - 127), 32, axis=1)
    return header, values * header[:, 2:3].copy().view("<f4").astype(float)


def turned_back(values: np.ndarray, wire: Wire, rank: int = 0) -> np.ndarray:
    """The stored scale has 1/size in it, so H and the signs remain."""
    if not wire.rotation:
        return values
    h = np.ones((1, 1))
    while len(h) < wire.rotation:
        h = np.block([[h, h], [h, -h]])
    words = rng.philox((0, rank + 1 if wire.signs == "per_rank" else 0, NOISE.step, NOISE.stage + 8 * 65), (11, 5))
    signs = np.array([1 - 2 * (words[i // 32] >> i % 32 & 1) for i in range(wire.rotation)])
    return (values.reshape(-1, wire.rotation) @ h * signs).reshape(values.shape)


def tag(record: np.ndarray, payload: int) -> int:
    units = [(int(w), i) for i, w in enumerate(record[16 : 16 + payload].copy().view("<u4"))]
    units += [(int(b), payload // 4 + i) for i, b in enumerate(record[16 + payload :])]
    units += [(int(w), (1 << 24) + i) for i, w in enumerate(record[:12].copy().view("<u4"))]
    total = 0
    for v, index in units:
        v = (v ^ index * 0x9E3779B9) * 0x85EBCA6B & 0xFFFFFFFF
        v ^= v >> 15
        total += v * 0xC2B2AE35
    return total & 0xFFFFFFFF


def wires() -> list[Wire]:
    found = [Wire(kind=k, rounding=r, rotation=o) for k in KINDS for r in ("nearest", "stochastic") for o in (0, 32)]  # type: ignore[arg-type]
    return [*found, Wire(), Wire(rotation=32), Wire(signs="per_rank"), Wire(chunk=512), Wire(chunk=16384, tag=False)]


@pytest.mark.parametrize("wire", wires(), ids=lambda w: f"{w.label()} {w.chunk}")
def test_a_record_is_what_its_layout_says(wire: Wire) -> None:
    n, rank = 5000, 2
    x = torch.randn(n) * torch.exp2(torch.randn(n) * 2)
    message = encode(x.bfloat16() if wire.rotation else x, wire, NOISE, rank)
    chunk = wire.chunk_of(n)
    assert message.numel() == wire.bytes_of(n) == -(-n // chunk) * wire.record_bytes(chunk)
    header, values = read(message, wire, n)
    assert (header[:, 0] >> 16 == 0xF4D1).all()
    assert (header[:, 0] >> 12 & 15 == 1).all()
    assert (header[:, 0] >> 8 & 15 == KINDS.index(wire.kind)).all()
    assert (header[:, 0] & 1 == 0).all()
    assert (header[:, 1] & 0xFFFFFF == [min(chunk, n - i * chunk) for i in range(len(header))]).all()
    assert (1 << (header[:, 1] >> 24) == chunk).all()
    found = turned_back(values, wire, rank).reshape(-1)
    decoded = decode(message, n, wire, NOISE, rank).double().numpy()
    np.testing.assert_allclose(decoded, found[:n], rtol=2e-5, atol=2e-6 * float(x.abs().max()))
    assert np.abs(found[n:]).max() < 0.4 * float(x.abs().max())
    records = message.numpy().reshape(-1, wire.record_bytes(chunk))
    assert header[0, 3] == (tag(records[0], wire.payload_bytes(chunk)) if wire.tag else 0)


# The error of one coding of normal data over its energy: published for NVFP4 (RTN 9.0e-3, SR 23.5e-3) and measured in
# plain numpy (corrected scales 9.28e-3); of int4 step^2 / 12 with step = amax / 7 and E[amax^2] = 15.0 of 4096 values.
EXPECTED = {
    Wire(rounding="nearest"): 9.0e-3, Wire(rounding="stochastic"): 23.5e-3, Wire(): 9.283e-3,
    Wire(kind="int4", rounding="nearest"): 15.0 / 49 / 12,
}  # fmt: skip


@pytest.mark.parametrize("wire", EXPECTED, ids=Wire.label)
def test_one_shot_error(wire: Wire) -> None:
    x = torch.randn(1 << 19, generator=torch.Generator().manual_seed(1))
    y = roundtrip(x, wire, NOISE)
    assert float((y - x).square().mean() / x.square().mean()) == pytest.approx(EXPECTED[wire], rel=0.03)
    assert wire.nmse == pytest.approx(EXPECTED[wire], rel=0.03)


@pytest.mark.parametrize("wire", [w for w in wires() if w.unbiased], ids=lambda w: f"{w.label()} {w.chunk}")
def test_errors_average_out(wire: Wire) -> None:
    """Of T independent codings the mean has 1/T of the error: what is left over would be bias."""
    times = 64
    x = torch.randn(16384, generator=torch.Generator().manual_seed(2)) * torch.arange(1, 5).repeat(4096)
    each = torch.stack([roundtrip(x, wire, Noise(1, step, 2)) - x for step in range(times)])
    ratio = times * each.mean(0).square().mean() / each.square().mean()
    assert float(ratio) == pytest.approx(1.0, abs=0.05)


def test_corrected_scales_are_the_quantizers() -> None:
    """A message of one record is a tensor: the bytes of `numerics.quantize` under one scale for the tensor."""
    wire = Wire(rotation=32, chunk=4096)
    plain = build(QuantSpec, {"format": "nvfp4", "rounding": "eden", "allow_bias": True})
    signs = rng.random_signs(32, NOISE.key(0, 65), torch.device("cpu"))
    h = torch.ones(1, 1)
    while len(h) < 32:
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)))
    small = torch.randint(-8, 9, (4096,)).float().view(-1, 32)  # integers: every order of summation is exact
    turned = ((small * signs) @ h).view(1, -1)
    q = quantize(turned, plain, Key(NOISE.seed, NOISE.bucket, NOISE.step, 0, NOISE.stage, 64))
    record = encode(small, wire, NOISE)
    assert torch.equal(record[16 : 16 + 2048], q.codes[0])
    assert torch.equal(record[16 + 2048 :], q.scales[0])
    assert float(record[8:12].view(torch.float32)) == float(q.global_scale) / 32


@pytest.mark.parametrize("wire", wires(), ids=lambda w: f"{w.label()} {w.chunk}")
def test_zeros_small_and_non_finite_values(wire: Wire) -> None:
    chunk = wire.chunk
    x = torch.zeros(5 * chunk)
    x[chunk : 2 * chunk] = torch.randn(chunk) * (1e-35 if wire.kind == "fp8" else 1e-38)  # 1 / scale is at most 3.4e38
    x[2 * chunk : 3 * chunk] = torch.randn(chunk)
    x[3 * chunk : 4 * chunk] = x[2 * chunk : 3 * chunk] * 1e30
    x[2 * chunk + 7], x[4 * chunk + 1] = float("nan"), float("-inf")
    y = roundtrip(x, wire, NOISE).view(5, chunk)
    assert y[0].eq(0).all()
    assert y[2].isnan().all()
    assert y[4].isnan().all()
    for i in (1, 3):
        assert y[i].isfinite().all()
        part = x.view(5, chunk)[i].double()
        assert float((y[i].double() - part).square().sum() / part.square().sum()) < 0.12
    message = encode(x, wire, NOISE).view(5, -1)
    assert message[2, 16:].eq(0).all()
    assert [int(record[0]) & 1 for record in message] == [0, 0, 1, 0, 1]


def test_noise_follows_its_key() -> None:
    """Equal keys, equal bytes; any other key, other bytes; positions differ within a message."""
    x = torch.randn(3, 4096).repeat(2, 1).flatten()
    for wire in (Wire(), Wire(rounding="stochastic")):
        first = encode(x, wire, NOISE, rank=1)
        assert torch.equal(first, encode(x, wire, Noise(11, 3, 5, 1), rank=1))
        for other in (Noise(12, 3, 5, 1), Noise(11, 4, 5, 1), Noise(11, 3, 6, 1), Noise(11, 3, 5, 2)):
            assert not torch.equal(first, encode(x, wire, other, rank=1))
        assert not torch.equal(first, encode(x, wire, NOISE, rank=2))
        rows = first.view(6, -1)[:, 16:]
        assert not torch.equal(rows[0], rows[3])


@pytest.mark.parametrize("at", [0, 5, 9, 13, 40, -1])
def test_a_changed_byte_is_named(at: int) -> None:
    wire, n = Wire(), 9000
    message = encode(torch.randn(n), wire, NOISE, rank=4)
    message[wire.record_bytes(4096) + at if at >= 0 else -1] ^= 32
    record = 1 if at >= 0 else 2
    with pytest.raises(WireError, match=rf"rank 4, bucket 5.*record {record} of 3"):
        decode(message, n, wire, NOISE, rank=4)


def test_records_of_another_wire_are_refused() -> None:
    message = encode(torch.randn(4096), Wire(rounding="nearest"), NOISE)
    with pytest.raises(WireError, match="same comm section"):
        decode(message, 4096, Wire(rounding="stochastic"), NOISE)
    with pytest.raises(WireError, match="disagree about sizes"):
        decode(message, 4000, Wire(rounding="nearest"), NOISE)


@pytest.mark.parametrize(
    "fields",
    [{"kind": "int4", "rounding": "eden"}, {"kind": "bf16", "rotation": 32}, {"chunk": 3000}, {"chunk": 128},
     {"kind": "fp8", "signs": "per_rank"}, {"rounding": "eden", "rotation": 0}],
)  # fmt: skip
def test_wires_that_do_not_exist(fields: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=" = "):
        build(Wire, fields)


def test_a_name_stands_for_its_usual_wire() -> None:
    assert build(Wire, "nvfp4") == Wire()
    assert build(Wire, "bf16") == Wire(kind="bf16", rounding="nearest", rotation=0)
    assert build(Wire, "fp8").unbiased
    assert Wire().bytes_per_element == 0.5625 + 16 / 4096


def test_rooms_lie_alike_in_every_call() -> None:
    """Tables on a GPU are kept by where parts lie to each other: fresh buffers of a step must not miss them."""
    found = []
    for _ in range(2):
        some = rooms([5, 0, 130, 4096], torch.device("cpu"))
        for i, room in enumerate(some):
            room.fill_(i)
        assert [room.tolist() for room in some] == [[float(i)] * n for i, n in enumerate((5, 0, 130, 4096))]
        found.append([room.storage_offset() for room in some])
    assert found[0] == found[1]
    assert all(offset % UNIT == 0 for offset in found[0])
