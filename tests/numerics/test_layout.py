"""The scale swizzle against its offset formula, and back."""

from __future__ import annotations

import pytest
import torch

from fp4dist.numerics.layout import swizzle, unswizzle


@pytest.mark.parametrize("shape", [(128, 4), (256, 12), (130, 5), (1, 1), (300, 64)])
def test_offsets_and_round_trip(shape: tuple[int, int]) -> None:
    rows, columns = shape
    scales = torch.randint(1, 127, shape, dtype=torch.uint8)
    flat = swizzle(scales)
    wide = -(-columns // 4)
    assert flat.numel() == -(-rows // 128) * wide * 512
    for m, k in ((0, 0), (rows - 1, columns - 1), (rows // 2, columns // 3), (min(rows - 1, 33), min(columns - 1, 2))):
        offset = ((m // 128) * wide + k // 4) * 512 + (m % 32) * 16 + ((m // 32) % 4) * 4 + k % 4
        assert flat[offset] == scales[m, k]
    assert torch.equal(unswizzle(flat, rows, columns), scales)
    assert int((flat != 0).sum()) == rows * columns  # padding is 0


def test_square_blocks_are_repeated_for_the_hardware() -> None:
    scales = torch.randint(1, 127, (8, 4), dtype=torch.uint8)
    flat = swizzle(scales, block_rows=16)
    assert torch.equal(unswizzle(flat, 128, 4), scales.repeat_interleave(16, 0))
    assert torch.equal(unswizzle(flat, 8, 4, block_rows=16), scales)
