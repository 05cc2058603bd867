"""Philox-4x32-10 against the known answers of Random123, and the counter's layout against a scalar re-derivation."""

from __future__ import annotations

from dataclasses import replace

import torch

from fp4dist.numerics.moment import Moment
from fp4dist.numerics.rng import element_noise, philox, random_signs, scale_noise
from fp4dist.numerics.tensor import Key

# kat_vectors of Random123 (philox4x32 10): counter, key, result.
VECTORS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def scalar_philox(counter: tuple[int, ...], key: tuple[int, int]) -> list[int]:
    c, (k0, k1), mask = list(counter), key, 0xFFFFFFFF
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k0, p1 & mask, (p0 >> 32) ^ c[3] ^ k1, p0 & mask]
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return c


def test_known_answers() -> None:
    for counter, key, expected in VECTORS:
        drawn = philox(tuple(torch.tensor(c, dtype=torch.int64) for c in counter), key)
        assert [int(w) for w in drawn] == list(expected)
        assert scalar_philox(counter, key) == list(expected)


def test_element_noise_layout() -> None:
    key = Key(seed=7, layer=0xDEADBEEF, step=5, micro_batch=3, slot=4)
    noise = element_noise(torch.Size((3, 24)), key, torch.device("cpu"))
    for row, column in ((0, 0), (0, 9), (1, 7), (2, 23)):
        element = row * 24 + column
        drawn = scalar_philox((element // 8, 3, 5, 4), (7, 0xDEADBEEF))
        half = element % 8
        assert int(noise[row, column]) == drawn[half // 2] >> 16 * (half % 2) & 0xFFFF


def test_scale_noise_layout() -> None:
    key = Key(seed=1, layer=2, step=9, micro_batch=8, slot=2, stream=1)
    noise = scale_noise(torch.Size((2, 5)), key, 16, torch.device("cpu"))
    for row, column in ((0, 0), (0, 3), (1, 0), (1, 4)):
        block = row * 5 + column
        assert int(noise[row, column]) == scalar_philox((block // 4, 8, 9, 2 + 8), (1, 2))[block % 4]


def test_a_shard_draws_its_part_of_the_global_noise() -> None:
    key = Key(seed=3, layer=4, slot=1)
    whole = element_noise(torch.Size((32, 64)), key, torch.device("cpu"))
    shard = Key(seed=3, layer=4, slot=1, row_runs=(16,), column_runs=(32,), columns=64)
    assert torch.equal(element_noise(torch.Size((16, 32)), shard, torch.device("cpu")), whole[16:, 32:])
    scales = scale_noise(torch.Size((32, 4)), key, 16, torch.device("cpu"))
    assert torch.equal(scale_noise(torch.Size((16, 2)), shard, 16, torch.device("cpu")), scales[16:, 2:])


def test_signs_are_shared_by_a_gemm_and_fresh_for_everything_else() -> None:
    base = Key(seed=1, layer=1, step=1, micro_batch=1, slot=2)
    signs = [
        random_signs(128, Key(**{**_fields(base), **change}).signs(), torch.device("cpu"))
        for change in ({}, {"slot": 3}, {"slot": 4}, {"step": 2}, {"micro_batch": 2}, {"layer": 2}, {"seed": 2})
    ]
    assert torch.equal(signs[0], signs[1])  # both operands of dgrad
    for other in signs[2:]:
        assert not torch.equal(signs[0], other)
    assert set(signs[0].tolist()) == {1.0, -1.0}


def test_a_moment_in_memory_stands_for_the_numbers() -> None:
    """Bits of every 32-bit time, also those whose highest bit is set; what was drawn before is drawn again."""
    cpu, moment = torch.device("cpu"), Moment(torch.device("cpu"))
    times: list[tuple[int, int]] = []
    moment.drawn("watch", lambda m: (None, lambda: times.append(tuple(m.time.tolist()))))
    for step, micro_batch in ((0, 1), (2**32 - 1, 2**31), (2**31 + 5, 7)):
        plain = Key(seed=3, layer=4, step=step, micro_batch=micro_batch, slot=2)
        timed = replace(plain, step=8, micro_batch=9, moment=moment)
        moment.set(step, micro_batch)
        assert torch.equal(*(element_noise(torch.Size((3, 24)), key, cpu) for key in (plain, timed)))
        assert torch.equal(*(random_signs(96, key.signs(), cpu) for key in (plain, timed)))
    assert [(a & 0xFFFFFFFF, b & 0xFFFFFFFF) for a, b in times] == [(1, 0), (2**31, 2**32 - 1), (7, 2**31 + 5)]


def _fields(key: Key) -> dict[str, int]:
    return {name: getattr(key, name) for name in ("seed", "layer", "step", "micro_batch", "slot")}
