"""Logical block scales <-> the 128x4 swizzle that Blackwell's block-scaled MMA and cuBLASLt read.

Each tile of 128 rows x 4 scale columns becomes 512 contiguous bytes, ordered [32][4][4] (row % 32, row / 32, column):
offset(m, k) = ((m/128) * ceil(K/4) + k/4) * 512 + (m%32) * 16 + ((m/32)%4) * 4 + k%4.
"""

from __future__ import annotations

import torch
from torch import Tensor

TILE_ROWS, TILE_COLUMNS, SUB_ROWS = 128, 4, 32


def swizzle(scales_MK: Tensor, block_rows: int = 1) -> Tensor:
    """[M, K] logical scale bytes -> flat uint8 [ceil(M/128)*128 * ceil(K/4)*4], padded with 0.

    block_rows   rows that share a stored scale (16 for 16x16 blocks); each is repeated, as the hardware expects
    """
    expanded = scales_MK.repeat_interleave(block_rows, dim=0)
    rows, columns = expanded.shape
    pad = (0, -columns % TILE_COLUMNS, 0, -rows % TILE_ROWS)
    padded = torch.nn.functional.pad(expanded, pad)
    tiles = padded.reshape(-1, TILE_ROWS // SUB_ROWS, SUB_ROWS, padded.shape[1] // TILE_COLUMNS, TILE_COLUMNS)
    return tiles.permute(0, 3, 2, 1, 4).reshape(-1)


def unswizzle(flat: Tensor, rows: int, columns: int, block_rows: int = 1) -> Tensor:
    """Inverse of `swizzle`: flat bytes -> [rows, columns] logical scales (rows counted in stored scales)."""
    padded_columns = columns + -columns % TILE_COLUMNS
    tiles = flat.reshape(-1, padded_columns // TILE_COLUMNS, SUB_ROWS, TILE_ROWS // SUB_ROWS, TILE_COLUMNS)
    padded = tiles.permute(0, 3, 2, 1, 4).reshape(-1, padded_columns)
    return padded[: rows * block_rows : block_rows, :columns].contiguous()
