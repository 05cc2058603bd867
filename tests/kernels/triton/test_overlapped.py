"""The Gluon kernel: its rings, barriers and sums in a model of Hopper's; on a GPU the same products as `rescaled`'s."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from fp4dist.kernels.triton import overlapped

pytestmark = pytest.mark.skipif(not overlapped.HAS_GLUON, reason="this Triton has no Gluon")


def ratios(factors: Tensor, kind: int) -> Tensor:
    """What `rescaled.ratios` makes of factors [R, S] of segments (2), of their first column (1), or of none (0)."""
    if kind < 2:
        return factors[:, :1].contiguous().view(1, -1) if kind else torch.ones(1, 1)
    rows, segments = factors.shape
    found = torch.ones(segments + 1, rows + -rows % overlapped.COLUMNS)
    found[1:segments, :rows] = (factors[:, :-1] / factors[:, 1:]).t()
    found[segments, :rows] = factors[:, -1]
    return found


@pytest.mark.parametrize(
    ("shape", "programs", "kinds", "add", "turns"),
    [
        ((300, 520, 640), 2, (2, 2), False, 1),  # tiles, rows and columns over; several tiles a program
        ((300, 520, 384), 2, (0, 2), False, 2),
        ((130, 260, 256), 3, (2, 0), True, 0),
        ((256, 512, 128), 1, (1, 2), False, 2),  # one segment a tile
    ],
)
def test_a_slow_gpu_gives_the_exact_sums(
    shape: tuple[int, int, int], programs: int, kinds: tuple[int, int], add: bool, turns: int
) -> None:
    from tests.kernels.triton import rings

    m, n, k = shape
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-3, 4, (r, k), generator=generator).bfloat16() for r in (m, n))
    factors = [torch.exp2(torch.randint(-1, 2, (r, k // 128), generator=generator).float()) for r in (m, n)]
    wide = [
        f.repeat_interleave(128, 1) if kind == 2 else f[:, :1] ** kind for f, kind in zip(factors, kinds, strict=True)
    ]
    exact = (a.double() * wide[0]) @ (b.double() * wide[1]).t()
    out = torch.full((m, n), 3.0, dtype=torch.float32 if add else torch.bfloat16)
    given = ratios(factors[0], kinds[0]), ratios(factors[1], kinds[1])
    rings.run(a, b, out, (torch.tensor(0.5), torch.tensor(2.0)), given, kinds, programs, add, turns)
    assert torch.equal(out, (exact + 3 * add).to(out.dtype))


def test_the_model_finds_what_a_gpu_would_do_wrong() -> None:
    from tests.kernels.triton import rings

    model = rings.Model(0, 1)
    ring = model.allocate(None, [2, 4, 4], "blocks")
    operands = ring.index(0), rings.Turned(ring.index(1))
    with pytest.raises(AssertionError, match="not arrived"):
        model.multiply(*operands, torch.zeros(4, 4), is_async=True)
    for i in range(2):
        ring.index(i).data = torch.ones(4, 4)
    flying = model.multiply(*operands, torch.zeros(4, 4), is_async=True)
    barrier = rings.Barrier()
    rings.init(barrier, 1)
    with pytest.raises(AssertionError, match="for ever"):
        model.wait(barrier, 0)
    model.expect(barrier, 32)
    source = type("Source", (), {"values": torch.ones(4, 4)})
    with pytest.raises(AssertionError, match="still reads"):
        model.copy(source, [0, 0], barrier, ring.index(0))
    model.multiply(*operands, flying, is_async=True)
    with pytest.raises(AssertionError, match="still work on"):
        model.multiply(*operands, flying, is_async=True)
    second = model.wait_for(1, [model.flying[0][1]])
    assert torch.equal(model.wait_for(0, [second]), torch.full((4, 4), 8.0))
    with pytest.raises(AssertionError, match="another warp"):
        model.copy(source, [0, 0], barrier, ring.index(0))
    with pytest.raises(AssertionError, match="for ever"):
        model.warp_specialize([(lambda: model.wait(barrier, 0), ())], [], [])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_compiled_kernel_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlapped, "_allowed", True)
    from tests.kernels.triton import gemm_parity

    found = [*gemm_parity.of_products(torch.device("cuda:0")), *gemm_parity.of_scaled_segments(torch.device("cuda:0"))]
    assert found == []
