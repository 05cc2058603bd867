"""The two values every operation exchanges: a block-scaled tensor and a noise key."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import IntEnum

import torch
from torch import Tensor

from fp4dist.spec.formats import Format


class Stream(IntEnum):
    """What noise of one slot is used for; part of the Philox counter."""

    ROUNDING = 0
    SIGNS = 1
    SECOND_TRY = 2  # of a quantizer that rounds twice and keeps one result


@dataclass(frozen=True, slots=True)
class Key:
    """Where in a run a tensor is quantized; decides every random bit and nothing else does.

    seed, layer   Philox key (32 bits each): the run's seed, the linear's number
    micro_batch   global micro-batch index, data-parallel rank included
    slot          index into `fp4dist.spec.recipe.SLOTS`
    stream        what the noise is for, or which of several independent draws
    row, column   where this shard starts in the global operand
    rows, columns the global operand's size; None: as many as the shard has
    row_pieces, column_pieces
                  a shard may be several equal runs, one from each of as many stretches of the global dimension, and
                  starts at `row` or `column` of each (SwiGLU's first linear: its part of gate, then its part of up)
    """

    seed: int = 0
    layer: int = 0
    step: int = 0
    micro_batch: int = 0
    slot: int = 0
    stream: int = Stream.ROUNDING
    row: int = 0
    column: int = 0
    rows: int | None = None
    columns: int | None = None
    row_pieces: int = 1
    column_pieces: int = 1

    def second_try(self) -> Key:
        """The key of a second, independent draw."""
        return replace(self, stream=Stream.SECOND_TRY)

    def signs(self) -> Key:
        """The key of the rotation's signs: one per GEMM, so that both operands share it."""
        first_slot = self.slot // 2 * 2  # a GEMM's operands are neighbours in SLOTS
        return Key(self.seed, self.layer, self.step, self.micro_batch, first_slot, Stream.SIGNS)


@dataclass(frozen=True, slots=True)
class BlockScaledTensor:
    """A matrix as codes and decode scales. Scales are in logical order; a hardware swizzle is the kernel's business.

    codes         [R, C/2] uint8, element 2j in the low nibble, 2j+1 in the high one
    scales        [R/br, C/bc] uint8, E4M3 or E8M0 bytes
    global_scale  [] fp32
    rotation      size n of the Hadamard groups along C, 1 for none; codes then hold the *unnormalized* rotation

    Invariant: value = decode(code) * decode(scale) * global_scale / sqrt(rotation), in the rotated basis.
    """

    codes: Tensor
    scales: Tensor
    global_scale: Tensor
    format: Format
    block: tuple[int, int]
    rotation: int = 1

    @property
    def shape(self) -> torch.Size:
        """[R, C]."""
        return torch.Size((self.codes.shape[0], self.codes.shape[1] * 2))

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and the global scale."""
        return sum(t.numel() * t.element_size() for t in (self.codes, self.scales, self.global_scale))

    def transpose(self) -> BlockScaledTensor:
        """The transposed matrix with the same values: for square blocks without rotation; codes are only moved."""
        if self.block[0] != self.block[1] or self.rotation != 1:
            raise ValueError(f"codes with block {self.block} and rotation {self.rotation} cannot be read transposed")
        nibbles = torch.stack((self.codes & 15, self.codes >> 4), dim=-1).flatten(-2).t()
        pairs = nibbles.reshape(nibbles.shape[0], -1, 2)
        return replace(self, codes=pairs[..., 0] | pairs[..., 1] << 4, scales=self.scales.t().contiguous())
