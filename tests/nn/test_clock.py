"""The clock turns a place in the run into a Philox key."""

from __future__ import annotations

from fp4dist.nn.clock import Clock
from fp4dist.numerics import Key
from fp4dist.spec.recipe import SLOTS


def test_defaults() -> None:
    assert (Clock().seed, Clock().step, Clock().micro_batch, Clock().cache_weights) == (0, 0, 0, False)


def test_a_key_names_the_place_and_the_slot() -> None:
    clock = Clock(seed=1, step=2, micro_batch=3)
    for number, slot in enumerate(SLOTS):
        key = clock.key(9, slot)
        assert key == Key(seed=1, layer=9, step=2, micro_batch=3, slot=number)


def test_a_key_is_a_snapshot() -> None:
    clock = Clock(step=1)
    key = clock.key(9, "fprop.x")
    clock.step, clock.micro_batch = 5, 6
    assert (key.step, key.micro_batch) == (1, 0)
    assert clock.key(9, "fprop.x") != key
