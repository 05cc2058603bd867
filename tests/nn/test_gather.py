"""Which gathers of sequence parallelism are packed; with process groups in tests/megatron/test_layers.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from fp4dist.nn.comm import Dim, NoComm
from fp4dist.nn.function import fp4_linear
from fp4dist.nn.gather import TokenGather, gather_words
from fp4dist.numerics import BlockScaledTensor, dequantize, quantize
from fp4dist.spec.load import load_recipe
from fp4dist.spec.recipe import Dgrad, Fprop, LinearRecipe, Wgrad
from tests.generators import normal, spec
from tests.nn.one_linear import make_plan

NV, SQUARE, SR = spec("nvfp4"), spec("nvfp4_16x16"), spec("nvfp4_sr")
QUARTET2, NVIDIA = load_recipe("quartet2").linears["fp4"], load_recipe("nvidia_nvfp4").linears["fp4"]


@dataclass
class Shards(NoComm):
    """Rank 0 of `size`; the other ranks' parts of whatever is gathered are given."""

    token_shard: Literal["x", "y"] | None = "x"
    size: int = 2
    split: Dim | None = "O"
    context: tuple[int, int] = (0, 1)
    others: tuple[Tensor, ...] = ()

    def all_gather(self, part: Tensor) -> Callable[[], Tensor]:
        return lambda: torch.cat((part, *self.others))


X, Y = Shards("x"), Shards("y", split="I")


@pytest.mark.parametrize(
    ("recipe", "comm", "tokens", "expected"),
    [
        (NVIDIA, X, None, {"fprop.x": "packed", "wgrad.x": "packed"}),
        (NVIDIA, Y, None, {"dgrad.dy": "packed", "wgrad.dy": "packed"}),
        (NVIDIA, NoComm(), 512, {}),
        (NVIDIA, Shards("x", size=1), 512, {}),
        (NVIDIA, X, 16, {"fprop.x": "packed", "wgrad.x": "high"}),  # 8 tokens a rank: less than a block
        (NVIDIA, Y, 16, {"dgrad.dy": "high", "wgrad.dy": "high"}),
        (QUARTET2, X, 128, {"fprop.x": "packed", "wgrad.x": "packed"}),  # the rotation straddles: forward codes again
        (QUARTET2, Y, 128, {"dgrad.dy": "high", "wgrad.dy": "high"}),
        (QUARTET2, Y, 256, {"dgrad.dy": "packed", "wgrad.dy": "packed"}),
        (QUARTET2, Shards("y", size=3, context=(1, 2)), 768, {"dgrad.dy": "packed", "wgrad.dy": "packed"}),
        (QUARTET2, Shards("y", size=2, context=(1, 2)), 256, {"dgrad.dy": "packed", "wgrad.dy": "packed"}),
        (LinearRecipe(), X, 512, {"fprop.x": "high", "wgrad.x": "high"}),
        (LinearRecipe(fprop=Fprop(x=replace(NV, amax_scope="shard"))), X, 512, {"fprop.x": "high", "wgrad.x": "high"}),
        (LinearRecipe(wgrad=Wgrad(x=NV)), X, 512, {"fprop.x": "high", "wgrad.x": "packed"}),
        (LinearRecipe(dgrad=Dgrad(dy=SR)), Y, 512, {"dgrad.dy": "high", "wgrad.dy": "high"}),
        # 8 tokens a rank cut a 16x16 block: the forward gather is bf16, the codes of all tokens stay on every rank
        (
            LinearRecipe(fprop=Fprop(x=SQUARE), wgrad=Wgrad(x=replace(SQUARE, source="reuse"))), X, 16,
            {"fprop.x": "high"},
        ),
    ],
)  # fmt: skip
def test_words_for_the_table(recipe: LinearRecipe, comm: NoComm, tokens: int | None, expected: dict[str, str]) -> None:
    assert gather_words(recipe, comm, tokens) == expected


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("name", ["nvfp4", "nvfp4_16x16", "mxfp4"])
def test_parts_are_put_side_by_side(name: str, columns: bool) -> None:
    """Codes and scales of three parts give the values of the whole."""
    x = normal(96, 192)
    x[0, 0] = 9.0
    whole = quantize(x, spec(name))
    parts = [quantize(p, spec(name), None, lambda _: torch.tensor(9.0)) for p in x.chunk(3, 1 if columns else 0)]
    assert all(torch.equal(p.global_scale, whole.global_scale) for p in parts)
    buffers = [torch.cat((p.codes.flatten(), p.scales.flatten())) for p in parts]
    gather = TokenGather(make_plan(NVIDIA), Shards(size=3, others=tuple(buffers[1:])))
    got = (gather.columns if columns else gather.rows)("wgrad.x", parts[0], 2)()
    assert isinstance(got, BlockScaledTensor)
    assert torch.equal(got.codes, whole.codes)
    assert torch.equal(got.scales, whole.scales)
    assert torch.equal(dequantize(got), dequantize(whole))
    assert gather.tally.gathered_bytes == sum(b.numel() for b in buffers[1:])
    assert gather.tally.gathered_bytes_high == 2 * 2 * x.numel() // 3


class Twin(Shards):
    """Two ranks with the same half of the tokens: what the other one sends is what this one has."""

    def all_gather(self, part: Tensor) -> Callable[[], Tensor]:
        return lambda: torch.cat((part, part))

    def reduce_dx(self, dx: Tensor) -> Callable[[], Tensor]:
        return lambda: dx.chunk(2)[0]


@pytest.mark.parametrize(("recipe", "kept"), [(QUARTET2, 9 / 16), (NVIDIA, 4.0), (LinearRecipe(), 4.0)])
def test_only_this_ranks_part_is_kept_for_backward(recipe: LinearRecipe, kept: float) -> None:
    """Bytes an element of x: its codes where they are requantized, else x; of half the tokens, not of all."""
    x, w, dy = normal(128, 128), normal(256, 128, seed=1), normal(256, 256, seed=2)
    saved: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    mine = x.clone().requires_grad_()
    with saved_tensors_hooks(keep, lambda t: t):
        y = fp4_linear(mine, w.requires_grad_(), make_plan(recipe), Twin())
    assert torch.equal(y, fp4_linear(torch.cat((x, x)), w, make_plan(recipe), NoComm()))
    of_x = [t for t in saved if t.shape[:1] == (128,)]
    assert sum(t.numel() * t.element_size() for t in of_x) == kept * x.numel()
    assert not any(t.shape[:1] == (256,) and t.shape[1:] == (128,) for t in saved)
    y.backward(dy)
    assert mine.grad is not None
    assert mine.grad.shape == x.shape
