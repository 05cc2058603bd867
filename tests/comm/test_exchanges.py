"""What a transfer hands to the process group is known to whoever keeps it until the device is done."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fp4dist.comm import exchanges
from fp4dist.comm.codec import Noise
from fp4dist.comm.exchange import Exchange, Members, Options
from fp4dist.comm.exchanges import Gather, Scatter, Swap
from fp4dist.spec.wire import NVFP4_WIRE

NOISE, OPTIONS, ALL = Noise(seed=1, step=2, bucket=3), Options(check=False), Members(None, 0, 3, (0, 1, 2))


def cut(sizes: tuple[int, ...]) -> list[list[Tensor]]:
    return [[torch.ones(n)] for n in sizes]


def made(kind: str, sizes: tuple[int, ...]) -> Exchange:
    parts = cut(sizes)
    if kind == "gather":
        return Gather(parts, parts[0], NVFP4_WIRE, NOISE, ALL, OPTIONS, "flat")
    if kind == "scatter":
        return Scatter([torch.empty(sizes[0])], parts, NVFP4_WIRE, NOISE, ALL, "sum", OPTIONS, "flat")
    outs = [torch.empty(n) for n in sizes]
    return Swap(outs, [t for tensors in parts for t in tensors], NVFP4_WIRE, NOISE, ALL, OPTIONS)


@pytest.mark.parametrize("sizes", [(256, 256, 256), (256, 256, 100)])
@pytest.mark.parametrize("kind", ["gather", "scatter", "swap"])
def test_nothing_is_sent_that_nobody_holds(kind: str, sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the memory of a tensor that only NCCL holds is given out again while NCCL still reads it."""
    given: list[Tensor] = []

    def collective(received: Tensor, message: Tensor, *_: Any, **__: Any) -> object:
        given.extend((received, message))
        return object()

    monkeypatch.setattr(exchanges.dist, "all_to_all_single", collective)
    monkeypatch.setattr(exchanges, "_all_gather", collective)
    exchange = made(kind, sizes)
    message = exchange.encode(0)
    received, _ = exchange.transfer(0, message)
    held = {t.untyped_storage().data_ptr() for t in (message, received, *exchange.copied())}
    assert len(given) == 2
    assert {t.untyped_storage().data_ptr() for t in given} <= held
    assert not exchange.copied(), "each is told once"
