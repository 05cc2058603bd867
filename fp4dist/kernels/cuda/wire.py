"""The wire codec of csrc/: the functions of `fp4dist.kernels.triton.wire`, whose docstrings hold; the same bits."""

from __future__ import annotations

import torch
from torch import Tensor

from fp4dist.kernels.triton.wire import Codec, last_word, rule
from fp4dist.numerics.tensor import Key

KINDS = {"nvfp4": 0, "mxfp4": 1, "fp8": 2, "int4": 3}
ROUNDINGS = {"nearest": 0, "stochastic": 1, "eden": 2}
_UNIT = 8
_LANES = 32
_WARPS_AN_SM = 16  # under a bound
_NO_BOUND = 2**31 - 1
_NO_KEY = (0,) * 5


def encode(x: Tensor, table: Tensor, records: Tensor, codec: Codec, sign_rank: int, aligned: bool) -> None:
    """As Triton's."""
    if len(table) == 0:
        return
    how = _how(codec, aligned, _words(codec.rounding), _words(codec.signs, sign_rank), _NO_KEY)
    torch.ops.fp4dist.wire_encode(x, table, records, how, (*rule(codec.wire), 1.0))


def accumulate(
    out: Tensor, own: Tensor | None, records: Tensor, table: Tensor, codec: Codec, ranks: Tensor, factor: float,
    aligned: bool, bad: Tensor | None = None,
) -> None:  # fmt: skip
    """As Triton's."""
    if len(table) == 0:
        return
    how = _how(codec, aligned, _NO_KEY, _NO_KEY, _words(codec.signs))
    torch.ops.fp4dist.wire_sum(out, own, records, table, ranks, bad, how, (0.0, 0.0, 0.0, factor))


def recode(
    messages: Tensor, own: Tensor | None, records: Tensor, table: Tensor, codec: Codec, after: Codec, ranks: Tensor,
    factor: float, sign_rank: int, aligned: bool, bad: Tensor | None = None,
) -> None:  # fmt: skip
    """As Triton's."""
    if len(table) == 0:
        return
    how = _how(codec, aligned, _words(after.rounding), _words(after.signs, sign_rank), _words(codec.signs))
    torch.ops.fp4dist.wire_recode(messages, own, records, table, ranks, bad, how, (*rule(codec.wire), factor))


def sum_plain(
    out: Tensor, own: Tensor | None, messages: Tensor, table: Tensor, own_at: int, factor: float, aligned: bool
) -> None:
    """As Triton's."""
    if len(table) == 0:
        return
    torch.ops.fp4dist.wire_plain(out, own, messages, table, _UNIT if aligned else 1, own_at, factor)


def _words(key: Key, rank: int | None = None) -> tuple[int, ...]:
    """Philox key and the last three counter words; rank: in place of the key's."""
    return key.seed, key.layer, key.micro_batch if rank is None else rank, key.step, last_word(key)


def _how(codec: Codec, aligned: bool, *keys: tuple[int, ...]) -> tuple[int, ...]:
    """The integers of a call, in the order of csrc/wire_jobs.h."""
    wire = codec.wire
    elements = 16 if codec.chunk <= 4096 else 32  # of a thread
    warps = codec.chunk // elements // _LANES
    programs = _NO_BOUND if codec.sms is None else max(1, codec.sms * _WARPS_AN_SM // warps)
    shared = (
        KINDS[wire.kind], ROUNDINGS[wire.rounding or ""], wire.rotation or 1, codec.chunk, int(wire.tag),
        int(wire.signs == "per_rank"), codec.word0, _UNIT if aligned else 1, programs,
    )  # fmt: skip
    return (*shared, *(word & 0xFFFFFFFF for key in keys for word in key))
