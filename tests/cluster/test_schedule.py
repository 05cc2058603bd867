"""Pipeline orders against Megatron-core's own tables, and against what any schedule must satisfy."""

from __future__ import annotations

import pytest
from megatron.core.pipeline_parallel import schedules

from fp4dist.cluster.schedule import program
from fp4dist.errors import ConfigError

SHAPES = [(1, 1, 5), (2, 1, 3), (4, 1, 8), (4, 2, 8), (8, 8, 16), (3, 5, 9), (4, 3, 4)]


class Communicator:
    """What Megatron asks for the place in the pipeline."""

    def __init__(self, rank: int, size: int, chunks: int) -> None:
        self.pp_group = self
        self.rank, self.size = lambda: rank, lambda: size
        self.virtual_pipeline_model_parallel_size = chunks if chunks > 1 else None


@pytest.mark.parametrize(("stages", "chunks", "micro_batches"), SHAPES)
def test_interleaved_order_is_megatrons(stages: int, chunks: int, micro_batches: int) -> None:
    table = schedules.get_schedule_table(micro_batches, chunks, stages if chunks > 1 else micro_batches)
    for stage in range(stages):
        passes = program(stage, stages, chunks, micro_batches)
        forwards = [(p.micro_batch, p.chunk) for p in passes if p.forward]
        backwards = [(p.micro_batch, chunks - 1 - p.chunk) for p in passes if not p.forward]
        assert forwards == backwards == table
        ahead = next(i for i, p in enumerate(passes) if not p.forward)
        megatrons = schedules.get_pp_rank_microbatches(
            micro_batches, chunks, stages, p2p_communicator=Communicator(stage, stages, chunks)
        )
        warmup = megatrons[2]
        # the steady phase begins with a forward pass, unless warm-up took them all
        assert ahead == min(warmup + 1, micro_batches * chunks)


@pytest.mark.parametrize(("stages", "chunks", "micro_batches"), SHAPES)
def test_each_pass_once_and_backward_after_forward(stages: int, chunks: int, micro_batches: int) -> None:
    for stage in range(stages):
        passes = program(stage, stages, chunks, micro_batches)
        assert len(set(passes)) == len(passes) == 2 * chunks * micro_batches
        assert all(passes.index(p._replace(forward=True)) < i for i, p in enumerate(passes) if not p.forward)


def test_interleaving_needs_whole_groups() -> None:
    with pytest.raises(ConfigError, match=r"6 micro-batches are not a multiple of pp = 4.*set vpp to 1"):
        program(0, 4, 2, 6)
