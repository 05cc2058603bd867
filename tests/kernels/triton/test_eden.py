"""How MS-EDEN's second pass is divided among programs; its bits are compared in `parity`."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from fp4dist.kernels.triton.eden import _scales
from fp4dist.numerics.tensor import Want

WANT = Want(True, torch.bfloat16)


@pytest.mark.parametrize("rows", [1, 7, 64, 4096])
@pytest.mark.parametrize("blocks", [1, 3, 8, 24, 86, 256, 688, 1024])
def test_every_block_has_one_program(rows: int, blocks: int) -> None:
    launches, programs = _scales(rows, blocks, WANT, torch.device("cpu"))
    told = [launch._constants for launch in launches]
    tall, across = told[0]["M"], told[0]["C"]
    seen = torch.zeros(-(-rows // tall) * tall, blocks, dtype=torch.int32)
    for program in range(programs):  # as `scale_kernel` finds its tile
        row, col = program // (blocks // across) * tall, program % (blocks // across) * across
        seen[row : row + tall, col : col + across] += 1
    assert (seen == 1).all()
    assert told[0]["EVEN"] == (rows % tall == 0)
    assert [one["ALIKE"] for one in told] == [False, across % 4 == 0]


def test_one_compiled_kernel_serves_only_what_is_compiled_alike() -> None:
    """Triton compiles another kernel for sizes that 16 divides."""
    device = torch.device("cpu")
    launches = [_scales(rows, blocks, WANT, device)[0] for rows, blocks in ((64, 48), (80, 80), (72, 48), (64, 24))]
    assert launches[0] is launches[1]
    assert len({id(pair) for pair in launches}) == 3
