"""Process counts that fit, decisions of rank 0 that reach all ranks, and a world that leaves nothing behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from fp4dist.errors import ConfigError
from fp4dist.train.world import check_sizes, open_world
from tests.distributed import run_ranks
from tests.train.tiny_run import tiny_run, with_overrides

EXPERTS = ("model.moe={num_experts: 4, ffn_hidden_size: 64}",)


def test_data_parallel_is_what_remains(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, "train.global_batch_size=8")
    assert [check_sizes(config, n) for n in (1, 2, 4)] == [1, 2, 4]
    cut = with_overrides(config, "parallel", tp=2, pp=2)
    assert check_sizes(cut, 8) == 2


@pytest.mark.parametrize(
    ("overrides", "world", "message"),
    [
        (
            ("parallel.tp=2",),
            3,
            r"WORLD_SIZE = 3 is not a multiple of parallel\.tp \* pp \* cp = 2 \* 1 \* 1 = 2; start a",
        ),
        (("parallel.tp=2", "parallel.pp=2"), 2, r"= 2 \* 2 \* 1 = 4"),
        ((), 3, r"train\.global_batch_size = 4 is not a multiple of .* = 2 \* 3 = 6"),
        (("parallel.cp=2",), 3, r"= 1 \* 1 \* 2 = 2"),
        (
            ("parallel.pp=2", "parallel.vpp=2", "model.num_layers=4", "train.micro_batch_size=4"),
            2,
            r"1 micro-batches, which is not a multiple of parallel\.pp = 2",
        ),
        ((*EXPERTS, "parallel.ep=4", "parallel.pp=2"), 4, r"parallel\.ep = 4 does not divide the 2 ranks of a"),
    ],
)
def test_sizes_that_do_not_divide(tmp_path: Path, overrides: tuple[str, ...], world: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_sizes(tiny_run(tmp_path, *overrides), world)


def agree(folder: str) -> list[object]:
    found: list[object] = []
    config = tiny_run(Path(folder))
    with open_world(config) as world:
        found += [world.rank, world.size, world.dp_rank, world.dp_size, world.device.type]
        found.append(world.from_rank0(lambda: {"rank": dist.get_rank()}))
        found += [world.any(world.rank == 1), world.any(False)]
        for error in (ConfigError("of rank 0"), FileNotFoundError(2, "gone", "file")):
            with pytest.raises(type(error), match=r"of rank 0|gone"):
                world.from_rank0(lambda e=error: (_ for _ in ()).throw(e))
        world.barrier()
    with open_world(config):  # the groups are gone and can be made again
        pass
    assert dist.is_initialized(), "a process group of the caller stays"
    return found


def test_rank_0_decides_and_all_agree(tmp_path: Path) -> None:
    first, second = run_ranks(agree, 2, str(tmp_path))
    assert first == [0, 2, 0, 2, "cpu", {"rank": 0}, True, False]
    assert second == [1, 2, 1, 2, "cpu", {"rank": 0}, True, False]


def alone(folder: str) -> tuple[bool, bool, int, list[bool]]:
    repeatable: list[bool] = []
    with open_world(tiny_run(Path(folder))) as world:
        inside = dist.is_initialized() and world.size == 1
        threads = torch.get_num_threads()

    def fail(chosen: str) -> None:
        with open_world(tiny_run(Path(folder), f"train.deterministic={chosen}")):
            repeatable.append(torch.are_deterministic_algorithms_enabled())
            raise ConfigError("inside")

    for chosen in ("true", "false"):
        with pytest.raises(ConfigError, match="inside"):
            fail(chosen)
        repeatable.append(torch.are_deterministic_algorithms_enabled())
    return inside, dist.is_initialized(), threads, repeatable


def test_a_world_of_its_own_ends_with_it(tmp_path: Path) -> None:
    ((inside, after, threads, repeatable),) = run_ranks(alone, 1, str(tmp_path), init=False)
    assert inside
    assert not after
    assert threads >= 1
    assert repeatable == [True, False, False, False], "also on a CPU, and not in the next run of the process"
