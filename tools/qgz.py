"""DeepSpeed's qgZ as a function for tools/bench_comm.py: builds its CUDA operators, which takes a minute once.

DeepSpeed's package brings their sources and builds them by nvcc and ninja at the first use. qgZ acts on fp16 matrices
alone (bf16 gradients are reinterpreted by its kernels) and on two levels: `device_count` ranks inside, the rest across.
Two GPUs of one host are one level, which its second half cannot be; as two nodes of one GPU each (`device_count` told
as 1), it codes once, as a flat exchange does. Its mean is over nodes, which are the ranks then.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor

WIDTH = 8192  # columns of the matrix that a payload becomes: one scale for so many elements


def start(world: int) -> Callable[[Tensor], Tensor]:
    """Build and connect: a function of [rows, WIDTH] fp16 that returns this rank's part of the mean; a collective call.

    Raises RuntimeError with the reason where it cannot be had.
    """
    try:
        import deepspeed
        from deepspeed.accelerator import get_accelerator
        from deepspeed.ops.op_builder import QuantizerBuilder  # pyright: ignore[reportAttributeAccessIssue]
        from deepspeed.runtime.comm import coalesced_collectives as collectives
        from deepspeed.utils import groups
    except ImportError as e:
        raise RuntimeError(f"deepspeed is not installed: {e}") from e
    if world != 2:
        raise RuntimeError(f"{world} ranks as nodes of one GPU each were not tried")
    accelerator: Any = get_accelerator()
    if accelerator.device_name() != "cuda":
        raise RuntimeError(f"its operators are CUDA's alone, the accelerator is {accelerator.device_name()}")
    try:
        if dist.get_rank() == 0:
            QuantizerBuilder().load(verbose=False)
        dist.barrier()
        collectives.quantizer_module = QuantizerBuilder().load(verbose=False)
    except (AttributeError, ImportError, OSError, RuntimeError, subprocess.SubprocessError) as e:
        raise RuntimeError(f"its operators do not build: {(str(e).strip() or repr(e)).splitlines()[-1][:300]}") from e
    deepspeed.init_distributed(dist_init_required=False)
    accelerator.device_count = lambda: 1  # two nodes, see above
    groups._ALL_TO_ALL_GROUP.clear()
    made = groups._get_local_all_to_all_group()
    return lambda matrix: collectives.all_to_all_quant_reduce([matrix], made)[0]
