"""The helper that other tests rely on: results in order, first error with its traceback, no hang, no leftover."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.distributed import RankError, run_ranks

pytestmark = pytest.mark.distributed


def sum_of_ranks(offset: int) -> tuple[int, torch.Tensor]:
    x = torch.tensor(float(dist.get_rank() + offset))
    dist.all_reduce(x)
    return dist.get_rank(), x


def fail_on_rank_1() -> None:
    if dist.get_rank() == 1:
        raise KeyError("the reason")
    dist.barrier()  # never answered


def die_on_rank_0() -> None:
    if dist.get_rank() == 0:
        os._exit(7)


def sleep_on_rank_1() -> None:
    if dist.get_rank() == 1:
        time.sleep(60)


def own_init() -> tuple[int, int, str]:
    dist.init_process_group("gloo", init_method="env://")
    return dist.get_rank(), dist.get_world_size(), os.environ["EXTRA"]


def test_results_come_in_rank_order() -> None:
    results = run_ranks(sum_of_ranks, 2, 10)
    assert [rank for rank, _ in results] == [0, 1]
    assert all(torch.equal(x, torch.tensor(21.0)) for _, x in results)


def test_a_failing_rank_ends_the_others() -> None:
    with pytest.raises(RankError, match=r"rank 1 of 2: (?s:.*)the reason") as caught:
        run_ranks(fail_on_rank_1, 2)
    assert isinstance(caught.value.error, KeyError)


def test_a_dead_rank_is_named() -> None:
    with pytest.raises(RankError, match="rank 0 of 2: died with exit code 7"):
        run_ranks(die_on_rank_0, 2)


def test_a_hanging_rank_is_named() -> None:
    with pytest.raises(RankError, match=r"ranks \[1\] of 2 were not done after 2 s"):
        run_ranks(sleep_on_rank_1, 2, timeout=2)


def test_a_function_may_initialise_itself() -> None:
    assert run_ranks(own_init, 2, init=False, env={"EXTRA": "yes"}) == [(0, 2, "yes"), (1, 2, "yes")]
