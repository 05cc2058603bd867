"""The clock turns a place in the run into a Philox key."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fp4dist.nn.apply import apply_recipe
from fp4dist.nn.clock import Clock, replayable
from fp4dist.numerics import Key
from fp4dist.spec.load import load_recipe
from fp4dist.spec.recipe import SLOTS, Recipe, Rule
from tests.generators import normal

LINEAR = load_recipe("quartet2").linears["fp4"]


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


def test_another_time_inside_a_block() -> None:
    clock = Clock(step=1, micro_batch=2)
    with clock.at(3, 4):
        assert (clock.step, clock.micro_batch) == (3, 4)
    assert (clock.step, clock.micro_batch) == (1, 2)
    with pytest.raises(KeyError), clock.at(3, 4):
        raise KeyError
    assert (clock.step, clock.micro_batch) == (1, 2)


def test_a_replay_sees_the_time_of_every_clock() -> None:
    first, second = Clock(step=1), Clock(step=2, micro_batch=7)
    copied = copy.deepcopy(second)

    def times(bonus: int) -> list[int]:
        return [bonus, first.step, second.step, second.micro_batch, copied.micro_batch]

    replay = replayable(times)
    for clock in (first, second, copied):
        clock.step, clock.micro_batch = 9, 9
    assert replay(5) == [5, 1, 2, 7, 7]
    assert replay(bonus=6) == [6, 1, 2, 7, 7]
    assert times(5) == [5, 9, 9, 9, 9]


def test_a_replay_does_not_keep_clocks_alive() -> None:
    clock = Clock()
    gone = weakref.ref(clock)
    replay = replayable(lambda: 1)
    del clock
    gc.collect()
    assert gone() is None
    assert replay() == 1


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("adjacent", [False, True])
def test_torch_checkpoint_with_fp4_linears(adjacent: bool, reentrant: bool) -> None:
    """torch.utils.checkpoint, as Hugging Face uses it: right as it is while forward and backward of a micro-batch are
    neighbours (gradient accumulation); where other micro-batches run in between, with `replayable`.
    """

    def gradients(wrap: Callable[[Callable[[Tensor], Tensor]], Callable[[Tensor], Tensor]]) -> list[Tensor]:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 128))
        applied = apply_recipe(
            model, Recipe(name="all", linears={"fp4": LINEAR}, rules=(Rule(path="*", linear="fp4"),))
        )
        outputs = []
        for micro_batch in range(2):
            applied.set_step(4, 10, micro_batch)
            x = normal(128, 128, seed=micro_batch).requires_grad_()
            outputs.append(wrap(model)(x))
            if adjacent:
                outputs.pop().square().mean().backward()
        for y in outputs:
            y.square().mean().backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    def checkpointed(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        kept = fn if adjacent else replayable(fn)
        return lambda x: checkpoint(kept, x, use_reentrant=reentrant)  # type: ignore[return-value]

    plain, recomputed = gradients(lambda fn: fn), gradients(checkpointed)
    assert len(plain) == 4
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))
