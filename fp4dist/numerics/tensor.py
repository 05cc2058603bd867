"""The values every operation exchanges: a block-scaled tensor, alone or with a part beside it, and a noise key."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from fp4dist.numerics.moment import Moment
from fp4dist.spec.formats import Format


class Stream(IntEnum):
    """What noise of one slot is used for; part of the Philox counter."""

    ROUNDING = 0
    SIGNS = 1
    SECOND_TRY = 2  # of a quantizer that rounds twice and keeps one result
    MORE_SAMPLES = 3  # of a quantizer that averages several draws: 3 for the second of them, 4 for the third ...
    LEFT_FACTOR = 32  # of a part of low rank beside the codes: its factor along the rows
    RIGHT_FACTOR = 33  # likewise along the columns


@dataclass(frozen=True, slots=True)
class Key:
    """Where in a run a tensor is quantized; decides every random bit and nothing else does.

    seed, layer   Philox key (32 bits each): the run's seed, the linear's number
    micro_batch   global micro-batch index, data-parallel rank included
    slot          index into `fp4dist.spec.recipe.SLOTS`
    stream        what the noise is for, or which of several independent draws
    row_runs, column_runs
                  where this shard's rows and columns begin in the global operand: one position where it is one run of
                  them; several where it is as many equal runs, in this order (SwiGLU's first linear: its part of gate,
                  then its part of up; context parallelism: an early and a late piece of the sequence)
    rows, columns the global operand's size; None: as many as the shard has
    moment        step and micro-batch in device memory, which hold in place of the numbers: in a CUDA graph
    """

    seed: int = 0
    layer: int = 0
    step: int = 0
    micro_batch: int = 0
    slot: int = 0
    stream: int = Stream.ROUNDING
    row_runs: tuple[int, ...] = (0,)
    column_runs: tuple[int, ...] = (0,)
    rows: int | None = None
    columns: int | None = None
    moment: Moment | None = field(default=None, compare=False, repr=False)

    def second_try(self) -> Key:
        """The key of a second, independent draw."""
        return replace(self, stream=Stream.SECOND_TRY)

    def sample(self, index: int) -> Key:
        """The key of draw number `index` of several; the first is this key."""
        return self if index == 0 else replace(self, stream=Stream.MORE_SAMPLES + index - 1)

    def signs(self) -> Key:
        """The key of the rotation's signs: one per GEMM, so that both operands share it."""
        first_slot = self.slot // 2 * 2  # a GEMM's operands are neighbours in SLOTS
        return Key(self.seed, self.layer, self.step, self.micro_batch, first_slot, Stream.SIGNS, moment=self.moment)


@dataclass(frozen=True, slots=True)
class BlockScaledTensor:
    """A matrix as codes and decode scales. Scales are in logical order; a hardware swizzle is the kernel's business.

    codes         [R, C/2] uint8, element 2j in the low nibble, 2j+1 in the high one; [R, C] for elements above 4 bits
    scales        [R/br, C/bc] uint8 bytes, or fp32
    global_scale  [] fp32, or [m, n]: one for each of m x n equal tiles of the matrix ([R, 1]: one a row)
    block         the rows and columns that share a scale, as numbers: [1, C] where a row has one scale
    rotation      size n of the Hadamard groups along C, 1 for none; codes then hold the *unnormalized* rotation
    samples       independent draws of the same matrix, side by side in `codes`; scales and shape are those of one
    carrier       the same matrix for GEMMs, if its quantizer wrote one; what changes codes drops it, `pack` leaves it
    inside        [R, C/8] packed bits, where the quantizer did not clip, if it wrote them (`numerics.estimators.mask`)

    Invariant: value = decode(code) * decode(scale) * global_scale / sqrt(rotation), in the rotated basis.
    """

    codes: Tensor
    scales: Tensor
    global_scale: Tensor
    format: Format
    block: tuple[int, int]
    rotation: int = 1
    samples: int = 1
    carrier: Carrier | None = field(default=None, compare=False, repr=False)
    inside: Tensor | None = field(default=None, compare=False, repr=False)

    @property
    def shape(self) -> torch.Size:
        """[R, C]."""
        rows, width = self.codes.shape
        return torch.Size((rows, width * (2 if self.format.element.packed else 1) // self.samples))

    def sample(self, index: int) -> BlockScaledTensor:
        """Draw number `index` alone."""
        if self.samples == 1:
            return self
        width = self.codes.shape[1] // self.samples
        return replace(self, codes=self.codes[:, index * width : (index + 1) * width], samples=1, carrier=None)

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and the global scale."""
        return sum(t.numel() * t.element_size() for t in (self.codes, self.scales, self.global_scale))

    def transpose(self) -> BlockScaledTensor:
        """The transposed matrix with the same values: for square blocks, or one scale for all, without rotation; codes
        are only moved.
        """
        one_scale = self.scales.numel() == 1
        turns = (one_scale or self.block[0] == self.block[1]) and self.global_scale.dim() == 0
        if not turns or self.rotation != 1 or self.samples != 1:
            raise ValueError(f"codes with block {self.block} and rotation {self.rotation} cannot be read transposed")
        scales = self.scales.t().contiguous()
        if not self.format.element.packed:
            codes = self.codes.t().contiguous()
            return replace(self, codes=codes, scales=scales, block=self.block[::-1], carrier=None, inside=None)
        nibbles = torch.stack((self.codes & 15, self.codes >> 4), dim=-1).flatten(-2).t()
        pairs = nibbles.reshape(nibbles.shape[0], -1, 2)
        codes = pairs[..., 0] | pairs[..., 1] << 4
        return replace(self, codes=codes, scales=scales, block=self.block[::-1], carrier=None, inside=None)


class Chosen(NamedTuple):
    """Where alone what stands beside codes may differ from zero.

    numbers   [k] int64, distinct, of columns or rows; two operands have the same where it is the same tensor
    dim       1: columns, which a product contracts; 0: rows
    cleared   whether the codes are zero there
    alone     whether the side is [R, k], these columns alone: as it is kept between forward and backward
    """

    numbers: Tensor
    dim: int
    cleared: bool
    alone: bool = False


@dataclass(frozen=True, slots=True)
class PartedTensor:
    """A matrix as a sum: codes, and what was taken out of them (see `fp4dist.spec.splits`).

    main      the codes
    side      [R, C] fp32, or bf16 where that holds it, zero where nothing was taken out (see also `Chosen.alone`);
              None: nothing stands beside
    partner   [R, C] likewise: what the *other* operand's side multiplies in place of this operand's value, where a
              method multiplies it by more than the codes; None: this operand's value
    chosen    where `side` may differ from zero, and a `partner` that stands without one; None: anywhere
    straight  of rotated codes: side and partner are in the original basis, and can be multiplied with each other alone

    Invariant: value = value of main + side / sqrt(rotation). Like codes, `side` and `partner` hold the *unnormalized*
    rotation, in the basis of main, so that a product needs the factor 1 / rotation alone; unless they are straight.
    """

    main: BlockScaledTensor
    side: Tensor | None = None
    partner: Tensor | None = None
    chosen: Chosen | None = field(default=None, compare=False)
    straight: bool = False

    @property
    def shape(self) -> torch.Size:
        """[R, C]."""
        return self.main.shape

    @property
    def rotation(self) -> int:
        """That of the codes."""
        return self.main.rotation

    @property
    def added(self) -> Tensor | None:
        """[R, C] `side` for whoever adds it to the codes' values; ValueError where it is in another basis."""
        if self.side is not None and self.straight:
            raise ValueError(
                "this operand's side is in the original basis and its codes are rotated: multiply it with an operand"
                " that has a partner, or quantize without `straight`"
            )
        if self.side is None or self.chosen is None or not self.chosen.alone:
            return self.side
        return self.side.new_zeros(self.shape).index_copy_(1, self.chosen.numbers, self.side)

    def plus_side(self, values: Tensor, factor: float = 1.0) -> Tensor:
        """[R, C] fp32 `values` of the codes, which may be written to, with the side times `factor` added."""
        if self.side is None:
            return values
        if self.chosen is not None and self.chosen.alone:
            return values.index_add_(1, self.chosen.numbers, self.side.to(torch.float32) * factor)
        side = self.added
        assert side is not None
        return values.add_(side) if factor == 1 else values + side.to(torch.float32) * factor

    @property
    def samples(self) -> int:
        """Independent draws of the codes; the side stands once."""
        return self.main.samples

    @property
    def format(self) -> Format:
        """That of the codes."""
        return self.main.format

    @property
    def nbytes(self) -> int:
        """Bytes of all parts as they are held here: dense."""
        dense = sum(t.numel() * t.element_size() for t in (self.side, self.partner) if t is not None)
        return self.main.nbytes + dense

    def sample(self, index: int) -> PartedTensor:
        """Draw number `index` of the codes, with the same side."""
        return replace(self, main=self.main.sample(index))

    def transpose(self) -> PartedTensor:
        """The transposed matrix with the same values, where the codes can be read so."""
        return PartedTensor(self.main.transpose(), None if self.added is None else self.added.t().contiguous())


@dataclass(frozen=True, slots=True)
class Carrier:
    """A quantized matrix as exact values of a type that tensor cores multiply: what a GEMM reads in place of codes.

    values    [R, C] bf16, float8_e5m2 or float8_e4m3fn: decode(code) * decode(block scale) * 2^shift, the rotation
              unnormalized as in codes
    scale     [] fp32, on the device: the factor that all values share (global scale / 2^shift)
    rotation  size n of the Hadamard groups along C
    rows      [R, n] fp32 further factor of each of n equal parts of a row ([R, 1]: of the row); None: 1
    lost      [] int32, on the device: elements that `values` could not hold exactly; None where its type holds them all
    near      the factors of parts lie in [1, 2), or in [2^-8, 2) where values are below 1e-30, and `scale` is 1: powers
              of two are in `values` already, so that a GEMM may divide one factor by another

    Invariant, where nothing is lost: value = values * scale * rows / sqrt(rotation), in the rotated basis.
    """

    values: Tensor
    scale: Tensor
    rotation: int = 1
    rows: Tensor | None = None
    lost: Tensor | None = None
    near: bool = False

    @property
    def shape(self) -> torch.Size:
        """[R, C]."""
        return self.values.shape


class Want(NamedTuple):
    """What a quantizer is to give: codes with scales, or a carrier of a type, or both.

    With both, the codes have the carrier at their side (`BlockScaledTensor.carrier`); a carrier alone is a `Carrier`.

    mask     beside codes also the bits of where nothing was clipped, from quantizers that have them
    memory   [8] int32 that a quantizer may keep between matrices of a slot, zeros at first: results do not depend on it
    lost     [] int32 that is to become the most elements that an FP8 carrier has lost so far, where it counts them
    spread   [2] int32 that is to become the largest E8M0 byte so far, and 256 less the smallest of a block that is not
             all zeros (so 0 as long as there was none), from quantizers of power-of-two scales
    """

    codes: bool = True
    carrier: torch.dtype | None = None
    mask: bool = False
    memory: Tensor | None = None
    lost: Tensor | None = None
    spread: Tensor | None = None


CODES = Want()
Quantized = BlockScaledTensor | PartedTensor


def unturned(q: Quantized) -> Quantized:
    """`q` as if its codes were in the original basis: its values then are sqrt(rotation) times as large, unrounded."""
    if isinstance(q, PartedTensor):
        return replace(q, main=replace(q.main, rotation=1, carrier=None))
    return replace(q, rotation=1, carrier=None)


Layout = tuple[Format, tuple[int, int], int, int]  # of codes: format, block, rotation, samples


def pack(operand: Quantized) -> tuple[list[Tensor], Layout]:
    """(tensors for `save_for_backward`, the rest) of a quantized operand's value; a `partner` stays behind.

    Of chosen columns that alone stand beside the codes only those are kept.
    """
    main = operand.main if isinstance(operand, PartedTensor) else operand
    tensors, layout = (
        [main.codes, main.scales, main.global_scale],
        (main.format, main.block, main.rotation, main.samples),
    )
    if not isinstance(operand, PartedTensor) or operand.side is None:
        return tensors, layout
    chosen = operand.chosen
    if chosen is None or chosen.dim == 0 or operand.straight:
        side = operand.added
        assert side is not None
        return [*tensors, side], layout
    side = operand.side if chosen.alone else operand.side.index_select(1, chosen.numbers)
    return [*tensors, side, chosen.numbers], layout


def unpack(tensors: Sequence[Tensor], layout: Layout) -> Quantized:
    """What `pack` was given, less its partner."""
    codes, scales, global_scale = tensors[:3]
    main = BlockScaledTensor(codes, scales, global_scale, *layout)
    if len(tensors) == 3:
        return main
    chosen = Chosen(tensors[4], 1, cleared=False, alone=True) if len(tensors) == 5 else None
    return PartedTensor(main, tensors[3], None, chosen)
