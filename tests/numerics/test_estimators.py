"""How gradients pass quantizers, and rounding toward a moving average: formulas, published numbers, brute force."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fp4dist.numerics import Key, dequantize, quantize, requantize
from fp4dist.numerics import codes as c
from fp4dist.numerics.estimators import amax_direction, inside, pack_bits, rows, scaled, slope, unpack_bits
from fp4dist.numerics.quantize import original
from fp4dist.numerics.rotation import filtered, rotate, unrotate
from fp4dist.spec.blocks import Eden, Ema, Hadamard, Nearest
from fp4dist.spec.build import build
from fp4dist.spec.estimators import Dge, TrustMask
from fp4dist.spec.formats import E2M1, ELEMENTS, ElementFormat
from fp4dist.spec.operand import QuantSpec
from tests.compare import assert_same_bits
from tests.generators import SPECS, families, normal, spec
from tests.numerics.quantizers import EXTRA

ALL = {**SPECS, **EXTRA}
NEAREST = [name for name in ALL if isinstance(build(QuantSpec, ALL[name]).rounding, Nearest)]
KEY = Key(seed=11, layer=2, step=3)
QUEST = {"format": "mxfp4", "scale": "quest", "rotation": {"size": 32, "signs": "none"}, "estimator": "mask"}


def made(data: dict[str, Any]) -> QuantSpec:
    return build(QuantSpec, data)


# ---------- the value that was rounded


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("name", NEAREST)
def test_the_scaled_value_rounds_to_the_code(name: str, rotated: bool) -> None:
    s = made(ALL[name])
    if rotated and s.shape[1] <= 128:
        s = replace(s, rotation=Hadamard(size=128, signs="fresh"))
    for family, x in families(256, 256).items():
        q = quantize(x, s, KEY)
        u = scaled(x, q.scales, q.global_scale, s, KEY).clamp(-s.format.element.max, s.format.element.max)
        assert isinstance(s.rounding, Nearest)
        codes = c.stored(c.encode_nearest(u, s.format.element, s.rounding.ties), s.format.element)
        assert torch.equal(codes, q.codes), family


@pytest.mark.parametrize(
    "name", ["nvfp4", "nvfp4_16x16", "mxfp4_34", "fp4_row", "fp4_tensor", "nvfp4_tile", "nvfp4_row"]
)
def test_rows_of_a_quantized_matrix_keep_their_values(name: str) -> None:
    x, s = normal(96, 256), made(ALL[name])
    q = quantize(x, s, KEY)
    part = rows(q, 40, 72)
    assert torch.equal(dequantize(part), dequantize(q)[40:72])
    whole = scaled(x, q.scales, q.global_scale, s, KEY)
    assert torch.equal(scaled(x[40:72], part.scales, part.global_scale, s, KEY), whole[40:72])


def test_a_mask_says_what_the_quantizer_clipped() -> None:
    """QuEST clips |x| > 6 * 2^floor(log2(0.487 std)): a share of normal data, most of it from the floor."""
    x, s = normal(512, 256), made(QUEST)
    q = quantize(x, s, KEY)
    mask = inside(scaled(x, q.scales, q.global_scale, s, KEY), s.format.element)
    assert s.rotation is not None
    y = rotate(x, s.rotation, None)
    step = torch.exp2(torch.floor(torch.log2(0.4870798 * y.unflatten(1, (-1, 32)).std(2, correction=0))))
    assert torch.equal(mask, y.abs() <= (6 * step).repeat_interleave(32, 1))
    assert 0.01 < (~mask).float().mean() < 0.2
    values = c.decode_stored(q.codes, s.format.element)
    assert (values[~mask].abs() == 6).all()


def test_nothing_is_inside_where_nothing_is_a_number() -> None:
    u = torch.tensor([6.0, -6.0, 6.0000005, -7.0, float("nan"), float("inf"), 0.0])
    assert inside(u, E2M1).tolist() == [True, True, False, False, False, False, True]
    assert slope(u, E2M1, Dge())[2:6].tolist() == [0.0] * 4


# ---------- the differentiable gradient estimator


def test_slope_at_the_released_codes_twenty_points() -> None:
    half = [0.2002, 0.4375, 0.6055, 0.2168, 1.8359, 0.2695, 0.3027, 0.2695, 0.2402, 0.5781]
    z = torch.linspace(-6, 6, 20).to(torch.bfloat16).to(torch.float32)
    found = slope(z, E2M1, Dge(k=5, cap=3)).to(torch.bfloat16).double()
    torch.testing.assert_close(found, torch.tensor([*half, *reversed(half)]).double(), atol=4e-5, rtol=0)


@pytest.mark.parametrize(("k", "mean"), [(5.0, 0.593), (3.0, 0.778), (10.0, 0.383)])
def test_facts_of_the_slope(k: float, mean: float) -> None:
    """Least on a level (1 / k), capped in the middle of a bin; the cap takes the mean over a bin below 1."""
    z = torch.linspace(0, 0.5, 2_000_001, dtype=torch.float64).float()
    found = slope(z, E2M1, Dge(k=k, cap=3))
    assert found.min().item() == pytest.approx(1 / k)
    assert (found[0], found[-1], found[1_000_000]) == (found.min(), found.min(), 3.0)
    assert found.mean().item() == pytest.approx(mean, abs=2e-3)
    share = (found == 3).double().mean().item()
    assert share == pytest.approx((3 * k) ** (k / (1 - k)), rel=2e-2)
    if k == 5:
        assert share == pytest.approx(0.0339, abs=1e-4)
    levels = torch.tensor(E2M1.levels)
    assert torch.allclose(slope(torch.cat((levels, -levels)), E2M1, Dge(k=k)), torch.tensor(1 / k))


@pytest.mark.parametrize("element", ["e2m1", "e1m2", "e3m0", "int4", "radix4_odd", "log7", "int2"])
@pytest.mark.parametrize("k", [1.0, 3.0, 5.0])
def test_slope_is_the_derivative_of_the_surrogate(element: str, k: float) -> None:
    grid = ELEMENTS[element]
    rng = np.random.default_rng(0)
    z = rng.uniform(-grid.max, grid.max, 4000)
    values = np.array(sorted({*grid.levels, *(-v for v in grid.levels)}))

    def surrogate(at: np.ndarray) -> np.ndarray:
        below = np.clip(np.searchsorted(values, at, side="right") - 1, 0, len(values) - 2)
        low, gap = values[below], values[below + 1] - values[below]
        t = 2 * (at - low) / gap - 1
        return low + gap / 2 * (1 + np.sign(t) * np.abs(t) ** (1 / k))

    h = 1e-7 * np.abs(z)
    derivative = (surrogate(z + h) - surrogate(z - h)) / (2 * h)
    found = slope(torch.from_numpy(z).float(), grid, Dge(k=k, cap=1e9)).double().numpy()
    near_edge = np.abs(found) > 50  # differences of a steep curve are no oracle
    np.testing.assert_allclose(found[~near_edge], derivative[~near_edge], rtol=2e-3, atol=1e-4)
    if k == 1:
        assert (found == 1).all()


# ---------- the gradient of a learned amax


@pytest.mark.parametrize("rotation", [None, Hadamard(size=16)])
def test_direction_of_the_amax_is_its_derivative(rotation: Hadamard | None) -> None:
    """Against lsq's own formula in numpy; and against the slope of the value where no code changes."""
    fmt = {"element": "int4", "scale": "fp32", "block": "tensor"}
    s = replace(made({"format": fmt, "amax": "learned", "estimator": "lsq"}), rotation=rotation)
    x, amax = normal(32, 64), torch.tensor(2.5 * (4 if rotation else 1))
    q = quantize(x, s, KEY, lambda _: amax)
    u = scaled(x, q.scales, q.global_scale, s, KEY)
    found = amax_direction(u, q).double().numpy()

    basis = rotate(x, rotation, KEY) * rotation.size**-0.5 if rotation else x
    step = float(amax) / 7 * (rotation.size**-0.5 if rotation else 1)
    v = basis.double().numpy() / step
    lsq = np.where(np.abs(v) <= 7, np.rint(v) - v, np.sign(v) * 7) * step
    np.testing.assert_allclose(found, lsq, atol=2e-6)
    assert 0 < (np.abs(v) > 7).sum() < v.size / 4

    other = quantize(x, s, KEY, lambda _: amax * (1 + 2.0**-12))
    change = (dequantize(other) - dequantize(q)).double().numpy() * 2.0**12
    clips = np.abs(v) > 7.01
    np.testing.assert_allclose(change[clips], found[clips], rtol=2e-3)


# ---------- masks and bases


@pytest.mark.parametrize("columns", [8, 96, 13])
def test_bits_are_packed_and_unpacked(columns: int) -> None:
    mask = normal(5, columns) > 0.3
    bits = pack_bits(mask)
    assert (bits.dtype, bits.shape) == (torch.uint8, (5, -(-columns // 8)))
    assert bits.numpy().tobytes() == np.packbits(mask.numpy(), axis=1, bitorder="little").tobytes()
    assert torch.equal(unpack_bits(bits, columns), mask)


@pytest.mark.parametrize(
    "rotation", [None, Hadamard(), Hadamard(size=32, signs="none"), Hadamard(size=128, signs="fresh")]
)
def test_filtering_acts_in_the_rotated_basis(rotation: Hadamard | None) -> None:
    x, factor = normal(16, 256), normal(16, 256, seed=1)
    ones = filtered(x, torch.ones_like(x), rotation, KEY)
    torch.testing.assert_close(ones, x, atol=2e-6, rtol=0)
    found = filtered(x, factor, rotation, KEY)
    if rotation is None:
        assert torch.equal(found, x * factor)
        return
    there = rotate(x, rotation, KEY) * rotation.size**-0.5
    torch.testing.assert_close(found, unrotate(there * factor, rotation, KEY), atol=5e-6, rtol=0)
    assert not torch.allclose(found, x * factor)


def test_codes_of_a_rotated_basis_are_turned_back() -> None:
    rotation = Hadamard(size=32, signs="none")
    x, s = normal(64, 96), made(QUEST)
    q = quantize(x, s, KEY)
    values = original(q, rotation)
    signs = [[(-1.0) ** (i & j).bit_count() for i in range(32)] for j in range(32)]
    turned = dequantize(replace(q, rotation=1)).double().unflatten(1, (3, 32)) @ torch.tensor(signs).double()
    assert torch.equal(values.double(), turned.flatten(1) / 32)  # exactly: what cancels leaves nothing
    assert (values == 0).sum() > 50
    assert ((values - x).square().mean() / x.square().mean()).item() < 0.05
    with pytest.raises(ValueError, match=r"codes are in a rotated basis of 32, not in that of None"):
        original(q, None)
    with pytest.raises(ValueError, match=r"requantize needs codes in the original basis, got rotation 32"):
        requantize(q, spec("mxfp4_34"), KEY)


# ---------- rounding toward a moving average


def brute_force(u: float, toward: float, grid: ElementFormat) -> float:
    """The definition, in exact arithmetic."""
    magnitude, sign = abs(u), -1.0 if np.signbit(u) else 1.0
    levels = list(grid.levels)
    if magnitude >= grid.max:
        return sign * grid.max
    if magnitude in levels:
        return sign * magnitude
    index = max(i for i, level in enumerate(levels) if level < magnitude)
    low, high, target = levels[index], levels[index + 1], sign * toward
    if target - low == high - target:
        return sign * (low if index % 2 == 0 else high)
    return sign * (low if abs(target - low) < abs(high - target) else high)


@pytest.mark.parametrize("element", ["e2m1", "int4", "radix4_even", "log7", "e4m3", "e5m2", "int2"])
def test_toward_takes_the_neighbour_nearer_to_the_average(element: str) -> None:
    grid = ELEMENTS[element]
    rng = np.random.default_rng(1)
    u = rng.uniform(-1.2 * grid.max, 1.2 * grid.max, 3000).astype(np.float32)
    u[:1000] = rng.choice([*grid.levels, *(-v for v in grid.levels)], 1000).astype(np.float32)
    near = u + rng.normal(0, grid.levels[1], 3000).astype(np.float32)
    middles = np.array([(a + b) / 2 for a, b in zip(grid.levels, grid.levels[1:], strict=False)], np.float32)
    near[:500] = rng.choice(middles, 500)
    near[2500:] = rng.choice(middles, 500) * np.sign(u[2500:])
    found = c.decode(c.encode_toward(torch.from_numpy(u), torch.from_numpy(near), grid), grid)
    expected = [brute_force(float(a), float(b), grid) for a, b in zip(u, near, strict=True)]
    assert found.tolist() == expected
    itself = c.encode_toward(torch.from_numpy(u), torch.from_numpy(u), grid)
    assert torch.equal(itself, c.encode_nearest(torch.from_numpy(u), grid))


@pytest.mark.parametrize("name", ["nvfp4", "nvfp4_16x16", "mxfp4_ceil", "mxfp4_34", "fp4_row"])
def test_a_moving_average_decides_between_neighbours_under_the_weights_own_scale(name: str) -> None:
    w = normal(64, 256)
    average = w + 0.2 * normal(64, 256, seed=1)
    for rotation in (None, Hadamard(size=32, signs="none")):
        nearest = replace(made(ALL[name]), rotation=rotation)
        ema = replace(nearest, rounding=Ema())
        plain, found = quantize(w, nearest), quantize(w, ema, None, None, average)
        assert_same_bits(quantize(w, ema), plain)
        assert_same_bits(quantize(w, ema, None, None, w), plain)
        assert torch.equal(found.scales, plain.scales)
        assert torch.equal(found.global_scale, plain.global_scale)
        assert 0.01 < (dequantize(found) != dequantize(plain)).float().mean() < 0.4
        u = scaled(w, found.scales, found.global_scale, nearest, None)
        towards = scaled(average, found.scales, found.global_scale, nearest, None)
        codes = c.encode_toward(u.clamp(-6, 6), towards.clamp(-6, 6), E2M1)
        assert torch.equal(c.stored(codes, E2M1), found.codes)
    with pytest.raises(ValueError, match=r"takes no moving average"):
        quantize(w, nearest, None, None, average)
    with pytest.raises(ValueError, match=r"moving average \[32, 256\] must have the matrix's shape \[64, 256\]"):
        quantize(w, ema, None, None, average[:32])


def jitter(toward: bool) -> tuple[float, float]:
    """(flips a step, R) of weights that stay at .25 + .01 N, about the edge of a bin, and jitter by .01 N each step."""
    decay, steps = 0.998, 1500
    generator = torch.Generator().manual_seed(5)
    centre = 0.25 + 0.01 * torch.randn(8192, generator=generator)
    average = centre
    flips, way, q_way = 0.0, torch.zeros(8192), torch.zeros(8192)
    last: tuple[Tensor, Tensor] | None = None
    for _ in range(steps):
        w = centre + 0.01 * torch.randn(8192, generator=generator)
        average = decay * average + (1 - decay) * w
        q = c.decode(c.encode_toward(w, average, E2M1) if toward else c.encode_nearest(w, E2M1), E2M1)
        if last is not None:
            flips += (q != last[1]).float().mean().item() / (steps - 1)
            way, q_way = way + (w - last[0]).abs(), q_way + (q - last[1]).abs()
        last = w, q
    return flips, (q_way / way).mean().item()


def test_an_average_ends_the_flipping_at_the_edge_of_a_bin() -> None:
    """Published: .332 flips a step and R 14.7; with the average 6e-4 and .03."""
    flips, ratio = jitter(toward=False)
    assert (flips, ratio) == (pytest.approx(0.332, abs=0.01), pytest.approx(14.7, abs=0.4))
    flips, ratio = jitter(toward=True)
    assert (flips, ratio) == (pytest.approx(6e-4, rel=0.35), pytest.approx(0.03, rel=0.35))


# ---------- four-over-six inside ms-eden


def eden(**fields: object) -> QuantSpec:
    return made(
        {"format": "nvfp4", "rounding": {"kind": "eden", **fields}, "rotation": {"size": 128, "signs": "fresh"}}
    )


def draws(s: QuantSpec, x: Tensor, number: int) -> list[Tensor]:
    """Independent draws in the original basis."""
    keys = [Key(seed=3, step=i) for i in range(number)]
    assert s.rotation is not None
    return [unrotate(dequantize(quantize(x, s, key)), s.rotation, key) for key in keys]


@pytest.mark.parametrize("align", ["post_hoc", "pre"])
@pytest.mark.parametrize("metric", ["mse", "mae", "absmax"])
def test_four_over_six_in_eden_has_less_error_and_no_bias(align: str, metric: str) -> None:
    x = normal(64, 256)
    plain, both = eden(align=align), eden(align=align, four_over_six=metric)
    power = x.double().square().sum()
    found = draws(both, x, 64)
    error = sum(((v - x).double().square().sum() / power).item() for v in found) / 64
    reference = sum(((v - x).double().square().sum() / power).item() for v in draws(plain, x, 8)) / 8
    mean = torch.stack(found).double().mean(0)
    concentration = error / ((mean - x).square().sum() / power).item()
    assert 58 <= concentration <= 70  # 64 if unbiased
    slope_ = ((mean * x).sum() / power).item()
    assert abs(slope_ - 1) < 1e-3
    if metric != "absmax":
        assert error < 0.93 * reference


@pytest.mark.parametrize("align", ["post_hoc", "pre"])
def test_eden_takes_the_candidate_with_the_smaller_error(align: str) -> None:
    """Blocks scaled so that 4/6 and 2/3 matter: amax to 4 stores 10, 20, 30, 40 nearly exactly, amax to 6 does not."""
    key = Key(seed=1)
    block = torch.tensor([10.0, 20.0, 30.0, 40.0]).repeat(4)
    x = torch.cat((block.repeat(7), torch.tensor([60.0, 40.0, 30.0, 20.0]).repeat(4)))[None].repeat(16, 1)
    rotation = Hadamard(size=16, signs="none")
    turned = unrotate(x, rotation, None)  # so that the quantizer sees the blocks themselves
    errors = {}
    for choice in ("none", "mse"):
        s = QuantSpec(
            format=made(SPECS["nvfp4"]).format, rounding=Eden(align=align, four_over_six=choice, headroom=1.0),  # type: ignore[arg-type]
            rotation=rotation, allow_bias=True,
        )  # fmt: skip
        values = dequantize(quantize(turned, s, key))
        errors[choice] = (values - x).square().reshape(16, 8, 16).mean(2)
    assert (errors["mse"][:, :7] < 0.5 * errors["none"][:, :7]).float().mean() > 0.9
    assert torch.equal(errors["mse"][:, 7] < 4, errors["none"][:, 7] < 4)


def test_the_choice_keeps_the_bits_of_eden_where_it_is_off() -> None:
    x = normal(32, 256)
    assert_same_bits(quantize(x, eden(), KEY), quantize(x, made(SPECS["eden"]), KEY))
    assert not torch.equal(quantize(x, eden(four_over_six="mse"), KEY).codes, quantize(x, eden(), KEY).codes)


# ---------- what is refused


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            {"format": "nvfp4", "rounding": "eden", "rotation": {"size": 128, "signs": "fresh"}, "estimator": "dge"},
            r"estimator = dge with eden: its stored scales are not those that its codes were made with",
        ),
        ({**QUEST, "split": "lowrank"}, r"estimator = mask with lowrank: what was taken out"),
        ({**QUEST, "outlier": "topk"}, r"estimator = mask with topk under a rotation"),
    ],
)
def test_estimators_that_could_not_be_judged(data: dict[str, Any], message: str) -> None:
    with pytest.raises(Exception, match=message):
        made(data)


def test_estimators_that_can() -> None:
    made({**QUEST, "outlier": "channels"})
    made({"format": "fp4_row", "outlier": "occ", "estimator": "dge"})
    assert made(QUEST).estimator == TrustMask()
